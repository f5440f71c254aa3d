"""The sweep's budgets in GPU-hours and dollars: whether another trial fits into them.

Counted is what was spent, what the trials at work will still take, and what another one takes, so
with any number of workers a sweep ends within about one trial's price of its limit. A trial is
expected to take what the median committed one took. Before the first commit nothing is known but
its limit, `JOB_TRIAL_BUDGET_HOURS`: where that might be too much, the question is put off (75),
because a worker that leaves with 0 completes its index for good.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from job.errors import HeldError
from job.ledger.accounts import NOTHING, Cost, cost_of, cost_of_slot
from job.ledger.ledger import Ledger
from job.ledger.slot import Slot
from job.settings import Settings
from job.trial.end import median_gpu_seconds
from job.trial.slots import slot_name


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
    settings: Settings, ledger: Ledger, numbers: list[int]
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
        reached = budget_reached(settings, ledger)
    except HeldError as error:
        if not drawn:
            raise
        reached = str(error)
    return (numbers, None) if reached is None else (drawn, reached)


def budget_reached(settings: Settings, ledger: Ledger, *, held: int | None = None) -> str | None:
    """Say which of the sweep's budgets has no room for another trial; None if all have.

    `held` is the slot whose lease the asking worker holds. Raises `HeldError` where it depends on
    the length of a trial, and none has ended yet.
    """
    if not _is_limited(settings):
        return None
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
    if any(budget.bound for budget in reached):
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
