"""Start a server as a process of its own, wait until it answers, stop it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 30


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
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
