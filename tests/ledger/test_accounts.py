"""Accounts of attempts: nothing that counts is lost. `pytest tests/ledger/test_accounts.py`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job.errors import ExitCode, PreemptedError, StoreError
from job.ledger.accounts import (
    FRESH,
    account,
    cost_of_slot,
    read_accounts,
    taken_over,
    wasted_gpu_seconds,
)
from job.ledger.lease import HeldLease, acquire
from job.ledger.ledger import Ledger
from job.ledger.records import Checkpoint, Lease
from job.report.attempts_table import attempts_table
from job.report.overview import read_overview
from job.settings import Settings
from job.store.local import LocalStore
from job.training.state import TrainState
from job.trial.result import AttemptClock
from tests.ledger.documents import make_result, make_spec

SAVED = Checkpoint(key="k", sha256="0", step=8, best=None, clock_seconds=50.0)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(LocalStore(tmp_path), "s")


def _take(ledger: Ledger) -> HeldLease:
    """Take the lease; a silent holder's is broken, by a clock that only waiting moves."""
    clock = Clock()
    lease = acquire(
        ledger, [0], lease_seconds=60, should_stop=lambda: None, wait=clock.wait, clock=clock
    )
    assert lease is not None
    return lease


def _hours_spent(ledger: Ledger, num_trials: int) -> float:
    return sum(cost_of_slot(ledger, number).gpu_seconds for number in range(num_trials)) / 3600


def _documents(ledger: Ledger) -> dict[int, dict[str, Any]]:
    folder = Path(ledger.store.uri) / ledger.slot(0).folder / "attempts"
    newest: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):  # <name>.json, then <name>.json.v2
        newest[path.name.partition(".")[0]] = path
    contents = (json.loads(path.read_text()) for path in newest.values())
    return {content["epoch"]: content for content in contents}


def _end_by(ledger: Ledger, error: Exception) -> None:
    """Run an attempt that ends by an exception."""

    def attempt() -> None:
        with _take(ledger) as lease:
            lease.open_account()
            raise error

    with pytest.raises(type(error)):
        attempt()


def test_the_document_is_opened_with_the_lease_and_closed_at_the_end(ledger: Ledger) -> None:
    with _take(ledger) as lease:
        lease.open_account()
        opened = _documents(ledger)[1]
        assert (opened["state"], opened["owner"]) == ("open", lease.record.owner)
        assert opened["node"]
        assert opened["started_at"]
        lease.report(first_step=0, step=7, gpu_seconds=12.5)
    closed = _documents(ledger)[1]
    assert closed["state"] == "ended"
    assert (closed["exit_code"], closed["last_step"], closed["gpu_seconds"]) == (0, 7, 12.5)
    assert closed["wasted_gpu_seconds"] == 12.5, "nothing of it was saved"


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (PreemptedError("told to end\nmore"), ExitCode.PREEMPTED, "told to end"),
        (ZeroDivisionError("x"), ExitCode.BUG, "ZeroDivisionError"),
    ],
)
def test_the_document_says_why_the_attempt_ended(
    ledger: Ledger, error: Exception, code: int, reason: str
) -> None:
    _end_by(ledger, error)
    closed = _documents(ledger)[1]
    assert (closed["exit_code"], closed["reason"]) == (code, reason)


def _killed(ledger: Ledger, **progress: Any) -> HeldLease:
    """Run an attempt that dies right after a renewal."""
    lease = _take(ledger)
    lease.open_account()
    lease.report(**progress)
    lease.renew()
    return lease


def test_a_killed_attempts_document_is_completed_by_its_successor(ledger: Ledger) -> None:
    _killed(ledger, first_step=0, step=9, gpu_seconds=70.0)
    successor = _take(ledger)
    successor.open_account()
    killed = _documents(ledger)[1]
    assert (killed["state"], killed["exit_code"]) == ("ended", None)
    assert killed["reason"].startswith("killed or cut off")
    assert (killed["last_step"], killed["gpu_seconds"]) == (9, 70.0)
    assert killed["heard_at"]
    assert successor.record.gpu_seconds_before == 70.0


def test_successors_that_die_before_they_write_leave_it_to_theirs(ledger: Ledger) -> None:
    _killed(ledger, gpu_seconds=10.0)
    for _ in range(3):
        _take(ledger)  # dies between taking the lease and its first document
    last = _take(ledger)
    last.open_account()
    assert sorted(_documents(ledger)) == [1, 2, 3, 4, 5]
    assert [d["state"] for _, d in sorted(_documents(ledger).items())] == ["ended"] * 4 + ["open"]
    last.renew()
    assert last.record.ended == (), "written accounts leave the lease"


def test_a_lost_attempt_writes_nothing(ledger: Ledger) -> None:
    frozen = _take(ledger)
    frozen.open_account()
    with _take(ledger) as newer:
        newer.open_account()
        before = _documents(ledger)
        with pytest.raises(PreemptedError), frozen:
            frozen.renew()
        assert _documents(ledger) == before


def test_a_failing_store_leaves_the_document_to_the_next_attempt(ledger: Ledger) -> None:
    _end_by(ledger, StoreError("gone"))
    assert _documents(ledger)[1]["state"] == "open"
    _take(ledger).open_account()
    closed = _documents(ledger)[1]
    assert (closed["exit_code"], closed["reason"]) == (ExitCode.OUTAGE, "gone")


def _ran(lease: Lease, gpu_seconds: float, *checkpoints: Checkpoint) -> Lease:
    attempt = lease.attempt.changed(gpu_seconds=gpu_seconds)
    return lease.changed(attempt=attempt, checkpoints=checkpoints)


def test_what_a_checkpoint_keeps_is_not_wasted() -> None:
    first = _ran(taken_over(FRESH, "a"), 80.0, SAVED)
    assert wasted_gpu_seconds(first) == 30.0
    second = _ran(taken_over(first, "b"), 25.0, SAVED.changed(clock_seconds=60.0), SAVED)
    assert wasted_gpu_seconds(second) == 15.0, "only its own progress counts for it"
    third = taken_over(second, "c")
    assert (third.gpu_seconds_before, third.wasted_gpu_seconds_before) == (105.0, 45.0)
    assert [ended.saved_step for ended in third.ended] == [8, 8]


def test_a_lease_of_an_earlier_version_is_taken_over() -> None:
    later = ("ended", "wasted_gpu_seconds_before")  # keys of a later version
    old = {k: v for k, v in taken_over(FRESH, "a").to_json().items() if k not in later}
    assert taken_over(Lease.model_validate(old | {"attempt": {}}), "b").epoch == 2


def test_people_see_the_running_attempt_as_the_lease_tells_it(ledger: Ledger) -> None:
    lease = _killed(ledger, first_step=0, step=3, gpu_seconds=5.0)
    assert account(lease.record, ended=False).state == "open"
    (told,) = read_accounts(ledger.slot(0))
    assert (told.last_step, told.gpu_seconds) == (3, 5.0), "not as it was opened"
    table = attempts_table(ledger, 1)
    assert list(table.columns[-1].cells) == ["running"]


def test_the_budget_counts_ended_killed_and_running_attempts_of_all_generations(
    ledger: Ledger,
) -> None:
    with _take(ledger) as lease:
        lease.report(gpu_seconds=3600.0)
    _killed(ledger, gpu_seconds=1800.0)
    assert _hours_spent(ledger, 1) == 1.5
    running = _take(ledger)
    running.report(gpu_seconds=900.0)
    running.renew()
    assert _hours_spent(ledger, 1) == 1.75
    ledger.store.put_if_absent(ledger.redo_key(0, 1), b"{}")
    ledger.slot(0).commit(make_result(ledger.slot(0).folder, gpu_seconds=360.0))
    assert _hours_spent(ledger, 1) == 1.85


def test_a_damaged_slot_does_not_end_the_trials_of_others(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    _killed(ledger, gpu_seconds=1800.0)
    ledger.store.put_if_absent(ledger.slot(1).key("lease.json"), b"not JSON")
    assert _hours_spent(ledger, 2) == 0.5
    assert "GPU time is taken from the result alone: slot 1: " in caplog.text


def test_a_trial_begun_again_from_before_its_checkpoint_is_accounted_for(ledger: Ledger) -> None:
    """The checkpoint it found was damaged, so what counts of this attempt is less than nothing."""
    first = _take(ledger)
    first.renew(checkpoints=(SAVED.changed(key=first.slot.key("checkpoints/1-8")),))
    lease = _take(ledger)
    assert lease.record.attempt.clock_before == 50.0
    lease.start_paying(seconds_before=5.0)
    settings = Settings(dataset_uri="rows", output_uri="out")
    clock = AttemptClock(settings, lease, prepare_seconds=0, load_seconds=5)
    gpu_seconds, wasted = clock.close(TrainState(clock_seconds=20.0))
    assert gpu_seconds == pytest.approx(5, abs=1)
    assert wasted == pytest.approx(30, abs=1), "and what the lost checkpoint had saved"
    lease.renew()
    assert lease.record.attempt.useful_seconds == -25.0


def test_what_cannot_be_told_fails_where_it_is_reported(ledger: Ledger) -> None:
    lease = _take(ledger)
    with pytest.raises(ValueError, match="step"):
        lease.report(step="seven")
    lease.renew()


@pytest.mark.parametrize(
    ("name", "state"), [("result.json", "damaged"), ("lease.json", "completed")]
)
def test_gpu_time_was_paid_for_although_one_of_two_documents_is_damaged(
    ledger: Ledger, name: str, state: str
) -> None:
    slot = ledger.slot(0)
    with _take(ledger) as lease:
        lease.report(gpu_seconds=7200.0)
    slot.specify(make_spec())
    slot.commit(make_result(slot.folder, gpu_seconds=7200.0))
    path = Path(ledger.store.uri) / slot.key(name)
    newest = max(path.parent.glob(f"{name}*"))
    newest.write_text("{}")
    assert _hours_spent(ledger, 1) == 2.0
    (view,) = read_overview(ledger, 1).slots
    assert (view.state, view.gpu_seconds) == (state, 7200)
