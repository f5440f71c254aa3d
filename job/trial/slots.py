"""What a run looks at before it trains: which slots, which folder, and whether to go on at all."""

from __future__ import annotations

import tempfile
from pathlib import Path

from job.errors import VOLUME_FULL, SettingsError, SlotError
from job.ledger.accounts import gpu_hours_spent
from job.ledger.lease import Lease
from job.ledger.ledger import Ledger, begin_again
from job.log import log
from job.settings import Settings

FRUITLESS_ATTEMPTS = 3  # that trained two checkpoint intervals each and published nothing later
STARTLESS_ATTEMPTS = 10  # that never finished a step


def slots(settings: Settings, ledger: Ledger) -> list[int]:
    """The slots that this run may work on. Raises `SlotError` if its own was given up."""
    if settings.completion_index is None:
        return open_slots(ledger, settings.num_trials)
    slot = settings.completion_index
    if (reason := ledger.failure(slot)) is not None:
        raise SlotError(f"slot {slot} was given up: {reason}")
    if ledger.is_open(slot):
        return [slot]
    if ledger.spec(slot) is None and ledger.exclusion(slot) is None:
        raise SlotError(
            f"slot {slot} is damaged: it has a result.json but no spec.json; {begin_again(slot)}"
        )
    return []


def open_slots(ledger: Ledger, num_trials: int) -> list[int]:
    """The slots that a trial may work on; a damaged one is left to a person.

    Raises its `SlotError` once no other is open: else nobody would hear of it.
    """
    found: list[int] = []
    damage: SlotError | None = None
    for slot in range(num_trials):
        try:
            view = ledger.pin(slot)
            if view.exclusion(slot) is None:
                view.spec(slot)
                found += [slot] if view.is_open(slot) else []
        except SlotError as error:
            log.warning("left out: %s", error)
            damage = damage or error
    if damage is not None and not found:
        raise damage
    return found


def slot_name(settings: Settings, sweep: str) -> str:
    """How the last line names what this run was to work on."""
    if settings.completion_index is None:
        return f"sweep {sweep}, all {settings.num_trials} slots"
    return f"slot {settings.completion_index}"


def nothing_to_do(settings: Settings, ledger: Ledger) -> str:
    """The last line of a run that finds its slots closed."""
    slot = settings.completion_index
    if slot is not None and (reason := ledger.exclusion(slot)) is not None:
        return f"slot {slot}: was excluded ({reason}), nothing to do"
    return f"{slot_name(settings, ledger.sweep)}: committed before, nothing to do"


def check_progress(ledger: Ledger, lease: Lease) -> None:
    """Close a slot that eats attempts without getting anywhere; preemptions alone never do.

    Raises `SlotError` for such a slot.
    """
    fruitless, startless = lease.content["fruitless"], lease.content["startless"]
    if fruitless < FRUITLESS_ATTEMPTS and startless < STARTLESS_ATTEMPTS:
        return
    reason = (
        f"{fruitless} attempts in a row trained for two checkpoint intervals and saved nothing"
        if fruitless >= FRUITLESS_ATTEMPTS
        else f"{startless} attempts in a row ended before their first step"
    )
    ledger.close(lease.slot, reason)
    raise SlotError(f"slot {lease.slot} is given up: {reason}; look at its attempts' last lines")


def check_undrawn(ledger: Ledger, lease: Lease) -> None:
    """Raise `SlotError` for a slot with a checkpoint but no spec: it is never drawn again."""
    if lease.content["checkpoints"]:
        raise SlotError(
            f"slot {lease.slot} is damaged: it has checkpoints but no spec.json in"
            f" {ledger.store.uri}/{ledger.slot_prefix(lease.slot)}; {begin_again(lease.slot)}"
        )


def budget_spent(settings: Settings, ledger: Ledger) -> str | None:
    """That `JOB_SWEEP_BUDGET_GPU_HOURS` is spent, in words; None if it is not."""
    limit = settings.sweep_budget_gpu_hours
    if limit is None or (spent := gpu_hours_spent(ledger, settings.num_trials)) < limit:
        return None
    return f"{spent:.1f} GPU-hours are spent, JOB_SWEEP_BUDGET_GPU_HOURS is {limit:g}"


def check_work_dir(work_dir: Path) -> None:
    """Before minutes are spent: `JOB_WORK_DIR` must be a folder that we may write.

    Raises `SettingsError`, and the `OSError` of a full volume.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=work_dir).close()
    except OSError as error:
        if error.errno in VOLUME_FULL:
            raise
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise SettingsError(
            f"JOB_WORK_DIR: {work_dir} cannot be written ({reason}); give a folder that"
            " this user may write"
        ) from error
