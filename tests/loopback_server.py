"""Base of the test servers that stand in for services of the network: HTTP on a free loopback port."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar


class LoopbackServer(ThreadingHTTPServer):
    """HTTP server on a free port of 127.0.0.1."""

    daemon_threads = True

    def __init__(self, handler: type["JsonHandler"]) -> None:
        super().__init__(("127.0.0.1", 0), handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class JsonHandler(BaseHTTPRequestHandler):
    """Request handler that answers in JSON and prints nothing."""

    def read_body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send bytes as they are and anything else as JSON; to a HEAD request, the headers alone."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


ServerT = TypeVar("ServerT", bound=LoopbackServer)


@contextmanager
def serve(server: ServerT) -> Iterator[ServerT]:
    """Answer requests in a thread until the block ends."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
