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
from functools import partial
from typing import NamedTuple

from job.errors import ExitCode, HeldError, SlotError
from job.ledger.accounts import NOTHING, Cost, cost_of, dollars
from job.ledger.ledger import Ledger
from job.ledger.records import Result
from job.ledger.slot import Slot, StoredLease
from job.ledger.watch import LeaseWatch
from job.log import log
from job.settings import Settings
from job.trial.end import median_gpu_seconds
from job.trial.slots import drawn_of, slot_name


@dataclass(frozen=True)
class Looks:
    """How long others' leases are looked at before their workers count as alive or as gone."""

    watch: LeaseWatch
    should_stop: Callable[[], None]
    wait: Callable[[float], None]


class _Trial(NamedTuple):
    """A slot as one look found it."""

    slot: Slot
    result: Result | None = None  # where it counts: not of an excluded slot
    is_at_work: bool = False
    lease: StoredLease | None = None  # of a trial at work
    spent: Cost = NOTHING  # for all attempts at it
    spent_now: Cost = NOTHING  # for those since it was begun, or begun again


class _Budget(NamedTuple):
    """One of the sweep's limits and what counts towards it, all in the same unit."""

    variable: str
    limit: float
    in_words: Callable[[float], str]
    spent: float
    bound: float  # by the trials at work
    needed: float  # for another trial

    @property
    def is_spent(self) -> bool:
        return self.spent >= self.limit

    @property
    def is_reached(self) -> bool:
        return self.is_spent or self.spent + self.bound + self.needed > self.limit

    @property
    def room(self) -> int:
        """The number of trials that may still begin."""
        left = self.limit - self.spent - self.bound
        return max(0, int(left / self.needed + 1e-9))  # $1 of $0.20 each are 5, rounding or not

    def told(self, about: str) -> str:
        spent, bound, needed = map(self.in_words, (self.spent, self.bound, self.needed))
        words = f"{spent} are spent"
        if not self.is_spent:
            words += f", {about} {bound} bound by the trials at work" if self.bound else ""
            words += f" and {about} {needed} needed for another"
        return f"{words}, {self.variable} is {self.limit:g}"


@dataclass(frozen=True)
class Room:
    """How many more trials a budget of the sweep lets begin."""

    variable: str
    limit: float
    spent: str  # in words
    least: int
    most: int


def rooms(settings: Settings, ledger: Ledger, *, shortest: float, longest: float) -> list[Room]:
    """The room in each budget that is set, for trials that take so many GPU-seconds.

    Once a trial has ended its own time is believed, as it is where a budget is held.
    """
    if not _is_limited(settings):
        return []
    trials = _read_trials(settings, ledger, None)
    median_seconds = median_gpu_seconds(trial.result for trial in trials if trial.result)
    if median_seconds is not None:
        shortest = longest = median_seconds
    found = []
    ends = (_budgets(settings, trials, seconds) for seconds in (longest, shortest))
    for slow, fast in zip(*ends, strict=True):
        # A first trial always begins.
        least = int(median_seconds is None and not slow.bound and not slow.is_spent)
        few, many = (max(least, budget.room) for budget in (slow, fast))
        found.append(Room(slow.variable, slow.limit, slow.in_words(slow.spent), few, many))
    return found


def affordable(
    settings: Settings, ledger: Ledger, numbers: list[int], looks: Looks | None = None
) -> tuple[list[int], str | None]:
    """Those of the open slots that may be worked on, and which budget is reached for the others.

    What is drawn may always be ended. Called before anything is loaded; raises as `budget_reached`
    if no slot is drawn.
    """
    if not _is_limited(settings):
        return numbers, None
    drawn = drawn_of(ledger, numbers)
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
        trials = _read_trials(settings, ledger, held)
        # Asked first: who proves to be gone meanwhile is counted as such.
        unclear = looks is not None and any(_is_unclear(trial, looks.watch) for trial in trials)
        try:
            name = slot_name(settings, ledger.sweep)
            return _reached(settings, trials, looks.watch if looks else None, name=name)
        except HeldError:
            if looks is None or not unclear:
                raise
        looks.wait(looks.watch.lease_seconds / 20)
        looks.should_stop()
    return None


def _reached(
    settings: Settings, trials: Sequence[_Trial], watch: LeaseWatch | None, *, name: str
) -> str | None:
    median_seconds = median_gpu_seconds(trial.result for trial in trials if trial.result)
    expected = 3600 * settings.trial_budget_hours if median_seconds is None else median_seconds
    reached = [b for b in _budgets(settings, trials, expected) if b.is_reached]
    if not reached:
        return None
    if spent := next((budget for budget in reached if budget.is_spent), None):
        return spent.told("")
    if median_seconds is not None:
        return reached[0].told("about")
    if any(b.bound for b in reached) and any(_will_end(trial, watch) for trial in trials):
        raise HeldError(
            f"{name}: {reached[0].told('up to')}: put off until a first trial has ended"
        )
    return None  # a first trial always begins


def _is_limited(settings: Settings) -> bool:
    return settings.sweep_budget_gpu_hours is not None or settings.sweep_budget_usd is not None


def _budgets(
    settings: Settings, trials: Sequence[_Trial], expected_seconds: float
) -> Iterator[_Budget]:
    """The budgets that are set, if a trial takes so many GPU-seconds."""
    spent = sum((trial.spent for trial in trials), NOTHING)
    bound = sum((_left(trial, expected_seconds) for trial in trials if trial.is_at_work), NOTHING)
    another, price = Cost(expected_seconds, 0.0, expected_seconds), settings.gpu_hourly_usd
    if (hours := settings.sweep_budget_gpu_hours) is not None:
        told = (cost.gpu_seconds / 3600 for cost in (spent, bound, another))
        yield _Budget("JOB_SWEEP_BUDGET_GPU_HOURS", hours, "{:.1f} GPU-hours".format, *told)
    if (usd := settings.sweep_budget_usd) is not None:
        told = (cost.dollars(price) for cost in (spent, bound, another))
        yield _Budget("JOB_SWEEP_BUDGET_USD", usd, dollars, *told)


def _left(trial: _Trial, expected_seconds: float) -> Cost:
    """What a trial at work will still take if it takes so many GPU-seconds, at its own price."""
    price = trial.lease.lease.attempt.hourly_usd if trial.lease else None
    left = max(0.0, expected_seconds - trial.spent_now.gpu_seconds)
    return Cost(left, 0.0, left) if price is None else Cost(left, left / 3600 * price)


def _read_trials(settings: Settings, ledger: Ledger, held: int | None) -> list[_Trial]:
    """Read all slots at once: each budget, and who is waited for, is judged by the same moment."""
    trials = []
    read = partial(_read_trial, held=held)
    for number, found in ledger.read_slots(range(settings.num_trials), read):
        if isinstance(found, SlotError):
            log.warning("the sweep's budget does not count slot %d: %s", number, found)
        else:
            trials.append(found)
    return trials


def _read_trial(slot: Slot, held: int | None) -> _Trial:
    """What the slot says to the budgets; a damaged one was paid for, and binds nothing."""
    try:
        trial = _unpriced(slot, held)
    except SlotError as error:
        log.warning("not counted: %s", error)
        trial = _Trial(slot)
    # Read last: of a trial that ends meanwhile nothing is left out.
    spent_now = cost_of(slot)
    spent = sum(map(cost_of, slot.earlier()), spent_now)
    return trial._replace(spent=spent, spent_now=spent_now)


def _unpriced(slot: Slot, held: int | None) -> _Trial:
    """The slot's result where it counts, and whether somebody is at work on it.

    That is so if it is open and drawn; or will be drawn, by a worker that comes before the one that
    asks. Of workers that took leases at once each counts those at lower slots, so that not all of
    them begin, and not all of them leave. Raises a damaged slot's `SlotError`.
    """
    is_drawn = slot.spec() is not None
    if not is_drawn and (held is None or slot.number >= held):
        return _Trial(slot)
    if (result := slot.result()) is not None:
        counts = is_drawn and slot.exclusion() is None
        return _Trial(slot, result if counts else None)
    lease = slot.lease()
    is_begun = is_drawn or (lease is not None and lease.lease.is_held)
    is_at_work = is_begun and slot.failure() is None and slot.exclusion() is None
    return _Trial(slot, is_at_work=is_at_work, lease=lease)


def _will_end(trial: _Trial, watch: LeaseWatch | None) -> bool:
    """Whether the trial's worker is at work, as far as it was watched, or will come again."""
    if not trial.is_at_work or trial.lease is None:
        return False
    if not trial.lease.lease.is_held:
        return trial.lease.lease.attempt.exit_code == ExitCode.PREEMPTED
    return watch is None or not watch.is_free(trial.slot, trial.lease)


def _is_unclear(trial: _Trial, watch: LeaseWatch) -> bool:
    """Whether the trial's worker was seen neither to be alive nor to be gone."""
    if not trial.is_at_work or watch.is_free(trial.slot, trial.lease):
        return False
    return not watch.is_alive(trial.slot)
