"""redo and exclude: a person changes a slot. `pytest tests/ledger/test_redo.py`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job.errors import PreemptedError, SettingsError, SlotError
from job.ledger.accounts import read_accounts
from job.ledger.lease import HeldLease, acquire
from job.ledger.ledger import Ledger
from job.ledger.redo import exclude, redo
from job.report.attempts_table import attempts_table
from job.report.overview import read_overview
from job.settings import Settings
from job.store.local import LocalStore
from job.trial.draw import observe
from job.trial.slots import nothing_to_do, slots
from tests.ledger.documents import make_identity, make_result, make_spec

SPEC = make_spec(params={"learning_rate": 1e-3}, wandb_run_id="first")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(LocalStore(tmp_path), "s")
    ledger.open_sweep(make_identity())
    return ledger


def _settings(**given: object) -> Settings:
    return Settings(**{"dataset_uri": "rows", "output_uri": "out", "num_trials": 3} | given)  # type: ignore[arg-type]


def _take(ledger: Ledger, slot: int = 0) -> HeldLease | None:
    return acquire(ledger, [slot], lease_seconds=60, should_stop=lambda: None, wait=lambda _: None)


def _taken(ledger: Ledger, slot: int = 0) -> HeldLease:
    lease = _take(ledger, slot)
    assert lease is not None
    return lease


def _commit(ledger: Ledger, slot: int, eval_loss: float) -> None:
    ledger.slot(slot).specify(SPEC)
    _taken(ledger, slot).release()
    _end(ledger, slot, eval_loss)


def _end(ledger: Ledger, number: int, eval_loss: float = 1.0) -> None:
    slot = ledger.slot(number)
    curve = ((0, 2.0), (10, eval_loss))
    slot.commit(make_result(slot.folder, eval_loss=eval_loss, curve=curve))


def _files(ledger: Ledger) -> dict[str, bytes]:
    root = Path(ledger.store.uri)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def _states(ledger: Ledger) -> list[str]:
    return [view.state for view in read_overview(ledger, 3).slots]


def test_redo_of_a_committed_slot_keeps_its_parameters_and_all_it_held(ledger: Ledger) -> None:
    _commit(ledger, 0, 1.0)
    before = _files(ledger)
    assert "redo 1, same parameters" in redo(ledger.slot(0))
    after = _files(ledger)
    assert {name: after[name] for name in before} == before, "nothing is deleted or overwritten"
    assert ledger.slot(0).is_open()
    spec = ledger.slot(0).spec()
    assert spec is not None
    assert (spec.params, spec.recipe) == (SPEC.params, SPEC.recipe)
    assert spec.wandb_run_id != "first", "another run of its own"
    lease = _taken(ledger)
    assert (lease.epoch, lease.record.checkpoints) == (1, ()), "from the start"
    assert read_overview(ledger, 1).slots[0].generation == 1


def test_the_engine_sees_a_redone_slot_as_running_until_it_is_committed(ledger: Ledger) -> None:
    _commit(ledger, 0, 1.0)
    _commit(ledger, 1, 1.5)
    redo(ledger.slot(0))
    told, step_0_loss = observe(ledger, 3)
    assert [(o.slot, o.status, o.eval_loss) for o in told] == [
        (0, "running", None), (1, "completed", 1.5),
    ]  # fmt: skip
    assert step_0_loss == 2.0
    _end(ledger, 0, 0.5)
    assert observe(ledger, 3)[0][0].eval_loss == 0.5


def test_redo_of_a_slot_given_up_opens_it(ledger: Ledger) -> None:
    ledger.slot(0).specify(SPEC)
    lease = _taken(ledger)
    lease.renew(fruitless=3)
    ledger.slot(0).give_up("no progress")
    with pytest.raises(SlotError):
        slots(_settings(completion_index=0), ledger)
    lease.release()
    redo(ledger.slot(0))
    assert slots(_settings(completion_index=0), ledger) == [0]
    assert _taken(ledger).record.fruitless == 0, "and forgets what was counted"


@pytest.mark.parametrize("spec", [None, b"{", b"[]", b"{}"])
def test_redo_of_a_damaged_slot_draws_it_anew(ledger: Ledger, spec: bytes | None) -> None:
    _end(ledger, 0)
    if spec is not None:
        ledger.store.put_if_absent(f"{ledger.slot(0).folder}/spec.json", spec)
    assert _states(ledger)[0] == "damaged"
    assert "parameters drawn anew" in redo(ledger.slot(0))
    assert _states(ledger)[0] == "empty"
    assert ledger.slot(0).spec() is None
    _taken(ledger)


def test_redo_of_a_slot_with_a_damaged_lease_mends_it(ledger: Ledger) -> None:
    ledger.slot(0).specify(SPEC)
    ledger.store.put_if_absent(f"{ledger.slot(0).folder}/lease.json", b"{")
    with _taken(ledger, 1) as lease:
        lease.open_account()
    assert _states(ledger)[0] == "damaged"
    rows = attempts_table(ledger, 2)
    assert [*rows.columns[0].cells] == ["0", "1"], "a damaged slot hides no other"
    assert "damaged" in next(iter(rows.columns[-1].cells))
    redo(ledger.slot(0))
    assert _states(ledger)[0] == "waiting"


def test_attempts_before_a_redo_stay_in_the_table(ledger: Ledger) -> None:
    ledger.slot(0).specify(SPEC)
    with _taken(ledger) as lease:
        lease.open_account()
    redo(ledger.slot(0))
    with _taken(ledger) as lease:
        lease.open_account()
    rows = attempts_table(ledger, 1)
    assert [[*column.cells] for column in rows.columns[:2]] == [["0", "0"], ["1", "1"]]
    earlier, current = rows.columns[-1].cells
    assert earlier.startswith("before a redo: ")
    assert not current.startswith("before")


def test_an_attempt_that_holds_a_redone_slot_loses_it_and_commits_nothing(ledger: Ledger) -> None:
    ledger.slot(0).specify(SPEC)
    holder = _taken(ledger)
    assert "the attempt at work on it ends" in redo(ledger.slot(0))
    with pytest.raises(PreemptedError, match="a newer attempt holds it"):
        holder.renew()
    holder.release()
    assert _taken(ledger).epoch == 1, "the next generation is free at once"


class Interrupting(LocalStore):
    """A store in which something happens right before the first write to a key."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.before: dict[str, Any] = {}

    def _happen(self, key: str) -> None:
        for name in [name for name in self.before if key.endswith(name)]:
            self.before.pop(name)()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._happen(key)
        return super().put_if_absent(key, data)


@pytest.mark.parametrize("act", ["redo", "exclude"])
def test_a_lease_taken_just_as_the_slot_is_closed_is_given_back(tmp_path: Path, act: str) -> None:
    """The worker has looked, finds the slot open, and takes the lease after the person was done."""
    store = Interrupting(tmp_path)
    ledger = Ledger(store, "s")
    ledger.slot(0).specify(SPEC)
    plain = Ledger(LocalStore(tmp_path), "s")
    store.before["lease.json"] = lambda: (
        plain.store.put_if_absent(plain.redo_key(0, 1), b"{}")
        if act == "redo"
        else exclude(plain.slot(0), "why")
    )
    lease = _take(ledger)
    if act == "exclude":
        assert lease is None
    else:
        assert lease is not None
        assert lease.slot.generation == 1


def test_redo_cut_off_before_it_took_the_lease_is_finished_by_the_next(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    ledger.slot(0).specify(SPEC)
    holder = _taken(ledger)
    ledger.store.put_if_absent(ledger.redo_key(0, 1), b"{}")  # and then it was killed
    assert not holder.slot.is_current(), "looked at before the commit, too"
    assert "redo 1" in redo(ledger.slot(0))
    assert ledger.slot(0).generation == 1
    with pytest.raises(PreemptedError):
        holder.renew()


def test_a_second_redo_in_a_row_changes_nothing_and_says_so(ledger: Ledger) -> None:
    _commit(ledger, 0, 1.0)
    redo(ledger.slot(0))
    before = _files(ledger)
    assert "was begun again before (redo 1) and no worker has taken it yet" in redo(ledger.slot(0))
    assert _files(ledger) == before
    _taken(ledger).release()
    assert "begun again (redo 2, same parameters)" in redo(ledger.slot(0))


def test_redo_of_what_was_never_begun_is_refused(ledger: Ledger) -> None:
    with pytest.raises(SettingsError, match="never begun"):
        redo(ledger.slot(2))


def test_an_excluded_trial_is_never_told_and_never_the_best(ledger: Ledger) -> None:
    for slot, loss in enumerate((1.0, 1.5, 2.0)):
        _commit(ledger, slot, loss)
    before = _files(ledger)
    assert "excluded (bad rows)" in exclude(ledger.slot(0), "bad rows")
    after = _files(ledger)
    assert {name: after[name] for name in before} == before
    assert _states(ledger) == ["excluded", "completed", "completed"]
    best = read_overview(ledger, 3).best
    assert best is not None
    assert best.slot == 1
    assert [o.slot for o in observe(ledger, 3)[0]] == [1, 2]
    assert [slot.number for slot, _, _ in ledger.committed(3)] == [1, 2], "nor to early_terminate"


def test_an_excluded_slot_is_nobodys_work_and_a_redo_takes_it_back(ledger: Ledger) -> None:
    ledger.slot(0).specify(SPEC)
    holder = _taken(ledger)
    exclude(ledger.slot(0), "bad node")
    with pytest.raises(PreemptedError):
        holder.renew()
    settings = _settings(completion_index=0)
    assert slots(settings, ledger) == []
    assert nothing_to_do(settings, ledger) == "slot 0: was excluded (bad node), nothing to do"
    assert _take(ledger) is None
    assert slots(_settings(), ledger) == [1, 2]
    assert "was excluded before (bad node), which stays" in exclude(ledger.slot(0), "another word")
    redo(ledger.slot(0))
    assert slots(settings, ledger) == [0]


def test_a_spec_damaged_where_nothing_is_computed_keeps_its_parameters(ledger: Ledger) -> None:
    slot = ledger.slot(0)
    spoiled = SPEC.to_json() | {"code_version": None, "wandb_run_id": 7}
    slot.store.put_if_absent(slot.key("spec.json"), json.dumps(spoiled).encode())
    assert _states(ledger)[0] == "damaged"
    assert "same parameters" in redo(slot)
    spec = ledger.slot(0).spec()
    assert spec is not None
    assert (spec.params, spec.recipe) == (SPEC.params, SPEC.recipe)


def test_taking_the_lease_of_an_attempt_is_no_attempt(ledger: Ledger) -> None:
    ledger.slot(0).specify(SPEC)
    _taken(ledger).open_account()
    exclude(ledger.slot(0), "wrong rows")
    assert [account.epoch for account in read_accounts(ledger.slot(0))] == [1]
