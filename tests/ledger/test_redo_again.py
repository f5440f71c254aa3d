"""redo, exclude and gc once more: after a kill, after each other, at the edge of what is allowed.

`pytest tests/ledger/test_redo_again.py`
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from job.errors import PreemptedError
from job.ledger.garbage import collect
from job.ledger.ledger import Ledger
from job.ledger.redo import exclude, redo
from job.store.documents import read_document
from job.store.local import LocalStore
from tests.ledger.documents import make_identity
from tests.ledger.test_redo import SPEC, _taken


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
    assert "begun again before (redo 1)" in (said := redo(ledger.slot(0)))
    assert "the attempt at work on it ends" in said
    assert ledger.slot(0).generation == 1
    with pytest.raises(PreemptedError):
        holder.renew()


def test_a_redone_slot_that_was_excluded_before_anybody_took_it_is_redone_again(
    ledger: Ledger,
) -> None:
    ledger.slot(0).specify(SPEC)
    redo(ledger.slot(0))
    exclude(ledger.slot(0), "not this one")
    assert "redo 2, same parameters" in redo(ledger.slot(0))
    assert ledger.slot(0).is_open()


@pytest.mark.parametrize("act", [redo, lambda slot: exclude(slot, "why")])
def test_where_nobody_is_at_work_nobody_is_said_to_end(ledger: Ledger, act: object) -> None:
    ledger.slot(0).specify(SPEC)
    _taken(ledger).release()
    slot = ledger.slot(0)
    before = slot.lease()
    assert callable(act)
    assert "attempt at work" not in act(slot)
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
    redo(ledger.slot(0))
    assert state() == "ended"


def test_a_dry_gc_says_that_it_deleted_nothing(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    ledger.open_sweep(make_identity(JOB_DATASET_URI={"prepared": "a" * 64}))
    ledger.store.put_if_absent("probe-" + "0" * 32, b"x")
    options = {"old_generations": False, "unused_hours": 0.0, "say": lambda _: None}
    assert collect(ledger, dry_run=True, **options).summary.startswith("gc: 1 would be deleted")
    assert collect(ledger, dry_run=False, **options).summary.startswith("gc: 1 deleted")
