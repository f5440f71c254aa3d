"""The sweep's budgets in GPU-hours and dollars: whether another trial fits into them.

Counted is what was spent, what the trials at work will still take, and what another one takes, so
with any number of workers a sweep ends within about one trial's price of its limit. A trial is
expected to take what the median committed one took. Before the first commit nothing is known but
its limit, `JOB_TRIAL_BUDGET_HOURS`: where that might be too much, the question is put off (75),
because a worker that leaves with 0 completes its index for good. It is put off for trials only that
are at work or were preempted: one that failed may never come again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from job.errors import ExitCode, HeldError
from job.ledger.accounts import NOTHING, Cost, cost_of, cost_of_slot
from job.ledger.ledger import Ledger
from job.ledger.slot import Slot
from job.ledger.watch import LeaseWatch
from job.settings import Settings
from job.trial.end import median_gpu_seconds
from job.trial.slots import slot_name


@dataclass(frozen=True)
class Looks:
    """How long others' leases are looked at before their workers count as alive or as gone."""

    watch: LeaseWatch
    should_stop: Callable[[], None]
    wait: Callable[[float], None]


class _Budget(NamedTuple):
    """One of the sweep's limits and what counts towards it, all in the same unit."""

    variable: str
    limit: float
    unit: str  # a format
    spent: float
    bound: float  # by the trials at work
    needed: float  # for another trial

    @property
    def is_spent(self) -> bool:
        return self.spent >= self.limit

    @property
    def is_reached(self) -> bool:
        return self.is_spent or self.spent + self.bound + self.needed > self.limit

    def told(self, about: str) -> str:
        spent, bound, needed = map(self.unit.format, (self.spent, self.bound, self.needed))
        words = f"{spent} are spent"
        if not self.is_spent:
            words += f", {about} {bound} bound by the trials at work" if self.bound else ""
            words += f" and {about} {needed} needed for another"
        return f"{words}, {self.variable} is {self.limit:g}"


def affordable(
    settings: Settings, ledger: Ledger, numbers: list[int], looks: Looks | None = None
) -> tuple[list[int], str | None]:
    """Those of the open slots that may be worked on, and which budget is reached for the others.

    What is drawn may always be ended. Called before anything is loaded; raises as `budget_reached`
    if no slot is drawn.
    """
    if not _is_limited(settings):
        return numbers, None
    # A damaged slot goes to its own worker, which tells it.
    specs = ledger.read_slots(numbers, lambda slot: slot.spec())
    drawn = [number for number, spec in specs if spec is not None]
    if len(drawn) == len(numbers):
        return numbers, None
    try:
        reached = budget_reached(settings, ledger, looks=None if drawn else looks)
    except HeldError as error:
        if not drawn:
            raise
        reached = str(error)
    return (numbers, None) if reached is None else (drawn, reached)


def budget_reached(
    settings: Settings, ledger: Ledger, *, held: int | None = None, looks: Looks | None = None
) -> str | None:
    """Say which of the sweep's budgets has no room for another trial; None if all have.

    `held` is the slot whose lease the asking worker holds. Raises `HeldError` where it depends on
    the length of a trial, and none has ended yet; with `looks` not for workers that are gone.
    """
    while _is_limited(settings):
        # Looked for first: who draws, ends or proves to be gone meanwhile is counted as such.
        unclear = looks is not None and _any(ledger, settings, _is_unclear, held, looks.watch)
        try:
            return _reached(settings, ledger, held, looks.watch if looks else None)
        except HeldError:
            if looks is None or not unclear:
                raise
        looks.wait(looks.watch.lease_seconds / 20)
        looks.should_stop()
    return None


def _reached(
    settings: Settings, ledger: Ledger, held: int | None, watch: LeaseWatch | None
) -> str | None:
    committed = (result for _, _, result in ledger.committed(settings.num_trials))
    median_seconds = median_gpu_seconds(committed)
    expected = 3600 * settings.trial_budget_hours if median_seconds is None else median_seconds
    reached = [b for b in _budgets(settings, ledger, expected, held) if b.is_reached]
    if not reached:
        return None
    if spent := next((budget for budget in reached if budget.is_spent), None):
        return spent.told("")
    if median_seconds is not None:
        return reached[0].told("about")
    if any(budget.bound for budget in reached) and _any(ledger, settings, _will_end, held, watch):
        name = slot_name(settings, ledger.sweep)
        raise HeldError(
            f"{name}: {reached[0].told('up to')}: put off until a first trial has ended"
        )
    return None  # a first trial always begins


def _is_limited(settings: Settings) -> bool:
    return settings.sweep_budget_gpu_hours is not None or settings.sweep_budget_usd is not None


def _budgets(
    settings: Settings, ledger: Ledger, expected_seconds: float, held: int | None
) -> Iterator[_Budget]:
    """The budgets that are set, if a trial takes so many GPU-seconds."""
    numbers = range(settings.num_trials)
    spent = sum((cost_of_slot(ledger, number) for number in numbers), NOTHING)
    bound = _bound(ledger, numbers, expected_seconds, held)
    another, price = Cost(expected_seconds, 0.0, expected_seconds), settings.gpu_hourly_usd
    if (hours := settings.sweep_budget_gpu_hours) is not None:
        told = (cost.gpu_seconds / 3600 for cost in (spent, bound, another))
        yield _Budget("JOB_SWEEP_BUDGET_GPU_HOURS", hours, "{:.1f} GPU-hours", *told)
    if (dollars := settings.sweep_budget_usd) is not None:
        told = (cost.dollars(price) for cost in (spent, bound, another))
        yield _Budget("JOB_SWEEP_BUDGET_USD", dollars, "${:.2f}", *told)


def _bound(
    ledger: Ledger, numbers: Sequence[int], expected_seconds: float, held: int | None
) -> Cost:
    """What the trials at work will still take if each takes so many GPU-seconds, at its price."""

    def left_of(slot: Slot) -> Cost:
        if not slot.is_open() or not _is_begun(slot, held):
            return NOTHING
        stored = slot.lease()
        price = stored.lease.attempt.hourly_usd if stored else None
        # Since it was begun, or begun again: what came before a redo is spent.
        left = max(0.0, expected_seconds - cost_of(slot).gpu_seconds)
        return Cost(left, 0.0, left) if price is None else Cost(left, left / 3600 * price)

    found = (left for _, left in ledger.read_slots(numbers, left_of))
    # A damaged slot binds nothing.
    return sum((left for left in found if isinstance(left, Cost)), NOTHING)


def _is_begun(slot: Slot, held: int | None) -> bool:
    """Whether the slot is drawn; or will be, by a worker that comes before the one that asks.

    Of workers that took leases at once each counts those at lower slots, so that not all of them
    begin, and not all of them leave.
    """
    if slot.spec() is not None:
        return True
    if held is None or slot.number >= held:
        return False
    stored = slot.lease()
    return stored is not None and stored.lease.is_held


def _any(
    ledger: Ledger,
    settings: Settings,
    which: Callable[[Slot, LeaseWatch | None], bool],
    held: int | None,
    watch: LeaseWatch | None,
) -> bool:
    """Whether one of the trials that were begun is such; a damaged slot's is not."""

    def is_such(slot: Slot) -> bool:
        return slot.is_open() and _is_begun(slot, held) and which(slot, watch)

    return any(found is True for _, found in ledger.read_slots(range(settings.num_trials), is_such))


def _will_end(slot: Slot, watch: LeaseWatch | None) -> bool:
    """Whether the slot's worker is at work, as far as it was watched, or will come again."""
    if (stored := slot.lease()) is None:
        return False
    if not stored.lease.is_held:
        return stored.lease.attempt.exit_code == ExitCode.PREEMPTED
    return watch is None or not watch.is_free(slot, stored)


def _is_unclear(slot: Slot, watch: LeaseWatch | None) -> bool:
    """Whether the slot's worker was seen neither to be alive nor to be gone."""
    stored = slot.lease()
    if watch is None or stored is None or watch.is_free(slot, stored):
        return False
    return not watch.is_alive(slot)
