"""redo, exclude and gc once more: after a kill, after each other, at the edge of what is allowed.

`pytest tests/ledger/test_redo_again.py`
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from job.errors import PreemptedError, SettingsError
from job.ledger.garbage import collect, hours_argument
from job.ledger.ledger import Ledger
from job.ledger.redo import exclude, reason_argument, redo
from job.store.documents import read_document
from job.store.local import LocalStore
from job.verbs import run_exclude, run_redo
from tests.ledger.documents import make_identity
from tests.ledger.test_redo import SPEC, _settings, _taken


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(LocalStore(tmp_path), "s")
    ledger.open_sweep(make_identity())
    return ledger


def test_exclude_cut_off_before_it_took_the_lease_is_finished_by_the_next(ledger: Ledger) -> None:
    ledger.slot(0).specify(SPEC)
    holder = _taken(ledger)
    ledger.slot(0).exclude("wrong rows")  # and then it was killed
    assert "was excluded before (wrong rows)" in exclude(ledger.slot(0), "again")
    with pytest.raises(PreemptedError):
        holder.renew()


def test_redo_cut_off_after_it_gave_the_spec_begins_no_further_generation(ledger: Ledger) -> None:
    ledger.slot(0).specify(SPEC)
    holder = _taken(ledger)
    replace(ledger.slot(0), generation=1).specify(SPEC.changed(wandb_run_id="second"))
    ledger.store.put_if_absent(ledger.redo_key(0, 1), b"{}")  # and then it was killed
    assert "begun again before (redo 1)" in (said := redo(ledger, 0))
    assert "the attempt at work on it ends" in said
    assert ledger.slot(0).generation == 1
    with pytest.raises(PreemptedError):
        holder.renew()


def test_a_redone_slot_that_was_excluded_before_anybody_took_it_is_redone_again(
    ledger: Ledger,
) -> None:
    ledger.slot(0).specify(SPEC)
    redo(ledger, 0)
    exclude(ledger.slot(0), "not this one")
    assert "redo 2, same parameters" in redo(ledger, 0)
    assert ledger.slot(0).is_open()


@pytest.mark.parametrize("act", [redo, lambda ledger, slot: exclude(ledger.slot(slot), "why")])
def test_where_nobody_is_at_work_nobody_is_said_to_end(ledger: Ledger, act: object) -> None:
    ledger.slot(0).specify(SPEC)
    _taken(ledger).release()
    slot = ledger.slot(0)
    before = slot.lease()
    assert callable(act)
    assert "attempt at work" not in act(ledger, 0)
    assert slot.lease() == before


def test_the_account_of_an_attempt_that_a_redo_ends_is_closed(ledger: Ledger) -> None:
    ledger.slot(0).specify(SPEC)
    holder = _taken(ledger)
    holder.open_account()
    (key,) = (key for key in ledger.store.list(ledger.slot(0).folder) if "/attempts/" in key)

    def state() -> str:
        document = read_document(ledger.store, key)
        assert document is not None
        return str(document.content["state"])

    assert state() != "ended"
    redo(ledger, 0)
    assert state() == "ended"


def test_a_slot_beyond_job_num_trials_can_be_named_if_it_was_drawn(ledger: Ledger) -> None:
    """JOB_NUM_TRIALS was larger when the sweep drew it."""
    for slot in range(4):
        ledger.slot(slot).specify(SPEC)
    settings = _settings(num_trials=2)
    assert "slot 3: begun again" in run_redo(settings, ledger, Namespace(slot="3"))
    options = Namespace(slot="3", reason="why")
    assert "slot 3: excluded" in run_exclude(settings, ledger, options)
    with pytest.raises(SettingsError, match="allowed: 0 to 3"):
        run_redo(settings, ledger, Namespace(slot="4"))


@pytest.mark.parametrize("text", [None, "", " \n ", "x" * 501])
def test_a_reason_has_to_say_something_short(text: str | None) -> None:
    with pytest.raises(SettingsError, match="1 to 500 characters"):
        reason_argument(text)
    assert reason_argument(" wrong\n  rows ") == "wrong rows"
    assert reason_argument("x" * 500)


def test_a_dry_gc_says_that_it_deleted_nothing(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    ledger.open_sweep(make_identity(JOB_DATASET_URI={"prepared": "a" * 64}))
    ledger.store.put_if_absent("probe-" + "0" * 32, b"x")
    options = {"old_generations": False, "unused_hours": 0.0, "say": lambda _: None}
    assert collect(ledger, dry_run=True, **options).startswith("gc: 1 would be deleted")
    assert collect(ledger, dry_run=False, **options).startswith("gc: 1 deleted")


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "100001", "a day", ""])
def test_hours_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="allowed: 0 to 100000"):
        hours_argument(text)
    assert [hours_argument(hours) for hours in ("0", "1.5", "100000")] == [0, 1.5, 100_000]
