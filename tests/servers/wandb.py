"""A W&B server for tests: the GraphQL and file-stream calls of wandb 0.31, over HTTP, in a thread.

It keeps what it is sent as the real one does (a run's rows by their offset, its summary, its end),
records every request, and spoils those it is told to. What each call answers: wandb_graphql.py.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.servers import wandb_graphql
from tests.servers.wandb_state import Run, State

API_KEY = "0123456789abcdef" * 2 + "01234567"
_STALL_SECONDS = 60


@dataclass
class Fault:
    """What happens to the next `times` requests whose name contains `match`.

    A request's name is its GraphQL operation, or `file_stream`, `upload`.
    """

    kind: str  # status, reset (before anything is done), drop (done, but the answer is lost), stall
    match: str = ""
    times: int = 1_000_000
    status: int = 500


@dataclass
class Request:
    """A request as it came."""

    name: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class WandbServer:
    """The server; what it knows may be read and changed at any time."""

    state: State = field(default_factory=State)
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    injected: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    changed: threading.Condition = field(init=False)
    stopped: threading.Event = field(default_factory=threading.Event)
    on_request: Callable[[str], None] = lambda name: None  # before a request is answered
    _http: ThreadingHTTPServer | None = None
    _port: int = 0

    def __post_init__(self) -> None:
        self.changed = threading.Condition(self.lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def listen(self) -> None:
        """Answer, on the same port as before."""
        handler = type("Handler", (_Handler,), {"server_state": self})
        self._http = _Server(("127.0.0.1", self._port), handler)
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def listen_again(self) -> None:
        """`listen`, if the port is closed."""
        if self._http is None:
            self.listen()

    def refuse(self) -> None:
        """Close the port: connections are refused until `listen`."""
        assert self._http is not None
        self._http.shutdown()
        self._http.server_close()
        self._http = None

    def stop(self) -> None:
        self.stopped.set()
        if self._http is not None:
            self.refuse()

    def wait_until(self, happened: Any, seconds: float = 60) -> None:
        """Return once `happened(state)` is true, looked at after every request."""
        with self.changed:
            if not self.changed.wait_for(lambda: happened(self.state), seconds):
                names = [request.name for request in self.requests[-20:]]
                raise AssertionError(f"did not happen in {seconds} s; the last requests: {names}")

    def run(self, run_id: str) -> Run:
        return self.state.runs[run_id]

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        """A run's rows; none of one that is not there."""
        run = self.state.runs.get(run_id)
        return run.rows if run is not None else []

    def named(self, name: str) -> list[Request]:
        return [request for request in self.requests if request.name == name]

    def take_fault(self, name: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fault.match in name:
                fault.times -= 1
                self.injected.append(f"{fault.kind} {name}")
                return fault
        return None


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server that answers until the block ends."""
    server = WandbServer()
    server.listen()
    try:
        yield server
    finally:
        server.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """A client that goes away is no error of ours."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: WandbServer
    timeout = 120

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def _serve(self) -> None:
        server = self.server_state
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        name = _name(self.path, body)
        with server.lock:
            server.requests.append(Request(name, self.path, dict(self.headers.items()), body))
            server.on_request(name)
            fault = server.take_fault(name)
            server.changed.notify_all()
        if fault is not None and fault.kind == "status":
            self._answer(fault.status, {"errors": [{"message": "as the test wants it"}]})
            return
        if fault is not None and fault.kind == "stall":
            server.stopped.wait(_STALL_SECONDS)
            self.close_connection = True
            return
        if fault is not None and fault.kind == "reset":
            self._reset()
            return
        with server.lock:
            status, content = self._handle(name, body)
            server.changed.notify_all()
        if fault is not None:
            assert fault.kind == "drop", fault.kind
            self._reset()
            return
        self._answer(status, content)

    def _handle(self, name: str, body: bytes) -> tuple[int, Any]:
        state = self.server_state.state
        if not state.authorised(self.headers.get("Authorization", "")):
            return 401, {"errors": [{"message": "invalid API key"}]}
        if name == "file_stream":
            run_id = self.path.split("/")[-2]
            return wandb_graphql.file_stream(state, run_id, json.loads(body or b"{}"))
        if name == "upload":
            state.uploads[self.path] = body
            return 200, {}
        return wandb_graphql.answer(state, name, json.loads(body), self.server_state.url)

    def _answer(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        with suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def _reset(self) -> None:
        self.close_connection = True
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()


def _name(path: str, body: bytes) -> str:
    if path.endswith("/file_stream"):
        return "file_stream"
    if path != "/graphql":
        return "upload"
    query = json.loads(body)["query"]
    found = re.search(r"(?:query|mutation)\s+(\w+)", query)
    assert found is not None, query
    return found[1]
