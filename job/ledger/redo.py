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

from job.errors import DamagedError, SettingsError, SlotError
from job.ledger.accounts import now, taken_over, write_account
from job.ledger.ledger import Ledger
from job.ledger.watch import lease_key
from job.log import log
from job.store.documents import Json, create_document, read_document, swap_document


def redo(ledger: Ledger, slot: int) -> str:
    """Begin the slot again; what was done, in a line. Raises `SettingsError` if there is nothing.

    Run again after a crash in between, it goes on where it stood.
    """
    old = ledger.pin(slot)
    generation = old.generation(slot)
    spec = _readable_spec(old, slot)
    if generation and not _begun(old, slot):  # perhaps by a redo cut off before it took the lease
        ended = fence(ledger.pin(slot, generation - 1), slot, "redo")
        return _redone_before(slot, generation, ended=ended)
    if spec is None and not _begun(old, slot):
        raise SettingsError(f"redo: slot {slot} was never begun, there is nothing to do again")
    if spec is not None:
        fresh = {**spec, "wandb_run_id": uuid.uuid4().hex[:8], "created_at": now()}
        spec = ledger.pin(slot, generation + 1).specify(slot, fresh)
    create_document(ledger.store, ledger.redo_key(slot, generation + 1), {"created_at": now()})
    ended = fence(old, slot, "redo")
    return _redone(slot, generation + 1, spec, ended=ended)


def exclude(ledger: Ledger, slot: int, reason: str) -> str:
    """Take the slot out of the sweep; what was done, in a line."""
    view = ledger.pin(slot)
    if not view.exclude(slot, reason):
        before = view.exclusion(slot)
        fence(view, slot, "exclude")
        return f"slot {slot}: was excluded before ({before}), which stays"
    ended = fence(view, slot, "exclude")
    return (
        f"slot {slot}: excluded ({reason}){_told(ended=ended)}; `job redo {slot}` trains it again"
    )


def fence(ledger: Ledger, slot: int, by: str) -> bool:
    """Take the slot's lease from whoever holds it; False if nobody does, or it is damaged."""
    key = lease_key(ledger, slot)
    try:
        while (found := read_document(ledger.store, key)) is not None:
            if found.content.get("state") != "held":
                return False
            content = taken_over(found.content, f"{by}-{uuid.uuid4().hex}") | {"state": "released"}
            if swap_document(ledger.store, key, content, found.version).ours:
                for ended in content["ended"]:
                    write_account(ledger, slot, ended)
                return True
    except SlotError as error:  # its holder cannot renew it either
        log.warning("%s", error)
    return False


def slot_argument(text: str | None, verb: str, num_trials: int) -> int:
    """The slot that a person named. Raises `SettingsError`."""
    allowed = f"allowed: 0 to {num_trials - 1}"
    if text is None:
        raise SettingsError(f"{verb}: SLOT is missing; {allowed}")
    if not text.isascii() or not text.isdigit() or int(text) >= num_trials:
        raise SettingsError(f"{verb}: {text!r} is no slot of this sweep; {allowed}")
    return int(text)


def reason_argument(text: str | None) -> str:
    """Why a slot is excluded. Raises `SettingsError`."""
    reason = " ".join((text or "").split())
    if not reason or len(reason) > 500:
        raise SettingsError("exclude: --reason TEXT is needed, 1 to 500 characters")
    return reason


def _begun(ledger: Ledger, slot: int) -> bool:
    """Anything of the slot's generation exists, besides the spec that a redo gave it."""
    names = ["lease", "result", "failed", "excluded"]
    if ledger.generation(slot) == 0:
        names.append("spec")
    prefix = ledger.slot_prefix(slot)
    try:
        return any(ledger.store.get(f"{prefix}/{name}.json") is not None for name in names)
    except DamagedError:  # something stands there
        return True


def _readable_spec(ledger: Ledger, slot: int) -> Json | None:
    try:
        return ledger.spec(slot)
    except SlotError as error:
        log.warning("%s; it is drawn anew", error)
        return None


def _redone(slot: int, generation: int, spec: Json | None, *, ended: bool) -> str:
    params = "parameters drawn anew" if spec is None else "same parameters"
    return (
        f"slot {slot}: begun again (redo {generation}, {params}){_told(ended=ended)};"
        " start a worker for it, a Job whose index is complete does not"
    )


def _redone_before(slot: int, generation: int, *, ended: bool) -> str:
    done = _told(ended=True).removeprefix(", ") if ended else "nothing was changed"
    return (
        f"slot {slot}: was begun again before (redo {generation}) and no worker has taken it yet,"
        f" {done}; start a worker for it, a Job whose index is complete does not"
    )


def _told(*, ended: bool) -> str:
    return ", the attempt at work on it ends at its next renewal" if ended else ""
