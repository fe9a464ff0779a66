"""A stand-in for wandb's server on loopback: what the real client's runs, sweeps and agents ask of it.

    with serving() as server:
        environment = server.environment(folder)

It answers each operation by its name with what the clients read, and lists operations that it does not know.
"""

import itertools
import json
import os
import random
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

KEY = "local-" + "0123456789abcdef" * 2 + "01234567"
ENTITY = "someone"


@dataclass
class Run:
    """What the server was told of a run."""

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
        """The rows in order, without wandb's own columns other than `_step`."""
        rows = [self.lines[n] for n in sorted(self.lines)]
        return [{k: v for k, v in row.items() if k == "_step" or k[0] != "_"} for row in rows]


@dataclass
class Sweep:
    """A sweep and the parameters that it still hands out."""

    id: str
    config: str
    left: list[dict[str, Any]]
    state: str = "RUNNING"


class Server(ThreadingHTTPServer):
    """Runs, sweeps and agents, in memory."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.runs: dict[str, Run] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.agents: dict[str, str] = {}
        self.handed_out: dict[str, dict[str, Any]] = {}
        """Run id -> parameters."""
        self.unknown: list[str] = []
        self.keys: set[str] = set()
        """Values of the Authorization header."""
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed leaves its connections as they are."""

    def environment(self, folder: Path) -> dict[str, str]:
        """Of a client that knows this server, has a key, and keeps its files in `folder`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        return {
            **kept,
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
        """What a sweep gave to a run."""
        return self.handed_out[run.id]


class _Answers(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys.add(self.headers.get("Authorization", ""))
        with self.server.lock:
            if self.path == "/graphql":
                self._reply(self._operation(body["query"], body.get("variables") or {}))
            else:
                self._reply(_stream(self.server, self.path.split("/")[4], body))

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._reply({})

    def _operation(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = found[1] if found else query
        if name not in _OPERATIONS:
            self.server.unknown.append(name)
            return {"errors": [{"message": f"unknown operation {name}"}]}
        return {"data": _OPERATIONS[name](self.server, variables)}

    def _reply(self, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def _stream(server: Server, run_id: str, body: dict[str, Any]) -> dict[str, Any]:
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


def _viewer(server: Server, variables: dict[str, Any]) -> dict[str, Any]:
    teams: dict[str, Any] = {"edges": [{"node": {"name": ENTITY, "isTeam": False}}]}
    user = {"id": "VXNlcg==", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}"}
    return {"viewer": {**user, "admin": False, "teams": teams, "apiKeys": {"edges": []}}, "serverInfo": None}


def _project(name: str) -> dict[str, Any]:
    return {"id": "UHJvamVjdA==", "name": name, "entity": {"id": "RW50aXR5", "name": ENTITY}}


def _bucket(run: Run) -> dict[str, Any]:
    return {
        "id": run.id,
        "name": run.id,
        "displayName": run.name,
        "description": None,
        "config": json.dumps(run.config),
        "sweepName": run.sweep,
        "project": _project(run.project),
        "historyLineCount": len(run.lines),
    }


def _upsert_run(server: Server, variables: dict[str, Any]) -> dict[str, Any]:
    new = variables["name"] not in server.runs
    run = server.runs.setdefault(variables["name"], Run(variables["name"], variables.get("project") or ""))
    run.name = variables.get("displayName") or run.name
    run.group = variables.get("groupName") or run.group
    run.sweep = variables.get("sweep") or run.sweep
    if variables.get("config"):
        stated = json.loads(variables["config"])
        run.config = {name: one["value"] for name, one in stated.items() if name != "_wandb"}
    return {"upsertBucket": {"bucket": _bucket(run), "inserted": new}}


def _resume_status(server: Server, variables: dict[str, Any]) -> dict[str, Any]:
    run = server.runs.get(variables.get("name") or variables.get("run") or "")
    if run is None:
        return {"model": {"id": "TW9kZWw=", "name": variables.get("project"), "bucket": None}}
    last = json.dumps([json.dumps(run.lines[max(run.lines)])] if run.lines else [])
    config = {name: {"value": value} for name, value in run.config.items()}
    counts = {"historyLineCount": len(run.lines), "eventsLineCount": 0, "logLineCount": 0}
    tails = {"historyTail": last, "eventsTail": "[]", "summaryMetrics": json.dumps(run.summary)}
    # `t` is telemetry: the client takes a run without it for one that never started.
    more = {"config": json.dumps(config), "tags": [], "notes": None, "wandbConfig": '{"t": {}}'}
    return {"model": {**_project(run.project), "bucket": {**_bucket(run), **counts, **tails, **more}}}


def _run_files(server: Server, variables: dict[str, Any]) -> dict[str, Any]:
    names = variables.get("files") or []
    files = [{"name": name, "uploadUrl": f"{server.url}/upload/{name}"} for name in names]
    return {"createRunFiles": {"runID": "UnVu", "uploadHeaders": [], "files": files}}


def _upsert_sweep(server: Server, variables: dict[str, Any]) -> dict[str, Any]:
    if variables.get("id"):
        server.sweeps[variables["id"]].state = variables["state"]
        return {"upsertSweep": {"sweep": {"name": variables["id"]}, "configValidationWarnings": []}}
    config = yaml.safe_load(variables["config"])
    name = f"sweep{len(server.sweeps)}"
    server.sweeps[name] = Sweep(name, variables["config"], points_of(config))
    sweep = {"name": name, "project": _project(variables.get("projectName") or "gkd-lab")}
    return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}


def points_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    """All points of a grid, the first name slowest; of a random sweep as many draws as its `run_cap`."""
    axes = {name: one.get("values", [one.get("value")]) for name, one in sorted(config["parameters"].items())}
    if config["method"] == "random":
        draw = random.Random(0)
        drawn = range(config["run_cap"])
        return [{name: draw.choice(values) for name, values in axes.items()} for _ in drawn]
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _sweep_with_runs(server: Server, variables: dict[str, Any]) -> dict[str, Any]:
    sweep = server.sweeps.get(variables["sweep"])
    if sweep is None:
        return {"project": {"sweep": None}}
    told = {"id": sweep.id, "name": sweep.id, "state": sweep.state, "config": sweep.config}
    return {"project": {"sweep": {**told, "runs": {"edges": []}}}}


def _create_agent(server: Server, variables: dict[str, Any]) -> dict[str, Any]:
    name = f"agent{len(server.agents)}"
    server.agents[name] = variables["sweep"]
    return {"createAgent": {"agent": {"id": name}}}


def _heartbeat(server: Server, variables: dict[str, Any]) -> dict[str, Any]:
    sweep = server.sweeps[server.agents[variables["id"]]]
    commands: list[dict[str, Any]] = []
    if not json.loads(variables.get("runState") or "{}"):
        if sweep.left:
            point = _as_the_backend(sweep.left.pop(0))
            run = f"run{len(server.handed_out)}"
            server.handed_out[run] = point
            given = {name: {"value": value} for name, value in point.items()}
            commands = [{"type": "run", "run_id": run, "args": given, "program": None}]
        else:
            commands = [{"type": "exit"}]
    return {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}}


def _as_the_backend(point: dict[str, Any]) -> dict[str, Any]:
    """1.0 becomes 1 on its way through the server."""
    return {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in point.items()}


_OPERATIONS = {
    "Viewer": _viewer,
    "UpsertBucket": _upsert_run,
    "RunResumeStatus": _resume_status,
    "CreateRunFiles": _run_files,
    "OrganizationCoreWeaveOrganizationID": lambda *_: {"entity": None},
    "ServerFeaturesQuery": lambda *_: {"serverInfo": {"features": []}},
    "UpsertSweep": _upsert_sweep,
    "SweepWithRuns": _sweep_with_runs,
    "CreateAgent": _create_agent,
    "Heartbeat": _heartbeat,
}


@contextmanager
def serving() -> Iterator[Server]:
    """A server on a free port of loopback, for as long as the block lasts."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
