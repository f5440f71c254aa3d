"""The mirror slot by slot, and a run's end, against a client without network.

`pytest tests/wandb/test_run.py`; the real client: tests/wandb/test_mirror.py.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from job.errors import CredentialsError, OutageError
from job.ledger.lease import acquire
from job.ledger.ledger import Ledger
from job.ledger.records import Result, Spec
from job.ledger.redo import redo
from job.ledger.slot import Slot
from job.process.stop import Stop
from job.settings import Settings
from job.store.local import LocalStore
from job.wandb.confirmed import FAILURES, catch_up, mirror_all
from job.wandb.run import Mirror, open_run, place_of
from tests.ledger.documents import make_result, make_spec
from tests.wandb.fake_wandb import FakeRun, FakeWandb
from tests.wandb.workers import eventually

LINES = [{"step": step, "train/loss": 2.0, "learning_rate": 1e-4} for step in (1, 2, 3)]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server that answers whatever it is asked, with 501."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, url: str) -> Iterator[FakeWandb]:
    fake = FakeWandb(url)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with mock.patch.dict(os.environ):  # `prepare` writes to it
        os.environ.pop("WANDB_MODE", None)
        yield fake


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(LocalStore(tmp_path / "out"), "s")


@pytest.fixture
def settings(tmp_path: Path, wandb: FakeWandb) -> Settings:
    (tmp_path / "work").mkdir()
    given: dict[str, Any] = {"WANDB_API_KEY": "0" * 40, "num_trials": 5}
    return Settings(
        dataset_uri="rows", output_uri=str(tmp_path / "out"), work_dir=tmp_path / "work", **given
    )


def _spec(run_id: str) -> Spec:
    return make_spec(wandb_run_id=run_id)


def _result(slot: Slot, folder: Path) -> Result:
    """A result whose history is in the store."""
    key, path = slot.key("history.jsonl"), folder / "history.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    slot.store.upload(key, path)
    return make_result(slot.folder, eval_loss=1.0, history_key=key).changed(adapter_key=None)


def _commit(ledger: Ledger, folder: Path, *slots: int) -> None:
    for slot in map(ledger.slot, slots):
        slot.specify(_spec(f"run-{slot.number}"))
        slot.commit(_result(slot, folder))


def _mirrored(ledger: Ledger) -> list[int]:
    return [number for number in range(5) if _is_mirrored(ledger.slot(number))]


def _is_mirrored(slot: Slot) -> bool:
    return slot.store.get(slot.key("mirror.json")) is not None


def _failing(*slots: int, error: str = "error 500") -> Callable[[str], None]:
    def fail(run_id: str) -> None:
        if run_id in [f"run-{slot}" for slot in slots]:
            raise RuntimeError(error)

    return fail


def _catch_up(settings: Settings, ledger: Ledger) -> None:
    catch_up(settings, ledger, lambda: None)


@pytest.mark.parametrize("mirror", [_catch_up, mirror_all])
def test_a_slot_that_w_and_b_does_not_take_stops_no_other(
    settings: Settings, ledger: Ledger, wandb: FakeWandb, tmp_path: Path, mirror: Any
) -> None:
    _commit(ledger, tmp_path, 0, 1, 3)
    wandb.on_init = _failing(1)
    assert mirror(settings, ledger) in (None, (2, 3))
    assert _mirrored(ledger) == [0, 3]
    assert wandb.runs["run-3"].steps == [1, 2, 3]
    wandb.on_init = _failing()
    assert mirror(settings, ledger) in (None, (1, 1))
    assert _mirrored(ledger) == [0, 1, 3]
    assert wandb.runs["run-0"].steps == [1, 2, 3], "not sent twice"


def test_a_slot_whose_history_is_gone_stops_no_other(
    settings: Settings, ledger: Ledger, tmp_path: Path
) -> None:
    _commit(ledger, tmp_path, 0, 1)
    ledger.store.delete(f"{ledger.slot(0).folder}/history.jsonl")
    _catch_up(settings, ledger)
    assert _mirrored(ledger) == [1]


def test_failures_in_a_row_and_only_those_mean_that_w_and_b_is_down(
    settings: Settings, ledger: Ledger, wandb: FakeWandb, tmp_path: Path
) -> None:
    _commit(ledger, tmp_path, *range(5))
    wandb.on_init = _failing(0, 1, 3, 4)
    assert mirror_all(settings, ledger) == (1, 5)
    tried: list[str] = []

    def down(run_id: str) -> None:
        tried.append(run_id)
        raise RuntimeError("error 500")

    wandb.on_init = down
    with pytest.raises(OutageError, match="error 500"):
        mirror_all(settings, ledger)
    assert tried == ["run-0", "run-1", "run-3"][:FAILURES]


def test_a_refused_key_is_asked_once_and_costs_the_trial_nothing(
    settings: Settings, ledger: Ledger, wandb: FakeWandb, tmp_path: Path
) -> None:
    _commit(ledger, tmp_path, 0, 1)
    wandb.on_init = _failing(0, error="error 401")
    _catch_up(settings, ledger)
    assert _mirrored(ledger) == []
    with pytest.raises(CredentialsError, match="WANDB_API_KEY"):
        mirror_all(settings, ledger)


@pytest.mark.parametrize("mirror", [_catch_up, mirror_all])
def test_a_redo_meanwhile_is_not_taken_for_mirrored(
    settings: Settings, ledger: Ledger, wandb: FakeWandb, tmp_path: Path, mirror: Any
) -> None:
    """The confirmation belongs to the generation whose result W&B was told."""
    _commit(ledger, tmp_path, 0, 1)
    wandb.on_init = lambda run_id: redo(ledger.slot(1)) if run_id == "run-0" else None
    mirror(settings, ledger)
    assert ledger.slot(1).generation == 1
    assert _mirrored(ledger) == [0]
    assert _is_mirrored(ledger.slot(1).earlier()[0])
    spec = ledger.slot(1).spec()
    assert spec is not None
    ledger.slot(1).commit(_result(ledger.slot(1), tmp_path))
    mirror(settings, ledger)
    assert _mirrored(ledger) == [0, 1]
    assert set(wandb.runs) == {"run-0", "run-1", spec.wandb_run_id}


def test_a_run_of_another_slot_is_never_written_to(
    settings: Settings, ledger: Ledger, wandb: FakeWandb
) -> None:
    """A call that W&B left hanging still has its run open in this process."""
    first, second = (
        place_of(settings, ledger.slot(number), _spec(f"run-{number}")) for number in (0, 1)
    )
    run = open_run(first, upload_seconds=1)
    before = dict(run.config)
    assert before["slot"] == 0
    with pytest.raises(OutageError, match="run run-0 of an earlier call is still open"):
        open_run(second, upload_seconds=1)
    assert run.config == before
    run.finish(0)
    assert open_run(second, upload_seconds=1).config["slot"] == 1


def test_a_slot_left_hanging_does_not_get_the_rows_of_the_next(
    settings: Settings, ledger: Ledger, wandb: FakeWandb, tmp_path: Path
) -> None:
    _commit(ledger, tmp_path, 0, 1)

    def fail(run: FakeRun) -> None:
        raise RuntimeError("the run's end was not taken, it stays open")

    wandb.on_finish = fail
    _catch_up(settings, ledger)
    assert _mirrored(ledger) == []
    assert list(wandb.runs) == ["run-0"]
    assert wandb.runs["run-0"].steps == [1, 2, 3]


def _mirror_of(settings: Settings, ledger: Ledger, stop: Stop, folder: Path) -> Mirror:
    """The mirror of an attempt that has trained to its end."""
    lease = acquire(ledger, [0], lease_seconds=60, should_stop=lambda: None)
    assert lease is not None
    mirror = Mirror(settings, lease, _spec("run-0"), None, stop=stop)
    mirror.follow(folder / "history.jsonl")
    return mirror


def test_a_slow_upload_at_the_end_is_no_hang_to_the_watchdog(
    settings: Settings, ledger: Ledger, wandb: FakeWandb, tmp_path: Path
) -> None:
    result, stop = _result(ledger.slot(0), tmp_path), Stop(15)
    signs = []

    def upload(_: FakeRun) -> None:
        for _ in range(3):
            before = stop.checks
            eventually(lambda: stop.checks > before, 5)  # noqa: B023
            signs.append(stop.checks)

    wandb.on_finish = upload
    mirror = _mirror_of(settings, ledger, stop, tmp_path)
    mirror.read_to_end()
    mirror.commit(result)
    assert len(signs) == 3
    assert _mirrored(ledger) == [0]


def test_a_sigterm_during_the_last_upload_is_heard_at_once(
    settings: Settings, ledger: Ledger, wandb: FakeWandb, tmp_path: Path
) -> None:
    result, stop, returned = _result(ledger.slot(0), tmp_path), Stop(15), threading.Event()
    heard = []

    def stall(_: FakeRun) -> None:
        stop.set()
        heard.append(returned.wait(5))

    wandb.on_finish = stall
    mirror = _mirror_of(settings, ledger, stop, tmp_path)
    mirror.read_to_end()
    mirror.commit(result)
    returned.set()
    eventually(lambda: bool(heard), 5)
    assert heard == [True], "the commit stands; W&B is told later"
