"""`job redo` and `job exclude`: what a person does to a slot. Nothing is deleted or overwritten.

**redo** begins the slot again as its next generation, in a folder of its own: the same spec (a
slot's parameters are drawn once) from step 0; where the spec is lost, as in a damaged slot, it is
drawn anew. That holds for a committed slot, one given up (69), a damaged, a running and an excluded
one. The engine, `status` and workers see the newest generation only, as a running trial until it is
committed; budgets count all of them.

**exclude** takes the slot out of the sweep: no worker trains it, the engine is not told of it, it
is never the best. A redo trains it again.

An attempt that holds the slot's lease meanwhile loses it and ends with 75, which Kubernetes runs
again. The document comes first and the lease is taken after it; whoever takes a lease looks for the
document afterwards: so no attempt goes on in what is closed, whatever the order.
"""

from __future__ import annotations

import uuid
from dataclasses import replace

from pydantic import ValidationError

from job.errors import DamagedError, SettingsError, SlotError
from job.ledger.accounts import now, taken_over
from job.ledger.records import Spec
from job.ledger.slot import Slot
from job.log import log
from job.store.documents import create_document, read_document

# The part of a spec that decides what its trial computes.
_COMPUTED = ("params", "recipe", "measure_step_0", "data_digest")


def read_slot(text: str | None, verb: str, num_slots: int) -> int:
    """The number of the slot that a person named. Raises `SettingsError`."""
    allowed = f"allowed: 0 to {num_slots - 1}"
    if text is None:
        raise SettingsError(f"{verb}: SLOT is missing; {allowed}")
    if not text.isascii() or not text.isdigit() or int(text) >= num_slots:
        raise SettingsError(f"{verb}: {text!r} is no slot of this sweep; {allowed}")
    return int(text)


def redo(old: Slot) -> str:
    """Begin a slot again, given in its newest generation; return what was done, in a line.

    Run again after a crash in between, it goes on where it stood. Raises `SettingsError` if there
    is nothing to do again.
    """
    spec = _readable_spec(old)
    if old.generation and not _begun(old):  # perhaps a redo was cut off before it took the lease
        return _redone_before(old, ended=fence(old.earlier()[-1], "redo"))
    if spec is None and not _begun(old):
        raise SettingsError(
            f"redo: slot {old.number} was never begun, there is nothing to do again"
        )
    new = replace(old, generation=old.generation + 1)
    if spec is not None:
        fresh = spec.changed(wandb_run_id=uuid.uuid4().hex[:8], created_at=now())
        spec = new.specify(fresh)
    key = old.ledger.redo_key(old.number, new.generation)
    create_document(old.store, key, {"created_at": now()})
    return _redone(new, spec, ended=fence(old, "redo"))


def exclude(slot: Slot, reason: str) -> str:
    """Take the slot out of the sweep; return what was done, in a line."""
    if not slot.exclude(reason):
        before = slot.exclusion()
        fence(slot, "exclude")
        return f"slot {slot.number}: was excluded before ({before}), which stays"
    note = _attempt_note(ended=fence(slot, "exclude"))
    way_back = f"`job redo {slot.number}` trains it again"
    return f"slot {slot.number}: excluded ({reason}){note}; {way_back}"


def fence(slot: Slot, by: str) -> bool:
    """Take the slot's lease from whoever holds it; False if nobody does, or it is damaged."""
    try:
        while (found := slot.lease()) is not None:
            if not found.lease.is_held:
                return False
            taken = taken_over(found.lease, f"{by}-{uuid.uuid4().hex}").changed(state="released")
            if slot.swap_lease(taken, found.version).ours:
                for ended in taken.ended:
                    slot.write_account(ended)
                return True
    except SlotError as error:  # a damaged lease cannot be renewed by its holder either
        log.warning("%s", error)
    return False


def _begun(slot: Slot) -> bool:
    """Whether anything of the slot's generation exists besides the spec that a redo gave it."""
    names = ["lease", "result", "failed", "excluded"]
    if slot.generation == 0:
        names.append("spec")
    try:
        if any(slot.store.get(slot.key(f"{name}.json")) is not None for name in names):
            return True
        return slot.damage_without_spec() is not None
    except DamagedError:  # a damaged document is there, too
        return True


def _readable_spec(slot: Slot) -> Spec | None:
    """The slot's spec; of a damaged one what it computes, if that is whole; None if it is lost."""
    try:
        return slot.spec()
    except SlotError as error:
        log.warning("%s", error)
    try:
        document = read_document(slot.store, slot.key("spec.json"))
        content = document.content if document else {}
        kept = {key: content[key] for key in _COMPUTED if key in content}
        return Spec.model_validate({**kept, "wandb_run_id": "", "created_at": now()})
    except (SlotError, ValidationError):
        log.warning("slot %d: its parameters cannot be read, they are drawn anew", slot.number)
        return None


def _redone(slot: Slot, spec: Spec | None, *, ended: bool) -> str:
    params = "parameters drawn anew" if spec is None else "same parameters"
    note = _attempt_note(ended=ended)
    return (
        f"slot {slot.number}: begun again (redo {slot.generation}, {params}){note};"
        " start a worker for it, a Job whose index is complete does not"
    )


def _redone_before(slot: Slot, *, ended: bool) -> str:
    done = _attempt_note(ended=True).removeprefix(", ") if ended else "nothing was changed"
    return (
        f"slot {slot.number}: was begun again before (redo {slot.generation}) and no worker has"
        f" taken it yet, {done}; start a worker for it, a Job whose index is complete does not"
    )


def _attempt_note(*, ended: bool) -> str:
    return ", the attempt at work on it ends at its next renewal" if ended else ""
