"""Checks before a run trains: which slots are its own, may it go on, can it write its folder."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from job.errors import SlotError, work_dir_error
from job.ledger.lease import HeldLease
from job.ledger.ledger import Ledger
from job.ledger.slot import Slot, begin_again
from job.log import log
from job.settings import Settings

FRUITLESS_ATTEMPTS = 3  # each trained for two checkpoint intervals and saved nothing later
STARTLESS_ATTEMPTS = 10  # each ended before it had finished a step


def slots(settings: Settings, ledger: Ledger) -> list[int]:
    """The slots that this run may work on. Raises `SlotError` if its own was given up."""
    if settings.completion_index is None:
        return open_slots(ledger, settings.num_trials)
    number = settings.completion_index
    slot = ledger.slot(number)
    if (reason := slot.failure()) is not None:
        raise SlotError(f"slot {number} was given up: {reason}")
    if slot.is_open():
        return [number]
    if slot.spec() is None and slot.exclusion() is None:
        check_undrawn(slot)
    return []


def open_slots(ledger: Ledger, num_trials: int) -> list[int]:
    """The slots that a trial may work on; a damaged one is left to a person.

    Raises that slot's `SlotError` once no other is open, or nobody would learn of the damage.
    """
    found: list[int] = []
    damage: SlotError | None = None
    for number, is_open in ledger.read_slots(range(num_trials), _is_open):
        if isinstance(is_open, SlotError):
            log.warning("left out: %s", is_open)
            damage = damage or is_open
        elif is_open:
            found.append(number)
    if damage is not None and not found:
        raise damage
    return found


def _is_open(slot: Slot) -> bool:
    """Whether a trial may work on the slot. Raises `SlotError` for a damaged one."""
    if slot.exclusion() is not None:
        return False
    spec = slot.spec()
    is_open = (slot.result(), slot.failure()) == (None, None)
    if is_open and spec is None:
        check_undrawn(slot)
    return is_open


def drawn_of(ledger: Ledger, numbers: Sequence[int]) -> list[int]:
    """Those of the slots that are drawn; a damaged one counts, its own worker tells it."""
    specs = ledger.read_slots(numbers, lambda slot: slot.spec())
    return [number for number, spec in specs if spec is not None]


def slot_name(settings: Settings, sweep: str) -> str:
    """The slot or slots that this run was to work on, as its last line names them."""
    if settings.completion_index is None:
        return f"sweep {sweep}, all {settings.num_trials} slots"
    return f"slot {settings.completion_index}"


def nothing_to_do(settings: Settings, ledger: Ledger) -> str:
    """The last line of a run that finds its slots closed."""
    number = settings.completion_index
    if number is not None and (reason := ledger.slot(number).exclusion()) is not None:
        return f"slot {number}: was excluded ({reason}), nothing to do"
    return f"{slot_name(settings, ledger.sweep)}: committed before, nothing to do"


def check_progress(lease: HeldLease) -> None:
    """Close a slot whose attempts make no progress; preemptions alone never close one.

    Raises `SlotError` for such a slot.
    """
    slot, fruitless, startless = lease.slot, lease.record.fruitless, lease.record.startless
    if fruitless < FRUITLESS_ATTEMPTS and startless < STARTLESS_ATTEMPTS:
        return
    reason = (
        f"{fruitless} attempts in a row trained for two checkpoint intervals and saved nothing"
        if fruitless >= FRUITLESS_ATTEMPTS
        else f"{startless} attempts in a row ended before their first step"
    )
    slot.give_up(reason)
    raise SlotError(f"slot {slot.number} is given up: {reason}; look at its attempts' last lines")


def check_undrawn(slot: Slot) -> None:
    """Raise `SlotError` for a slot that holds a trial but no spec: it is never drawn again."""
    if (found := slot.damage_without_spec()) is not None:
        raise SlotError(
            f"slot {slot.number} is damaged: it has {found} but no spec.json in"
            f" {slot.store.uri}/{slot.folder}; {begin_again(slot.number)}"
        )


def check_work_dir(work_dir: Path) -> None:
    """Check, before minutes are spent, that `JOB_WORK_DIR` is a folder that we may write.

    Raises `SettingsError`, and `OutageError` for a full volume.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=work_dir).close()
    except OSError as error:
        raise work_dir_error(work_dir, error, at_start=True) from error
