"""A minimum pace for HTTP connections, so that a server cannot hold us by a byte now and then.

A read timeout limits the silence between two bytes, not the time of a whole answer. Here every
connection counts the bytes that went through it, both ways, and the seconds it made us wait for
them; too few for too long ends the request in the thread that waits, as a stall would. So no
watchdog is needed, and no thread stays behind. The connections are urllib3's, which
`job/store/transport.py` gives to boto3, Google's SDK and Azure's.
"""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from job.errors import causes

_PIECE_BYTES = 2**16  # of what is sent, between two looks at the clock


class SlowTransferError(Exception):
    """A connection that fell below its minimum pace.

    No `OSError` on purpose: urllib3 and the SDKs would take it for a broken connection.
    """


@dataclass(frozen=True)
class MinimumPace:
    """The bytes that have to move in any `seconds` that one request waits for its connection."""

    num_bytes: int
    seconds: float


# 2 kB/s of each connection, and two minutes for a small request: far below any link that could
# carry a trial, and far above a byte now and then.
MINIMUM_PACE = MinimumPace(num_bytes=2**18, seconds=120)


def keep_pace(pool_class: Any, pace: MinimumPace) -> Any:
    """A subclass of one of urllib3's pool classes, whose connections keep the pace."""
    connection_class = _paced(pool_class.ConnectionCls, pace)
    return type(pool_class.__name__, (pool_class,), {"ConnectionCls": connection_class})


def slowness(error: BaseException | None) -> str:
    """The words of the `SlowTransferError` that an SDK's error was raised from; "" if of none."""
    slow = (cause for cause in causes(error) if isinstance(cause, SlowTransferError))
    return str(next(slow, ""))


def _paced(connection_class: Any, pace: MinimumPace) -> type:
    """A subclass of one of urllib3's connection classes that measures itself.

    It begins when it is connected, by TLS too, and anew with each request.
    """

    class Paced(connection_class):  # type: ignore[misc]
        sock: Any

        def connect(self) -> None:
            super().connect()
            self.sock = PacedSocket(self.sock, pace)

        def putrequest(self, *arguments: Any, **options: Any) -> None:
            if self.sock is not None:
                self.sock.begin()  # a request in a connection that was used before
            super().putrequest(*arguments, **options)

    return Paced


class PacedSocket:
    """A connected socket whose sends and reads are counted; all else is the socket's own."""

    def __init__(
        self, sock: socket.socket, pace: MinimumPace, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sock = sock
        self._pace = pace
        self.clock = clock
        self.begin()

    def begin(self) -> None:
        """Count from here."""
        self._num_bytes = 0
        self._seconds = 0.0

    def moved(self, num_bytes: int, since: float) -> None:
        """Note bytes that were waited for since then; raises `SlowTransferError`."""
        self._num_bytes += num_bytes
        self._seconds += self.clock() - since
        if self._seconds < self._pace.seconds:
            return
        if self._num_bytes < self._pace.num_bytes:
            raise SlowTransferError(
                f"{self._num_bytes} bytes moved in {self._seconds:.0f} s, needed:"
                f" {self._pace.num_bytes}"
            )
        self.begin()

    def sendall(self, data: Any) -> None:
        """Send all bytes, in pieces that are counted one by one."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            since = self.clock()
            self._sock.sendall(piece)
            self.moved(len(piece), since)

    def makefile(self, mode: str, buffering: int = io.DEFAULT_BUFFER_SIZE) -> Any:
        """The file that `http.client` reads the answer from."""
        assert mode == "rb"
        raw = _PacedFile(self._sock.makefile("rb", buffering=0), self)
        return io.BufferedReader(raw, buffering) if buffering else raw

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


class _PacedFile(io.RawIOBase):
    """A socket's unbuffered file whose reads are counted."""

    def __init__(self, raw: Any, meter: PacedSocket) -> None:
        self._raw = raw
        self._meter = meter

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        since = self._meter.clock()
        num_bytes: int | None = self._raw.readinto(buffer)
        self._meter.moved(num_bytes or 0, since)
        return num_bytes

    def close(self) -> None:
        self._raw.close()
        super().close()
