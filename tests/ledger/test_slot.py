"""One slot in one generation: its keys, its documents, and what a damaged one ends in.

`pytest tests/ledger/test_slot.py`
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from job.errors import SlotError
from job.ledger.ledger import Ledger
from job.ledger.records import Account, Checkpoint
from job.ledger.slot import Slot
from job.store.local import LocalStore
from tests.ledger.documents import make_lease, make_result, make_spec


@pytest.fixture
def slot(tmp_path: Path) -> Slot:
    return Ledger(LocalStore(tmp_path), "s").slot(7)


def _begin_again(slot: Slot) -> Slot:
    number, generation = slot.number, slot.generation + 1
    slot.store.put_if_absent(slot.ledger.redo_key(number, generation), b"{}")
    return slot.ledger.slot(number)


def test_a_generation_has_a_folder_of_its_own(slot: Slot) -> None:
    assert slot.key("spec.json") == "sweeps/s/slots/0007/spec.json"
    second = _begin_again(_begin_again(slot))
    assert second.key("spec.json") == "sweeps/s/slots/0007/redo-2/spec.json"
    assert [before.folder for before in second.earlier()] == [
        "sweeps/s/slots/0007", "sweeps/s/slots/0007/redo-1",
    ]  # fmt: skip


def test_a_slot_stays_in_its_generation_whatever_others_begin(slot: Slot) -> None:
    slot.specify(make_spec(wandb_run_id="first"))
    begun = _begin_again(slot)
    assert not slot.is_current()
    assert begun.is_current()
    assert begun.spec() is None
    slot.commit(make_result(slot.folder))
    assert (slot.state(), begun.state()) == ("committed", "empty"), "what comes late is not taken"


def test_who_creates_second_is_told_what_stands(slot: Slot) -> None:
    assert slot.specify(make_spec(wandb_run_id="a")).wandb_run_id == "a"
    assert slot.specify(make_spec(wandb_run_id="b")).wandb_run_id == "a"
    assert slot.exclude("wrong rows")
    assert not slot.exclude("another word")
    assert slot.exclusion() == "wrong rows"
    assert slot.create_lease(make_lease(owner="a")).ours
    stored = slot.create_lease(make_lease(owner="b"))
    assert (stored.ours, stored.lease.owner) == (False, "a")


def test_a_lease_is_swapped_by_its_version_only(slot: Slot) -> None:
    first = slot.create_lease(make_lease(owner="a"))
    second = slot.swap_lease(make_lease(owner="b", epoch=2), first.version)
    assert second.ours
    late = slot.swap_lease(make_lease(owner="c", epoch=2), first.version)
    assert (late.ours, late.lease.owner) == (False, "b")


def test_an_account_is_completed_once_and_never_opened_again(slot: Slot) -> None:
    opened = Account(epoch=1, owner="a", state="open")
    ended = opened.changed(state="ended", reason="told to end")
    for account in (opened, ended, ended.changed(reason="another"), opened):
        slot.write_account(account)
    (told,) = slot.accounts()
    assert (told.state, told.reason) == ("ended", "told to end")


@pytest.mark.parametrize("name", ["spec", "result", "lease"])
def test_damage_names_slot_document_key_and_way_out(slot: Slot, name: str) -> None:
    slot.store.put_if_absent(slot.key(f"{name}.json"), b'{"owner": 3}')
    with pytest.raises(SlotError) as caught:
        getattr(slot, name)()
    message = str(caught.value)
    assert message.startswith(f"slot 7: {slot.store.uri}/{slot.key(f'{name}.json')}: damaged, ")
    assert message.endswith("; `job redo 7` begins it again")


@pytest.mark.parametrize("field", ["key", "best"])
def test_a_lease_that_names_another_slots_folder_is_damaged(slot: Slot, field: str) -> None:
    """What a lease names is deleted one day."""
    keys = {"key": slot.key("checkpoints/1-1"), "best": slot.key("adapter-a")}
    other = "sweeps/s/slots/0008/adapter-a"
    lease = make_lease(checkpoints=(Checkpoint(sha256="0", step=1, **keys | {field: other}),))
    body = json.dumps(lease.to_json()).encode()
    slot.store.put_if_absent(slot.key("lease.json"), body)
    with pytest.raises(SlotError, match="names sweeps/s/slots/0008/adapter-a, which is not this"):
        slot.lease()


@pytest.mark.parametrize("field", ["adapter_key", "history_key", "rows_key"])
def test_a_result_that_names_another_slots_folder_is_damaged(slot: Slot, field: str) -> None:
    result = make_result(slot.folder, **{field: "prepared/rows"})
    slot.store.put_if_absent(slot.key("result.json"), json.dumps(result.to_json()).encode())
    with pytest.raises(SlotError, match="names prepared/rows, which is not this slot's"):
        slot.result()


def test_a_damaged_account_is_told_by_name(slot: Slot) -> None:
    slot.store.put_if_absent(slot.key("attempts/1-a.json"), b'{"epoch": 1}')
    with pytest.raises(SlotError, match=r"attempts/1-a\.json: damaged, owner: field required"):
        slot.accounts()


def test_a_lease_that_somebody_else_wrote_is_theirs_even_where_it_cannot_be_read(
    slot: Slot,
) -> None:
    mine = slot.create_lease(make_lease(owner="a"))
    newer = {"owner": "b", "epoch": 2, "state": "of a newer version"}
    slot.store.put_if_version(slot.key("lease.json"), json.dumps(newer).encode(), mine.version)
    stored = slot.swap_lease(make_lease(owner="a", beat=1), mine.version)
    assert (stored.ours, stored.lease.owner) == (False, "")
    with pytest.raises(SlotError, match="state: should be"):
        slot.lease()


def test_a_commit_that_somebody_else_made_stands_even_where_it_cannot_be_read(slot: Slot) -> None:
    slot.store.put_if_absent(slot.key("result.json"), b'{"status": "of a newer version"}')
    assert not slot.commit(make_result(slot.folder))
