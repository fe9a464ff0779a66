"""A small model behind an HTTP server that answers as vLLM's does, and can be told to misbehave."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


class Served:
    """The server of one model: what it was asked, and what is to go wrong.

    down: so many of the next requests fail with `status`. answer: replaces the scores.
    """

    def __init__(self, model: Any, key: str | None = None, max_logprobs: int = 20) -> None:
        self.model, self.key, self.max_logprobs = model, key, max_logprobs
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.down, self.status, self.down_after = 0, 503, None
        self.answer: Any = None
        self.address = ""

    def reply(self, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        self.headers.append(headers)
        self.asked.append(body)
        if self.down_after is not None and len(self.asked) > self.down_after:
            return 503, {"error": "shutting down"}
        if self.down:
            self.down -= 1
            return self.status, {"error": "busy"}
        if self.key is not None and headers.get("Authorization") != f"Bearer {self.key}":
            return 401, {"error": "Unauthorized"}
        if body["prompt_logprobs"] > self.max_logprobs:
            return 400, {"message": f"prompt_logprobs is greater than max allowed: {self.max_logprobs}"}
        if self.answer is not None:
            return 200, self.answer
        return 200, {"choices": [self.choice(n, ids, body) for n, ids in enumerate(body["prompt"])]}

    def choice(self, index: int, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            logs = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        listed: list[Any] = [None]
        for token, row in zip(ids[1:], logs, strict=False):
            top = row.topk(body["prompt_logprobs"])
            named = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            named.setdefault(token, row[token].item())
            listed.append({str(n): {"logprob": log, "rank": 1} for n, log in reversed(named.items())})
        return {"index": index, "text": "x", "prompt_logprobs": listed}


@contextmanager
def serving(served: Served, port: int = 0) -> Iterator[Served]:
    """The server at work; its address is `served.address`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/completions" or body["model"] != "large":
                status, answer = 404, {"message": f"no {body['model']} at {self.path}"}
            else:
                status, answer = served.reply(dict(self.headers), body)
            content = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Silent."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A client that did not wait is no news."""

    server = Server(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    served.address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
