"""Checks before a run trains: which slots are its own, may it go on, can it write its folder."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from statistics import median

from job.errors import SlotError, work_dir_error
from job.ledger.accounts import NOTHING, Cost, cost_of_slot
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
    spec, is_open = slot.spec(), slot.is_open()
    if is_open and spec is None:
        check_undrawn(slot)
    return is_open


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


def budget_spent(settings: Settings, ledger: Ledger) -> str | None:
    """Say which of the sweep's budgets is spent, GPU-hours or dollars; None if none is."""
    hours, dollars = settings.sweep_budget_gpu_hours, settings.sweep_budget_usd
    if hours is None and dollars is None:
        return None
    costs = [cost_of_slot(ledger, number) for number in range(settings.num_trials)]
    total = sum(costs, NOTHING)
    if hours is not None and (spent := total.gpu_seconds / 3600) >= hours:
        return f"{spent:.1f} GPU-hours are spent, JOB_SWEEP_BUDGET_GPU_HOURS is {hours:g}"
    if dollars is None:
        return None
    usd, bound = total.dollars(settings.gpu_hourly_usd), _bound_usd(settings, ledger, costs)
    if usd + bound < dollars:
        return None
    and_bound = f" and about ${bound:.2f} bound by the trials at work" if bound else ""
    return f"${usd:.2f} are spent{and_bound}, JOB_SWEEP_BUDGET_USD is {dollars:g}"


def _bound_usd(settings: Settings, ledger: Ledger, costs: list[Cost]) -> float:
    """The dollars that trials which were begun will still take; 0 before the first has ended.

    Each is expected to take the GPU time of the median committed trial, at its own price.
    """
    begun, ended = [], []
    for number, cost in enumerate(costs):
        with contextlib.suppress(SlotError):  # a damaged slot binds nothing
            slot = ledger.slot(number)
            if (result := slot.result()) is not None:
                ended.append(result.gpu_seconds)
            elif slot.spec() is not None and slot.is_open():
                stored = slot.lease()
                begun.append((cost.gpu_seconds, stored.lease.attempt if stored else None))
    if not ended:
        return 0.0
    expected, dollars = median(ended), 0.0
    for seconds, attempt in begun:
        price = attempt.hourly_usd if attempt else None
        hourly_usd = settings.gpu_hourly_usd or 0.0 if price is None else price
        dollars += max(0.0, expected - seconds) / 3600 * hourly_usd
    return dollars


def check_work_dir(work_dir: Path) -> None:
    """Check, before minutes are spent, that `JOB_WORK_DIR` is a folder that we may write.

    Raises `SettingsError`, and `OutageError` for a full volume.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=work_dir).close()
    except OSError as error:
        raise work_dir_error(work_dir, error, at_start=True) from error
