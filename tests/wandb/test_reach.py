"""Whether W&B's server gives a sign of life. `pytest tests/wandb/test_reach.py`"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from job.ledger.ledger import Ledger
from job.store.local import LocalStore
from job.wandb.client import silence_of
from tests.ledger.documents import make_identity, make_result, make_spec


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clear the proxies that this machine may have."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


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
    assert silence_of("http://no-such-host.invalid")  # in the words of this machine's resolver


def test_what_is_behind_a_socks_proxy_is_the_clients_business(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:9")
    assert silence_of("https://api.wandb.ai") is None


def test_another_certificate_is_the_clients_business() -> None:
    with _server(b"HTTP/1.1 400 No TLS here\r\n\r\n") as url:
        assert silence_of(url.replace("http:", "https:")) is None


@pytest.mark.slow
def test_a_report_to_a_silent_w_and_b_ends_at_once_also_for_slots_beyond_num_trials(
    tmp_path: Path,
) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    ledger.open_sweep(make_identity())
    for slot in (0, 1):
        ledger.slot(slot).specify(make_spec())
    ledger.slot(1).commit(make_result(ledger.slot(1).folder))
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    environ = {
        "PATH": os.environ["PATH"], "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": url,
        "JOB_OUTPUT_URI": str(tmp_path), "JOB_SWEEP_NAME": "s", "JOB_NUM_TRIALS": "1",
        "JOB_WORK_DIR": str(tmp_path / "work"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "job", "report", "--mirror"],
        env=environ, capture_output=True, text=True, timeout=60, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 74, done.stderr
    assert f"W&B: {url} does not answer (Connection refused)" in done.stderr
