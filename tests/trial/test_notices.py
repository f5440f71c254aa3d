"""People are told of a sweep's end, its budget and its lost slots, once each.

`pytest tests/trial/test_notices.py`

The service is apprise's own `json://`, which posts to a small HTTP server on this machine.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from job.errors import SlotError
from job.ledger.lease import HeldLease, acquire
from job.ledger.ledger import Ledger
from job.ledger.records import Lease
from job.log import mask_secrets
from job.plan.warnings import of_notices
from job.settings import Settings
from job.store.documents import create_document
from job.store.local import LocalStore
from job.trial import notices
from job.trial.notices import send, tell_if_done, tell_of_budget, tell_of_slot, urls_of
from job.trial.slots import FRUITLESS_ATTEMPTS, STARTLESS_ATTEMPTS, check_progress
from tests.ledger.documents import make_result, make_spec
from tests.workers import make_inputs

ROOT = Path(__file__).parents[2]


class Service(ThreadingHTTPServer):
    """A service that keeps what is posted to it, and answers as it is told."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.heard: list[dict[str, Any]] = []
        self.status, self.delay_seconds = 200, 0.0

    @property
    def url(self) -> str:
        return f"json://user:pa55w0rd@127.0.0.1:{self.server_port}/hook-t0ken"


class _Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.server.delay_seconds)
        self.server.heard.append(json.loads(body))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    server = Service()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join(10)
    server.server_close()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(LocalStore(tmp_path / "out"), "s")


def _settings(service: Service, **given: Any) -> Settings:
    values = {"num_trials": 2, "notify_urls": service.url, **given}
    return Settings(dataset_uri="rows", output_uri="out", **values)


def _take(ledger: Ledger, number: int) -> HeldLease:
    lease = acquire(ledger, [number], lease_seconds=60, should_stop=lambda: None)
    assert lease is not None
    return lease


def _commit(ledger: Ledger, number: int, loss: float) -> None:
    slot = ledger.slot(number)
    slot.specify(make_spec())
    slot.commit(make_result(slot.folder, eval_loss=loss, gpu_seconds=7200.0))


def test_a_done_sweep_is_told_once_with_its_best_and_its_price(
    ledger: Ledger, service: Service
) -> None:
    settings = _settings(service, gpu_hourly_usd=0.25)
    _commit(ledger, 0, 1.5)
    tell_if_done(settings, ledger)
    assert service.heard == [], "a slot is open"
    _commit(ledger, 1, 1.25)
    for _ in range(3):
        tell_if_done(settings, ledger)
    (told,) = service.heard
    assert told["title"] == "Sweep s: done"
    assert told["message"] == (
        "2 slots: 2 committed; best: slot 1, eval/loss 1.2500; 4.0 GPU-hours, $1.00"
    )


def test_of_workers_that_end_at_once_one_tells(ledger: Ledger, service: Service) -> None:
    _commit(ledger, 0, 1.5)
    _commit(ledger, 1, 1.4)
    calls = [
        threading.Thread(target=tell_if_done, args=(_settings(service), ledger)) for _ in range(6)
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join(30)
    assert len(service.heard) == 1


def test_a_sweep_that_was_made_longer_is_done_again(ledger: Ledger, service: Service) -> None:
    _commit(ledger, 0, 1.5)
    tell_if_done(_settings(service, num_trials=1), ledger)
    _commit(ledger, 1, 1.4)
    tell_if_done(_settings(service, num_trials=2), ledger)
    assert [told["message"][:7] for told in service.heard] == ["1 slots", "2 slots"]


def test_a_budget_is_told_once_and_a_raised_one_again(ledger: Ledger, service: Service) -> None:
    for limit in (5, 5, 7.5):
        tell_of_budget(
            _settings(service, sweep_budget_usd=limit, gpu_hourly_usd=1), ledger, "spent"
        )
    assert [told["title"] for told in service.heard] == ["Sweep s: its budget is reached"] * 2
    assert service.heard[0]["message"] == "spent; no adapter yet; 0.0 GPU-hours"


def test_dollars_are_told_where_as_many_gpu_hours_were(ledger: Ledger, service: Service) -> None:
    for limits in (
        {"sweep_budget_gpu_hours": 8}, {"sweep_budget_usd": 8},
        {"sweep_budget_gpu_hours": 8, "sweep_budget_usd": 8},
    ) * 2:  # fmt: skip
        tell_of_budget(_settings(service, gpu_hourly_usd=1, **limits), ledger, "spent")
    assert len(service.heard) == 3
    kept = Path(ledger.store.uri, ledger.folder, "notices").iterdir()
    assert sorted(path.stem for path in kept) == ["budget-8", "budget-8-8", "budget-8-usd"]


@pytest.mark.parametrize(
    ("words", "count"),
    [("$9.00 are spent, JOB_SWEEP_BUDGET_USD is 8", 0),
     ("9.0 GPU-hours are spent, JOB_SWEEP_BUDGET_GPU_HOURS is 8", 1)],
)  # fmt: skip
def test_a_budget_in_dollars_that_an_earlier_version_told_is_not_told_again(
    ledger: Ledger, service: Service, words: str, count: int
) -> None:
    old = {"title": "its budget is reached", "words": words}
    create_document(ledger.store, f"{ledger.folder}/notices/budget-8.json", old)
    tell_of_budget(_settings(service, sweep_budget_usd=8, gpu_hourly_usd=1), ledger, "spent")
    assert len(service.heard) == count


def test_a_cheap_sweep_is_told_with_digits_that_say_something(
    ledger: Ledger, service: Service
) -> None:
    _commit(ledger, 0, 1.5)
    settings = _settings(service, num_trials=1, gpu_hourly_usd=0.0005)
    tell_if_done(settings, ledger)
    assert service.heard[0]["message"].endswith("; 2.0 GPU-hours, $0.001")


def _with(lease: HeldLease, **counts: int) -> HeldLease:
    lease.renew(**counts)
    assert isinstance(lease.record, Lease)
    return lease


@pytest.mark.parametrize(
    ("counts", "titles"),
    [
        ({"fruitless": FRUITLESS_ATTEMPTS - 2, "startless": 4}, []),
        ({"fruitless": FRUITLESS_ATTEMPTS - 1}, ["slot 1 makes no progress"]),
        ({"startless": STARTLESS_ATTEMPTS // 2}, ["slot 1 makes no progress"]),
    ],
)
def test_a_slot_without_progress_is_told_before_it_is_given_up(
    ledger: Ledger, service: Service, counts: dict[str, int], titles: list[str]
) -> None:
    lease = _with(_take(ledger, 1), **counts)
    for _ in range(2):
        tell_of_slot(_settings(service), lease)
    assert [told["title"] for told in service.heard] == [f"Sweep s: {title}" for title in titles]
    check_progress(lease)  # not yet given up


def test_a_slot_that_is_given_up_is_told_with_the_reason(ledger: Ledger, service: Service) -> None:
    lease = _with(_take(ledger, 1), fruitless=FRUITLESS_ATTEMPTS)
    with pytest.raises(SlotError) as caught:
        check_progress(lease)
    for _ in range(2):
        tell_of_slot(_settings(service), lease, given_up=str(caught.value))
    (told,) = service.heard
    assert told["title"] == "Sweep s: slot 1 is given up"
    assert "trained for two checkpoint intervals and saved nothing" in told["message"]


def test_a_service_that_fails_is_a_line_without_its_url(
    ledger: Ledger, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.status = 500
    urls = f"{service.url} nonsense://t0ken-of-mine json://127.0.0.1:1/refused-t0ken"
    caplog.set_level(logging.INFO)
    tell_of_budget(_settings(service, notify_urls=urls), ledger, "spent")
    assert "JOB_NOTIFY_URLS: URL 1, 2, 3 of 3 sent nothing" in caplog.text
    assert "t0ken" not in caplog.text
    assert "pa55w0rd" not in caplog.text


def test_a_slow_service_keeps_no_trial_waiting(service: Service) -> None:
    service.delay_seconds = 2.0
    started = time.monotonic()
    send([service.url], "title", "words", seconds=0.3)
    assert time.monotonic() - started < 1.5


def test_a_store_that_fails_is_no_trials_failure(
    ledger: Ledger, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    (Path(ledger.store.uri) / ledger.folder).mkdir(parents=True)
    (Path(ledger.store.uri) / ledger.folder / "notices").write_text("a file in the way")
    tell_of_budget(_settings(service), ledger, "spent")
    assert service.heard == []
    assert "no notice is sent: " in caplog.text


def test_nothing_is_asked_of_apprise_without_urls(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "send", lambda *_: pytest.fail("sent"))
    tell_of_budget(Settings(dataset_uri="r", output_uri="o"), ledger, "spent")
    assert list(ledger.store.list(ledger.folder)) == []


@pytest.mark.parametrize(
    ("text", "urls"),
    [
        ("json://a/b", ["json://a/b"]),
        (" json://a/b\n mailto://u:p@c.d?to=x@y.z,v@w.z ", None),
        ("json://a/b,slack://A/B/C/#d", ["json://a/b", "slack://A/B/C/#d"]),
    ],
)
def test_urls_are_parted_by_white_space_or_a_comma(
    service: Service, text: str, urls: list[str] | None
) -> None:
    given = urls or ["json://a/b", "mailto://u:p@c.d?to=x@y.z,v@w.z"]
    assert urls_of(_settings(service, notify_urls=text)) == given


def test_plan_names_the_urls_that_apprise_does_not_understand(service: Service) -> None:
    settings = _settings(service, notify_urls=f"{service.url} nonsense://x")
    (line,) = of_notices(settings)
    assert line.startswith("JOB_NOTIFY_URLS: URL 2 is not understood by apprise")
    assert list(of_notices(_settings(service))) == []


@pytest.mark.parametrize(
    "said",
    [
        "slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/",
        "https://hooks.example.com/services/T1JJ3T3L2/x",
        "bot TIiajkdnlazkcOXrIdevi7FQ says no",
        "mail of hunter2secret",
    ],
)
def test_every_part_of_a_url_is_masked_in_a_log(said: str) -> None:
    urls = (
        "slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/ mailto://me:hunter2secret@mail.com"
    )
    masked = mask_secrets(said, {"JOB_NOTIFY_URLS": urls})
    for secret in ("T1JJ3T3L2", "A1BRTD4JD", "TIiajkdnlazkcOXrIdevi7FQ", "hunter2secret"):
        assert secret not in masked
    assert "***" in masked


@pytest.mark.slow
def test_real_trials_tell_of_the_end_and_of_a_budget(tmp_path: Path, service: Service) -> None:
    given = make_inputs(tmp_path) | {"notify_urls": service.url, "num_trials": 2, "device": "cpu"}
    budget = {"num_trials": 4, "sweep_budget_gpu_hours": 1e-9}
    for settings in (given, given, given | budget):
        own = {f"JOB_{name.upper()}": str(value) for name, value in settings.items()}
        done = subprocess.run(
            [sys.executable, "-m", "tests.fake_trial", "trial"],
            env=dict(os.environ) | own, cwd=ROOT, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "hook-t0ken" not in done.stderr
    assert [told["title"] for told in service.heard] == [
        "Sweep s: done",
        "Sweep s: its budget is reached",
    ]
