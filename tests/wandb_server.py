"""Test server for the real wandb client: answers the requests of its runs, sweeps and agents on loopback.

    with run_server() as server:
        environment = server.environment(folder)

Each GraphQL operation is answered by its name; `unknown` lists the operations without an answer.
"""

import itertools
import json
import os
import random
import re
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .loopback_server import JsonHandler, LoopbackServer, serve

KEY = "local-" + "0123456789abcdef" * 2 + "01234567"
ENTITY = "someone"


@dataclass
class Run:
    """State of a run as the client has sent it."""

    id: str
    project: str
    name: str = ""
    group: str = ""
    sweep: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    preempting: bool = False

    @property
    def history(self) -> list[dict[str, Any]]:
        """Rows in order, without wandb's own columns other than `_step`."""
        rows = [self.lines[n] for n in sorted(self.lines)]
        return [{k: v for k, v in row.items() if k == "_step" or k[0] != "_"} for row in rows]


@dataclass
class Sweep:
    """A sweep and its points that no run has received yet."""

    id: str
    config: str
    points: list[dict[str, Any]]
    state: str = "RUNNING"


class Server(LoopbackServer):
    """HTTP server with runs, sweeps and agents in memory."""

    def __init__(self) -> None:
        super().__init__(RequestHandler)
        self.runs: dict[str, Run] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.agents: dict[str, str] = {}
        self.handed_out: dict[str, dict[str, Any]] = {}
        """Run id -> parameters."""
        self.unknown: list[str] = []
        self.keys: set[str] = set()
        """Values of the Authorization header."""
        self.lock = threading.RLock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore the broken connections of killed clients."""

    def environment(self, folder: Path) -> dict[str, str]:
        """Return the environment variables of a client with a key for this server and files in `folder`."""
        other_variables = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        return {
            **other_variables,
            "HOME": str(folder),
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
            "WANDB_DIR": str(folder),
            "WANDB_CONFIG_DIR": str(folder / "config"),
            "WANDB_CACHE_DIR": str(folder / "cache"),
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.2",
        }

    def parameters(self, run: Run) -> dict[str, Any]:
        """Return the parameters that a sweep assigned to a run."""
        return self.handed_out[run.id]


class RequestHandler(JsonHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.read_body())
        self.server.keys.add(self.headers.get("Authorization", ""))
        with self.server.lock:
            if self.path == "/graphql":
                self.answer(self._operation(body["query"], body.get("variables") or {}))
            else:
                self.answer(_update_run(self.server, self.path.split("/")[4], body))

    def do_PUT(self) -> None:
        self.read_body()
        self.answer({})

    def _operation(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        match = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = match[1] if match else query
        if name not in _OPERATIONS:
            self.server.unknown.append(name)
            return {"errors": [{"message": f"unknown operation {name}"}]}
        return {"data": _OPERATIONS[name](self.server, variables)}


def _update_run(server: Server, run_id: str, body: dict[str, Any]) -> dict[str, Any]:
    run = server.runs[run_id]
    for name, part in (body.get("files") or {}).items():
        rows = [json.loads(line) for line in part["content"] if line] if name.startswith("wandb-") else []
        if name == "wandb-history.jsonl":
            run.lines.update({part["offset"] + n: row for n, row in enumerate(rows)})
        elif name == "wandb-summary.json" and rows:
            run.summary = rows[-1]
    run.preempting = run.preempting or bool(body.get("preempting"))
    if body.get("complete"):
        run.exit_code = body.get("exitcode")
    return {"stopped": False}


def _describe_viewer(server: Server, variables: dict[str, Any]) -> dict[str, Any]:
    teams: dict[str, Any] = {"edges": [{"node": {"name": ENTITY, "isTeam": False}}]}
    user = {"id": "VXNlcg==", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}"}
    return {"viewer": {**user, "admin": False, "teams": teams, "apiKeys": {"edges": []}}, "serverInfo": None}


def _describe_project(name: str) -> dict[str, Any]:
    return {"id": "UHJvamVjdA==", "name": name, "entity": {"id": "RW50aXR5", "name": ENTITY}}


def _describe_run(run: Run) -> dict[str, Any]:
    return {
        "id": run.id,
        "name": run.id,
        "displayName": run.name,
        "description": None,
        "config": json.dumps(run.config),
        "sweepName": run.sweep,
        "project": _describe_project(run.project),
        "historyLineCount": len(run.lines),
    }


def _upsert_run(server: Server, variables: dict[str, Any]) -> dict[str, Any]:
    is_new = variables["name"] not in server.runs
    run = server.runs.setdefault(variables["name"], Run(variables["name"], variables.get("project") or ""))
    run.name = variables.get("displayName") or run.name
    run.group = variables.get("groupName") or run.group
    run.sweep = variables.get("sweep") or run.sweep
    if variables.get("config"):
        config = json.loads(variables["config"])
        run.config = {name: entry["value"] for name, entry in config.items() if name != "_wandb"}
    return {"upsertBucket": {"bucket": _describe_run(run), "inserted": is_new}}


def _describe_resumed_run(server: Server, variables: dict[str, Any]) -> dict[str, Any]:
    run = server.runs.get(variables.get("name") or variables.get("run") or "")
    if run is None:
        return {"model": {"id": "TW9kZWw=", "name": variables.get("project"), "bucket": None}}
    last = json.dumps([json.dumps(run.lines[max(run.lines)])] if run.lines else [])
    config = {name: {"value": value} for name, value in run.config.items()}
    counts = {"historyLineCount": len(run.lines), "eventsLineCount": 0, "logLineCount": 0}
    tails = {"historyTail": last, "eventsTail": "[]", "summaryMetrics": json.dumps(run.summary)}
    # `t` is telemetry: for the client, a run without it has never started.
    settings = {"config": json.dumps(config), "tags": [], "notes": None, "wandbConfig": '{"t": {}}'}
    return {
        "model": {
            **_describe_project(run.project),
            "bucket": {**_describe_run(run), **counts, **tails, **settings},
        }
    }


def _list_upload_urls(server: Server, variables: dict[str, Any]) -> dict[str, Any]:
    names = variables.get("files") or []
    files = [{"name": name, "uploadUrl": f"{server.url}/upload/{name}"} for name in names]
    return {"createRunFiles": {"runID": "UnVu", "uploadHeaders": [], "files": files}}


def _upsert_sweep(server: Server, variables: dict[str, Any]) -> dict[str, Any]:
    if variables.get("id"):
        server.sweeps[variables["id"]].state = variables["state"]
        return {"upsertSweep": {"sweep": {"name": variables["id"]}, "configValidationWarnings": []}}
    config = yaml.safe_load(variables["config"])
    name = f"sweep{len(server.sweeps)}"
    server.sweeps[name] = Sweep(name, variables["config"], list_sweep_points(config))
    sweep = {"name": name, "project": _describe_project(variables.get("projectName") or "gkd-lab")}
    return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}


def list_sweep_points(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all points of a grid, the first name varying slowest, or `run_cap` draws of a random sweep."""
    axes = {
        name: entry.get("values", [entry.get("value")])
        for name, entry in sorted(config["parameters"].items())
    }
    if config["method"] == "random":
        draw = random.Random(0)
        draws = range(config["run_cap"])
        return [{name: draw.choice(values) for name, values in axes.items()} for _ in draws]
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _describe_sweep(server: Server, variables: dict[str, Any]) -> dict[str, Any]:
    sweep = server.sweeps.get(variables["sweep"])
    if sweep is None:
        return {"project": {"sweep": None}}
    description = {"id": sweep.id, "name": sweep.id, "state": sweep.state, "config": sweep.config}
    return {"project": {"sweep": {**description, "runs": {"edges": []}}}}


def _create_agent(server: Server, variables: dict[str, Any]) -> dict[str, Any]:
    name = f"agent{len(server.agents)}"
    server.agents[name] = variables["sweep"]
    return {"createAgent": {"agent": {"id": name}}}


def _answer_heartbeat(server: Server, variables: dict[str, Any]) -> dict[str, Any]:
    sweep = server.sweeps[server.agents[variables["id"]]]
    commands: list[dict[str, Any]] = []
    if not json.loads(variables.get("runState") or "{}"):
        if sweep.points:
            point = _convert_like_backend(sweep.points.pop(0))
            run = f"run{len(server.handed_out)}"
            server.handed_out[run] = point
            arguments = {name: {"value": value} for name, value in point.items()}
            commands = [{"type": "run", "run_id": run, "args": arguments, "program": None}]
        else:
            commands = [{"type": "exit"}]
    return {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}}


def _convert_like_backend(point: dict[str, Any]) -> dict[str, Any]:
    """Return the point with whole floats as integers, as wandb's backend does."""
    return {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in point.items()}


_OPERATIONS = {
    "Viewer": _describe_viewer,
    "UpsertBucket": _upsert_run,
    "RunResumeStatus": _describe_resumed_run,
    "CreateRunFiles": _list_upload_urls,
    "OrganizationCoreWeaveOrganizationID": lambda *_: {"entity": None},
    "ServerFeaturesQuery": lambda *_: {"serverInfo": {"features": []}},
    "UpsertSweep": _upsert_sweep,
    "SweepWithRuns": _describe_sweep,
    "CreateAgent": _create_agent,
    "Heartbeat": _answer_heartbeat,
}


def run_server() -> AbstractContextManager[Server]:
    """Run a server on a free loopback port until the block ends."""
    return serve(Server())
