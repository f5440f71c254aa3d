"""Start a server as a process of its own, wait until it answers, stop it."""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

START_SECONDS = 30


def free_port() -> int:
    """A port that was free a moment ago.

    It lies below those that a system hands out by itself (Linux from 32,768, others from 49,152): a
    server in another process that asks for any port does not get it before ours binds it.
    """
    while True:
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", 10_000 + secrets.randbelow(20_000)))
            return int(listener.getsockname()[1])


@contextmanager
def running(module: str, *arguments: str, port: int, log_path: Path) -> Iterator[None]:
    """`python -m module arguments` until the block ends; its output goes to `log_path`."""
    with running_command([sys.executable, "-m", module, *arguments], port, log_path, None):
        yield


@contextmanager
def running_command(
    command: list[str], port: int, log_path: Path, environ: dict[str, str] | None
) -> Iterator[None]:
    """A command until the block ends; with this environment, where it is not None."""
    with log_path.open("wb") as log_file:
        process = subprocess.Popen(command, stdout=log_file, stderr=subprocess.STDOUT, env=environ)
    try:
        _wait_for(process, port, log_path)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=5)


def _wait_for(process: subprocess.Popen[bytes], port: int, log_path: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"the server did not start:\n{log_path.read_text()[-2000:]}")
