"""Whether W&B's server gives a sign of life. `pytest tests/test_mirror_reach.py`"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from job.mirror.reach import silence_of


@contextmanager
def _server(answer: bytes) -> Iterator[str]:
    """Takes one connection, answers whatever it is asked, and closes it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    "status", ["200 OK", "302 Found\r\nLocation: http://127.0.0.1:9/", "404 No", "500 No", "501 No"]
)
def test_any_answer_is_a_sign_of_life(status: str) -> None:
    with _server(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode()) as url:
        assert silence_of(url) is None


def test_a_connection_that_is_closed_is_none() -> None:
    with _server(b"") as url:
        assert silence_of(url) == "Remote end closed connection without response"


def test_a_closed_port_and_a_name_that_is_none_say_why() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert silence_of(f"http://127.0.0.1:{port}") == "Connection refused"
    assert "not known" in (silence_of("http://no-such-host.invalid") or "")


def test_another_certificate_is_the_clients_business() -> None:
    with _server(b"HTTP/1.1 400 No TLS here\r\n\r\n") as url:
        assert silence_of(url.replace("http:", "https:")) is None
