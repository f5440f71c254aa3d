"""A fault-injecting HTTP proxy: it passes requests on, and spoils those it is told to.

One thread a connection, one request a connection, so that a fault hits exactly one request.
`Expect: 100-continue` is answered here. Nothing is changed that a signature covers.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_CONNECTION_SECONDS = 60
DRIP_SECONDS = 0.02  # between two bytes, or between two pieces of a request
_DRIP_PIECE_BYTES = 2**13
_RECEIVE_BUFFER_BYTES = 2**16
# Google's SDK looks at the bucket in a thread of its own, once a client, and needs no answer.
_ASIDE = re.compile(r"GET /storage/v1/b/[^/?]+\?")


@dataclass
class Fault:
    """What happens to the next `times` requests whose first line contains `match`."""

    kind: str  # see FaultProxy._spoil
    times: int = 1_000_000
    match: str = ""
    status: int = 500
    code: str = "InternalError"
    body: str | None = None  # the whole answer's, XML or JSON; None: XML of `code`


@dataclass
class Answer:
    """A whole HTTP answer: its head with the blank line, and its body."""

    head: bytes
    body: bytes


@dataclass
class FaultProxy:
    """Listens on the loopback address; `faults` may be changed at any time."""

    upstream: tuple[str, int]
    faults: list[Fault] = field(default_factory=list)
    injected: list[str] = field(default_factory=list)
    num_requests: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _listener: socket.socket | None = None
    _port: int = 0
    _stopped: threading.Event = field(default_factory=threading.Event)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def listen(self) -> None:
        """Accept connections, on the same port as before."""
        self._listener = socket.create_server(("127.0.0.1", self._port), backlog=64)
        # Small, so that a request that is read slowly is felt by the one who sends it.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def refuse(self) -> None:
        """Close the port: connections are refused until `listen`."""
        if self._listener:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
            self._listener.close()

    def stop(self) -> None:
        self._stopped.set()
        self.refuse()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            client.settimeout(_CONNECTION_SECONDS)
            threading.Thread(target=self._handle, args=(client,), daemon=True).start()

    def _handle(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            head, rest = _read_request_head(client)
            if head is None:
                return
            fault = self._next_fault(head.split(b"\r\n", 1)[0].decode())
            if fault is not None and fault.kind == "drip request":
                self._read_slowly(client)
                return
            request = Answer(head, _read_body(client, head, rest))
            if fault is None:
                client.sendall(_closing(_forward(self.upstream, request)))
            else:
                self._spoil(fault, client, request)

    def _next_fault(self, first_line: str) -> Fault | None:
        if _ASIDE.match(first_line):
            return None
        with self._lock:
            self.num_requests += 1
            for fault in self.faults:
                if fault.times > 0 and fault.match in first_line:
                    fault.times -= 1
                    self.injected.append(fault.kind)
                    return fault
        return None

    def _spoil(self, fault: Fault, client: socket.socket, request: Answer) -> None:
        if fault.kind == "status":
            client.sendall(_refusal(fault))
        elif fault.kind == "reset":  # before the server sees the request
            _reset(client)
        elif fault.kind == "stall":
            self._stopped.wait(_CONNECTION_SECONDS)
        elif fault.kind == "corrupt request":
            spoilt = Answer(request.head, _flip(request.body))
            client.sendall(_closing(_forward(self.upstream, spoilt)))
        elif fault.kind == "slow":
            time.sleep(0.2)
            client.sendall(_closing(_forward(self.upstream, request)))
        else:
            self._spoil_answer(fault.kind, client, _forward(self.upstream, request))

    def _spoil_answer(self, kind: str, client: socket.socket, answer: Answer) -> None:
        half = answer.body[: len(answer.body) // 2]
        if kind == "drop answer":  # applied, but the client cannot know
            _reset(client)
        elif kind == "truncate":
            client.sendall(answer.head + half)
        elif kind == "reset in body":
            client.sendall(answer.head + half)
            _reset(client)
        elif kind == "stall in body":
            client.sendall(answer.head + half)
            self._stopped.wait(_CONNECTION_SECONDS)
        elif kind == "drip answer":
            self._drip(client, answer.head + answer.body)
        elif kind == "drip body":
            client.sendall(answer.head)
            self._drip(client, answer.body)
        elif kind == "corrupt answer":
            client.sendall(_closing(Answer(answer.head, _flip(answer.body))))
        else:
            raise AssertionError(kind)

    def _drip(self, client: socket.socket, data: bytes) -> None:
        """Send a byte now and then, so that no read timeout sees silence."""
        for index in range(len(data)):
            client.sendall(data[index : index + 1])
            if self._stopped.wait(DRIP_SECONDS):
                return

    def _read_slowly(self, client: socket.socket) -> None:
        """Take a request's body so slowly that the client waits, and yet goes on sending."""
        while client.recv(_DRIP_PIECE_BYTES) and not self._stopped.wait(DRIP_SECONDS):
            pass


@contextmanager
def proxy_to(endpoint: str) -> Iterator[FaultProxy]:
    """A proxy in front of the server at `endpoint`, until the block ends."""
    url = urlsplit(endpoint)
    assert url.hostname
    assert url.port
    proxy = FaultProxy((url.hostname, url.port))
    proxy.listen()
    try:
        yield proxy
    finally:
        proxy.stop()


def _read_request_head(client: socket.socket) -> tuple[bytes | None, bytes]:
    """Read the head; return it and the part of the body that came with it."""
    head, rest = _read_head(client)
    if head is not None and b"\r\nexpect: 100-continue" in head.lower():
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:")]
        head = b"\r\n".join(lines)
    return head, rest


def _forward(upstream: tuple[str, int], request: Answer) -> Answer:
    with socket.create_connection(upstream, timeout=_CONNECTION_SECONDS) as server:
        server.sendall(_closing(request))
        head, rest = _read_head(server)
        if head is None:
            raise ConnectionError("the server closed the connection")
        bodiless = request.head.startswith(b"HEAD") or b" 204 " in head.split(b"\r\n", 1)[0]
        return Answer(head, b"" if bodiless else _read_body(server, head, rest))


def _read_head(peer: socket.socket) -> tuple[bytes | None, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        more = peer.recv(65536)
        if not more:
            return None, b""
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", rest


def _read_body(peer: socket.socket, head: bytes, rest: bytes) -> bytes:
    """Read a body by its Content-Length, else in chunks, which are kept as they are."""
    length = _header(head, b"content-length")
    chunked = b"chunked" in (_header(head, b"transfer-encoding") or b"")
    body = bytearray(rest)
    while (len(body) < int(length)) if length else (chunked and not body.endswith(b"0\r\n\r\n")):
        more = peer.recv(1 << 20)
        if not more:
            break
        body += more
    return bytes(body)


def _header(head: bytes, name: bytes) -> bytes | None:
    for line in head.split(b"\r\n")[1:]:
        if line.lower().startswith(name + b":"):
            return line.split(b":", 1)[1].strip()
    return None


def _closing(message: Answer) -> bytes:
    lines = message.head.split(b"\r\n")[:-2]
    lines = [line for line in lines if not line.lower().startswith(b"connection:")]
    return b"\r\n".join([*lines, b"Connection: close", b"", b""]) + message.body


def _refusal(fault: Fault) -> bytes:
    xml = f"<Error><Code>{fault.code}</Code><Message>as the test wants it</Message></Error>"
    body = xml if fault.body is None else fault.body
    kind = "json" if body.startswith("{") else "xml"
    head = f"HTTP/1.1 {fault.status} Spoilt\r\nContent-Type: application/{kind}\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


def _flip(body: bytes) -> bytes:
    """Flip one bit in the middle."""
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :] if body else body


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
