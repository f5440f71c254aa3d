"""Rules of leases, pruning, lists, versions and budgets. `pytest tests/ledger/test_rules.py`"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import job
from job.ledger.lease import HeldLease, acquire
from job.ledger.ledger import Ledger
from job.ledger.uploads import Uploads, restore
from job.settings import IDENTITY_FIELDS, Settings
from job.store.local import LocalStore
from job.training.state import TrainState, saved_clock_seconds, unreadable, write_state
from job.trial.result import AttemptClock
from job.trial.slots import open_slots, slots
from tests.ledger.documents import make_result, make_spec


class RecordingStore(LocalStore):
    """A store that records its calls; conditional writes wait while the gate is closed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.calls: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()

    def put_if_version(self, key: str, data: bytes, version: str) -> bool:
        if not self.gate.is_set():
            self.waiting.set()
            assert self.gate.wait(30)
        self.calls.append(f"swap {key}")
        return super().put_if_version(key, data, version)

    def upload(self, key: str, path: Path) -> None:
        self.calls.append(f"upload {key}")
        super().upload(key, path)

    def delete(self, key: str) -> None:
        self.calls.append(f"delete {key}")
        super().delete(key)


class ManualClock:
    """A clock that moves only when a test sets it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> RecordingStore:
    return RecordingStore(tmp_path / "bucket")


def _take(ledger: Ledger, clock: Callable[[], float] = time.monotonic) -> HeldLease:
    lease = acquire(
        ledger, [0], lease_seconds=60, should_stop=lambda: None, wait=lambda _: None, clock=clock
    )
    assert lease is not None
    return lease


def _uploads(lease: HeldLease) -> Uploads:
    uploads = Uploads(
        lease, interval_seconds=0, seconds_left=lambda: None, clock_of=saved_clock_seconds
    )
    uploads.start()
    return uploads


def _checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    write_state(path, TrainState(step=step), {})
    return path


def test_without_a_renewal_for_the_lease_time_nothing_is_published_until_one_succeeds(
    store: RecordingStore, tmp_path: Path
) -> None:
    ledger, clock = Ledger(store, "s"), ManualClock()
    lease = _take(ledger, clock)
    uploads = _uploads(lease)
    clock.now += 60  # no renewal came through
    store.gate.clear()
    uploads.put_checkpoint(_checkpoint(tmp_path, 1), 1, None)  # training goes on: it returns
    assert store.waiting.wait(30)
    uploads.raise_errors()
    assert store.calls == [], "nothing is uploaded before the lease is known to be ours"
    store.gate.set()
    assert uploads.flush(timeout=30)
    assert store.calls[0].startswith("swap")
    assert lease.record.epoch == 1
    assert [entry.step for entry in lease.record.checkpoints] == [1]


def test_pruning_follows_a_renewal_and_takes_the_manifest_first(
    store: RecordingStore, tmp_path: Path
) -> None:
    ledger = Ledger(store, "s")
    uploads = _uploads(_take(ledger))
    for step in (1, 2, 3):
        uploads.put_checkpoint(_checkpoint(tmp_path, step), step, None)
    assert uploads.flush(timeout=30)
    (first, *rest) = [n for n, what in enumerate(store.calls) if what.startswith("delete")]
    assert store.calls[first - 1] == "swap sweeps/s/slots/0000/lease.json"
    assert "/checkpoints/1-1-" in store.calls[first]
    assert store.calls[first].endswith("/manifest.json")
    assert all("/checkpoints/1-1-" in store.calls[n] for n in rest)


def test_only_checkpoints_of_ones_own_or_earlier_epochs_are_pruned(
    store: RecordingStore, tmp_path: Path
) -> None:
    ledger = Ledger(store, "s")
    frozen = _take(ledger)
    old = _uploads(frozen)
    for step in (1, 2):
        old.put_checkpoint(_checkpoint(tmp_path / "old", step), step, None)
    while old.is_due() is False:
        time.sleep(0.01)
    frozen.release()
    newer = _take(ledger)
    new = _uploads(newer)
    new.put_checkpoint(_checkpoint(tmp_path / "new", 9), 9, None)
    assert new.flush(timeout=30)
    store.calls.clear()
    old.put_checkpoint(_checkpoint(tmp_path / "old", 5), 5, None)  # woken, and full of plans
    with pytest.raises(Exception, match="a newer attempt holds it"):
        old.flush(timeout=30)
    assert not [what for what in store.calls if what.startswith("delete")]
    assert [entry.step for entry in newer.record.checkpoints] == [9, 2]
    assert newer.record.checkpoints[1].key.rpartition("/")[2].startswith("1-2-")


class BlindStore(LocalStore):
    """A store that lists nothing, as a bucket may right after a write."""

    def list(self, prefix: str) -> Iterator[str]:
        return iter(())


def test_nothing_rests_on_listing(tmp_path: Path) -> None:
    ledger = Ledger(BlindStore(tmp_path / "bucket"), "s")
    with _take(ledger) as lease:
        lease.open_account()
        ledger.slot(0).specify(make_spec())
        uploads = _uploads(lease)
        uploads.put_checkpoint(_checkpoint(tmp_path, 4), 4, None)
        assert uploads.flush(timeout=30)
    again = _take(ledger)
    assert restore(again, tmp_path / "work", unreadable) is not None
    ledger.slot(0).commit(make_result())
    assert open_slots(ledger, 2) == [1]


def test_another_code_version_goes_on_at_an_equal_checkpoint_schema_and_is_recorded(
    store: RecordingStore, tmp_path: Path
) -> None:
    ledger = Ledger(store, "s")
    lease = _take(ledger)
    uploads = _uploads(lease)
    uploads.put_checkpoint(_checkpoint(tmp_path, 1), 1, None)
    assert uploads.flush(timeout=30)
    lease.report(code_version="0.0.1")
    lease.release()
    with _take(ledger) as newer:
        newer.open_account()
        assert restore(newer, tmp_path / "work", unreadable) is not None
    folder = tmp_path / "bucket" / ledger.slot(0).folder / "attempts"
    told = {(d := json.loads(p.read_text()))["epoch"]: d for p in sorted(folder.iterdir())}
    assert [told[epoch]["code_version"] for epoch in (1, 2)] == ["0.0.1", job.__version__]


def _settings(**given: Any) -> Settings:
    return Settings(**{"dataset_uri": "rows", "output_uri": "out"} | given)


def test_the_number_of_trials_may_grow_and_is_no_part_of_the_identity(
    store: RecordingStore,
) -> None:
    ledger = Ledger(store, "s")
    for slot in range(2):
        ledger.slot(slot).commit(make_result(ledger.slot(slot).folder))
    assert slots(_settings(num_trials=2), ledger) == []
    assert slots(_settings(num_trials=4), ledger) == [2, 3]
    assert "num_trials" not in IDENTITY_FIELDS


def test_the_budget_runs_on_the_training_clock_and_overruns_at_twice_that_of_all_attempts(
    store: RecordingStore,
) -> None:
    lease = _take(Ledger(store, "s"))
    settings = _settings(trial_budget_hours=1)
    lease.start_paying(seconds_before=60)
    clock = AttemptClock(settings, lease, prepare_seconds=900, load_seconds=60)
    state = TrainState(clock_seconds=3599)
    assert clock.out_of_time(state) is None, "waiting and loading are not the trial's time"
    lease.renew(seconds_before=7100.0)
    assert clock.out_of_time(state) is None
    lease.renew(seconds_before=7150.0)  # and 60 s of load in this attempt
    assert str(clock.out_of_time(state)).startswith("overrun")
    assert clock.out_of_time(TrainState(clock_seconds=3600)) == "JOB_TRIAL_BUDGET_HOURS is spent"
