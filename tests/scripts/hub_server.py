"""Stand-in for the hub on loopback: answers what clients ask to create, upload and load models and data sets.

    with run_hub() as hub:
        environment = hub.environment(folder)

`hub.models[name]` holds the files that arrived, by path. `hub.served[name]`, a folder, can be loaded as a
model, or as a data set if the name begins with `datasets/`. `hub.unknown` lists requests without an answer.
"""

import base64
import hashlib
import json
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..loopback_server import JsonHandler, LoopbackServer, serve

TOKEN = "hf_" + "local0123456789abcdefghij"
USER = "someone"
COMMIT = "5" * 40
"""Commit of all that is served."""


@dataclass
class HubModel:
    """A model as the client has sent it."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


class HubServer(LoopbackServer):
    """HTTP server with models and large files in memory."""

    def __init__(self) -> None:
        super().__init__(HubHandler)
        self.models: dict[str, HubModel] = {}
        self.large_files: dict[str, bytes] = {}
        self.served: dict[str, Path] = {}
        self.unknown: list[str] = []

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Variables for a client of this hub alone; without a token it is not logged in."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return variables | ({} if token is None else {"HF_TOKEN": token})


class HubHandler(JsonHandler):
    """Answers one request; those that write need the token."""

    server: HubServer

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            if self.is_authorized():
                self.answer({"name": USER, "type": "user", "orgs": []})
            return
        path = urlsplit(self.path).path
        for name, folder in self.server.served.items():
            kind = "" if name.startswith("datasets/") else "models/"
            if match := re.fullmatch(rf"/{name}/resolve/[^/]+/(.+)", path):
                return self.send_file(folder / match[1])
            if re.fullmatch(rf"/api/{kind}{name}(/revision/[^/]+)?", path):
                files = [{"rfilename": file["path"]} for file in list_files(folder)]
                return self.answer({"id": name.removeprefix("datasets/"), "sha": COMMIT, "siblings": files})
            if match := re.fullmatch(rf"/api/{kind}{name}/tree/[^/]+/?(.*)", path):
                inside = [file for file in list_files(folder) if file["path"].startswith(match[1])]
                if inside:
                    return self.answer(inside)
        # A card, a configuration or a file that is not here yet.
        self.answer({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.read_body()
        if self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif not self.is_authorized():
            return
        elif self.path == "/api/repos/create":
            self.create_model(json.loads(body))
        elif re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", self.path):
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".bin")) else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            self.answer({"files": modes})
        elif re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", self.path):
            objects = json.loads(body)["objects"]
            self.answer({"transfer": "basic", "objects": [self.describe_upload(item) for item in objects]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.server.unknown.append(self.path)
            self.answer({"error": "unknown"}, 404)

    def do_PUT(self) -> None:
        content = self.read_body()
        digest = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == digest
        self.server.large_files[digest] = content
        self.answer({})

    def is_authorized(self) -> bool:
        """Return whether the request has the token; without it the answer is 401."""
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer({"error": "Invalid username or password."}, 401)
        return False

    def send_file(self, path: Path) -> None:
        """Answer with a file of what is served, its hash as the ETag."""
        if not path.is_file():
            return self.answer({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        content = path.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        self.answer(content, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def create_model(self, request: dict[str, Any]) -> None:
        owner = request.get("organization") or USER
        if owner != USER:
            self.answer({"error": f"You don't have the rights to create a model under {owner}"}, 403)
            return
        name = f"{owner}/{request['name']}"
        # Older clients send `private`, newer ones `visibility`.
        is_private = bool(request.get("private")) or request.get("visibility") == "private"
        is_new = name not in self.server.models
        self.server.models.setdefault(name, HubModel(is_private))
        self.answer({"url": f"{self.server.url}/{name}", "name": name}, 200 if is_new else 409)

    def describe_upload(self, item: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.server.url}/upload/{item['oid']}"
        return {"oid": item["oid"], "size": item["size"], "actions": {"upload": {"href": href, "header": {}}}}

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        model = self.server.models[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                model.messages.append(value["summary"])
            elif line["key"] == "file":
                model.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                model.files[value["path"]] = self.server.large_files[value["oid"]]
        commit = f"{len(model.messages):040x}"
        self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit})


def list_files(folder: Path) -> list[dict[str, Any]]:
    """Return the files below a folder as the hub lists them."""
    return [
        {
            "type": "file",
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


def run_hub() -> AbstractContextManager[HubServer]:
    """Serve an empty hub for the time of the block."""
    return serve(HubServer())
