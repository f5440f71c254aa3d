"""The ledger: identity, specs and commits, each written once.

`pytest tests/ledger/test_ledger.py`
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from job.errors import SettingsError, SlotError
from job.ledger.ledger import Ledger
from job.ledger.records import Ended, Identity, MergeLosses
from job.ledger.redo import redo
from job.store.base import Stored
from job.store.local import LocalStore
from job.trial.slots import open_slots
from tests.ledger.documents import make_identity, make_lease, make_result, make_spec

IDENTITY = make_identity(JOB_MAX_STEPS=1500, JOB_SWEEP_FILE={"method": "bayes"}, _code_version="1")
SPEC = make_spec()
RESULT = make_result("sweeps/card/slots/0000")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(LocalStore(tmp_path), "card")


def test_the_first_trial_freezes_the_identity(ledger: Ledger) -> None:
    assert ledger.identity() is None
    ledger.open_sweep(IDENTITY)
    ledger.open_sweep(IDENTITY.changed(_code_version="2"))  # information is not compared
    identity = ledger.identity()
    assert identity is not None
    assert identity.to_json()["_code_version"] == "1"


def test_every_differing_setting_is_named_old_to_new(ledger: Ledger) -> None:
    ledger.open_sweep(IDENTITY)
    with pytest.raises(SettingsError) as caught:
        ledger.open_sweep(
            make_identity(JOB_MAX_STEPS=900, JOB_SWEEP_FILE={"method": "random"}, JOB_SEED=3)
        )
    assert str(caught.value) == (
        f"sweep {ledger.sweep} was started with other settings (old -> new): JOB_MAX_STEPS: 1500 ->"
        " 900; JOB_SEED: not set -> 3; JOB_SWEEP_FILE.method: bayes -> random; set them back, or"
        " start another sweep with another JOB_SWEEP_NAME"
    ), "one line: the last one of a log"


def test_a_slot_keeps_its_first_spec(ledger: Ledger) -> None:
    assert ledger.slot(3).state() == "empty"
    first, second = ({"learning_rate": rate} for rate in (0.1, 0.2))
    assert ledger.slot(3).specify(make_spec(params=first)).params == first
    assert ledger.slot(3).specify(make_spec(params=second)).params == first
    assert ledger.slot(3).state() == "specified"


def test_second_committer_loses_without_effect(ledger: Ledger) -> None:
    ledger.slot(0).specify(SPEC)
    assert ledger.slot(0).commit(RESULT)
    assert not ledger.slot(0).commit(RESULT.changed(eval_loss=1.0))
    result = ledger.slot(0).result()
    assert result is not None
    assert result.eval_loss == 1.5
    assert ledger.slot(0).state() == "committed"


def test_a_slot_is_open_until_it_is_committed_or_given_up(ledger: Ledger) -> None:
    ledger.slot(0).commit(RESULT)
    ledger.slot(1).specify(SPEC)
    ledger.slot(2).give_up("no progress")
    assert open_slots(ledger, 5) == [1, 3, 4]
    assert [ledger.slot(slot).state() for slot in range(4)] == [
        "committed", "specified", "failed", "empty",
    ]  # fmt: skip


class Counting(LocalStore):
    """A folder that counts how often each document was asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.num_asked: Counter[str] = Counter()

    def get(self, key: str) -> Stored | None:
        self.num_asked[key.rpartition("/")[2]] += 1
        return super().get(key)


def _ended(**changes: float) -> Ended:
    return Ended(**{"gain": 2e-4, "gain_before": 5e-4, "results": 6, "min_gain": 1e-3} | changes)  # type: ignore[arg-type]


# Each document that is created once: who creates it, and what asks for it.
CREATED_ONCE: dict[str, tuple[Callable[[Ledger], object], Callable[[Ledger], object]]] = {
    "sweep.json": (lambda it: it.open_sweep(IDENTITY), lambda it: it.identity()),
    "ended.json": (lambda it: it.end(_ended()), lambda it: it.ended()),
    "spec.json": (lambda it: it.slot(0).specify(SPEC), lambda it: it.slot(0).spec()),
    "result.json": (lambda it: it.slot(0).commit(RESULT), lambda it: it.slot(0).result()),
    "failed.json": (lambda it: it.slot(0).give_up("why"), lambda it: it.slot(0).failure()),
    "excluded.json": (lambda it: it.slot(0).exclude("why"), lambda it: it.slot(0).exclusion()),
    "redo-1.json": (
        lambda it: it.store.put_if_absent(it.redo_key(0, 1), b"{}"),
        lambda it: it.slot(0).generation or None,
    ),
}


@pytest.mark.parametrize("name", CREATED_ONCE)
def test_what_is_created_once_is_asked_for_until_it_is_there(tmp_path: Path, name: str) -> None:
    create, ask = CREATED_ONCE[name]
    ledger, others = Ledger(Counting(tmp_path), "card"), Ledger(LocalStore(tmp_path), "card")
    assert [ask(ledger), ask(ledger)] == [None, None]
    create(others)
    found = ask(ledger)
    assert found is not None, "its absence is not remembered"
    assert [ask(ledger), ask(ledger)] == [found, found]
    assert ledger.store.num_asked[name] == 3, "twice in vain, and once more"  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [name for name in CREATED_ONCE if name != "redo-1.json"])
@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"reason": 1, "gain": -1, "_rows": 0}'])
def test_damage_is_not_remembered(tmp_path: Path, name: str, damage: bytes) -> None:
    """A person may put a document back."""
    create, ask = CREATED_ONCE[name]
    ledger, others = Ledger(LocalStore(tmp_path), "card"), Ledger(LocalStore(tmp_path), "card")
    create(others)
    (path,) = tmp_path.rglob(name)
    whole = path.read_bytes()
    path.write_bytes(damage)
    for _ in range(2):
        with contextlib.suppress(SlotError, SettingsError):
            assert ask(ledger) is None, "a damaged ended.json is passed over"
    path.write_bytes(whole)
    assert ask(ledger) == ask(others) is not None


def test_what_may_change_is_asked_for_each_time(ledger: Ledger) -> None:
    others, slot = Ledger(ledger.store, "card"), ledger.slot(0)
    for epoch in (1, 2):
        stored = others.slot(0).lease()
        lease = make_lease(epoch=epoch)
        if stored is None:
            others.slot(0).create_lease(lease)
        else:
            others.slot(0).swap_lease(lease, stored.version)
        found = slot.lease()
        assert found is not None
        assert found.lease.epoch == epoch
    ledger.store.delete(slot.key("lease.json"))
    assert slot.lease() is None
    for num_rows in (1, 2):
        others.slot(0).write_merge_losses(MergeLosses(num_rows=num_rows))
        assert slot.merge_losses() == MergeLosses(num_rows=num_rows)


def test_what_was_remembered_of_a_slot_is_not_taken_for_what_was_begun_again(
    ledger: Ledger,
) -> None:
    before = ledger.slot(0)
    before.specify(SPEC)
    before.commit(RESULT)
    before.exclude("why")
    assert before.state() == "excluded"
    redo(Ledger(ledger.store, "card").slot(0))
    assert (before.state(), before.is_current()) == ("excluded", False)
    begun = ledger.slot(0)
    assert (begun.generation, begun.state(), begun.is_open()) == (1, "specified", True)


def test_two_sweeps_share_a_bucket(ledger: Ledger) -> None:
    other = Ledger(ledger.store, "wide")
    ledger.slot(0).commit(RESULT)
    assert other.slot(0).result() is None


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"{}", b"\xff\xfe"])
def test_a_damaged_result_is_an_error_and_never_open(ledger: Ledger, body: bytes) -> None:
    ledger.store.put_if_absent(f"{ledger.slot(0).folder}/result.json", body)
    with pytest.raises(SlotError, match=r"slots/0000/result\.json.*damaged"):
        open_slots(ledger, 1)


def _rows(digest: str, rows: dict[str, object] | None = None) -> Identity:
    behind = {} if rows is None else {"_rows": rows}
    return make_identity(JOB_DATASET_URI={"prepared": digest}, **behind)


def test_what_is_behind_other_rows_is_named(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    rows: dict[str, object] = {"JOB_SUBSAMPLE_FRACTION": 0.15, "JOB_MAX_SEQ_LENGTH": 1024}
    ledger.check_identity(_rows("a"))  # not begun: nothing to compare
    ledger.open_sweep(_rows("a", rows))
    ledger.check_identity(_rows("a", {}))
    other = _rows("b", rows | {"JOB_SUBSAMPLE_FRACTION": 0.1})
    with pytest.raises(SettingsError) as caught:
        ledger.open_sweep(other)
    assert "JOB_SUBSAMPLE_FRACTION: 0.15 -> 0.1" in str(caught.value)
    assert "JOB_MAX_SEQ_LENGTH" not in str(caught.value)
    assert "the settings are the same" not in str(caught.value)
    with pytest.raises(SettingsError) as caught:
        ledger.open_sweep(_rows("b", rows))
    parts = str(caught.value).split("; ")
    assert parts[0].endswith(" JOB_DATASET_URI.prepared: a -> b")
    assert "this version reads or prepares rows otherwise" in parts[1]
    assert "go on with the image that began the sweep" in parts[1]
    assert "another JOB_SWEEP_NAME" in parts[2]
    moved = _rows("b", rows).changed(JOB_BASE_MODEL={"revision": "other"})
    with pytest.raises(SettingsError) as caught:
        ledger.open_sweep(moved)
    assert "the settings are the same" not in str(caught.value), "another model, other tokens"
