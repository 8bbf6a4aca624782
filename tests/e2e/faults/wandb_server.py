"""A W&B server on loopback that knows just enough for a run, and can fail in several ways."""

import json
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD, REFUSE, HANG, ERROR = "good", "refuse", "hang", "error"
UNAUTHORIZED, GARBAGE, EMPTY, SLOW = "unauthorized", "garbage", "empty", "slow"
SLOW_SECONDS = 7.0
"""How long a slow server takes for a file; it answers queries at once."""


class Server(ThreadingHTTPServer):
    """Answers as `mode` says, and as `later` says once a run has begun."""

    daemon_threads = True

    def __init__(self, mode: str, later: str | None = None) -> None:
        self.mode, self.later = mode, later
        self.requests: list[str] = []
        self.stopped = threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is expected."""


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(self.path)
        mode = self.server.mode
        if mode == HANG:
            self.server.stopped.wait()
        elif mode == GARBAGE:
            self.wfile.write(secrets.token_bytes(400))
        elif mode == ERROR:
            self._send(500, {})
        elif mode == UNAUTHORIZED:
            self._send(401, {"errors": [{"message": "user is not logged in"}], "data": None})
        elif mode == EMPTY:
            self._send(200, {"data": {}})
        else:
            is_query = self.path == "/graphql"
            if mode == SLOW and not is_query:
                self.server.stopped.wait(SLOW_SECONDS)
            self._send(200, self._answer(json.loads(body)) if is_query else {})
        self.close_connection = mode not in (GOOD, SLOW)

    do_GET = do_PUT = do_POST

    def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What W&B's process needs of the answer to a query."""
        query, variables = asked["query"], asked.get("variables") or {}
        data: dict[str, Any] = {}
        if "UpsertBucket" in query:
            project = {"id": "p", "name": "saexp", "entity": {"id": "e", "name": "team"}}
            bucket = {"id": "b", "name": variables["name"], "displayName": "run", "config": "{}"}
            bucket |= {"project": project, "historyLineCount": 0}
            data = {"upsertBucket": {"bucket": bucket, "inserted": True}}
            self.server.mode = self.server.later or self.server.mode
        elif "CreateRunFiles" in query:
            files = [{"name": n, "uploadUrl": f"{self.server.url}/{n}"} for n in variables["files"]]
            data = {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        elif "CreateArtifact " in query:
            sequence = {"id": "s", "latestArtifact": None}
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}
            data = {"createArtifact": {"artifact": artifact}}
        elif "viewer" in query:
            teams = {"edges": []}
            data = {"viewer": {"id": "v", "entity": "team", "username": "u", "teams": teams}}
        return {"data": data}

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


@contextmanager
def wandb_server(mode: str, later: str | None = None) -> Iterator[Server]:
    """A server on a free port; with `mode` "refuse" nothing listens there."""
    server = Server(mode, later)
    if mode == REFUSE:
        server.server_close()
        yield server
        return
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
