"""The budgets that keep a sweep from beginning another trial, over prices that differ by place.

`pytest tests/trial/test_budget.py`
"""

from __future__ import annotations

import heapq
import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from job.ledger.accounts import cost_of_slot
from job.ledger.lease import HeldLease, acquire
from job.ledger.ledger import Ledger
from job.ledger.records import AttemptProgress
from job.ledger.redo import redo
from job.report.costs import by_place, cost_lines, wasted_by_cause
from job.report.overview import read_overview
from job.settings import Settings
from job.store.local import LocalStore
from job.trial.slots import budget_spent, open_slots
from tests.ledger.documents import make_identity, make_result, make_spec

PRICES = {"lab": 0.05, "spot": 0.16, "on-demand": 0.55}  # dollars an hour, by place
TRIAL_HOURS = (2.0, 3.0)


def _settings(**given: Any) -> Settings:
    return Settings(dataset_uri="rows", output_uri="out", **{"num_trials": 200, **given})


def _take(ledger: Ledger, slots: list[int], place: str | None, price: float | None) -> HeldLease:
    opening = AttemptProgress(hourly_usd=price)
    lease = acquire(
        ledger, slots, lease_seconds=60, should_stop=lambda: None, wait=lambda _: None,
        opening=opening,
    )  # fmt: skip
    assert lease is not None
    lease.open_account()
    lease.report(node=place)
    lease.slot.specify(make_spec())
    return lease


def _end(lease: HeldLease, hours: float, code: int, *, earlier_hours: float = 0.0) -> None:
    """End an attempt that held a GPU for so long; with code 0 it commits its slot."""
    lease.report(gpu_seconds=3600 * hours)
    if code == 0:
        lease.report(useful_seconds=3600 * hours)
        in_all = 3600 * (hours + earlier_hours)
        lease.slot.commit(make_result(lease.slot.folder, gpu_seconds=in_all))
    lease.end(code, "scripted")


class _Sweep:
    """Workers at three places that take slots until the budget says no; time is simulated."""

    def __init__(self, ledger: Ledger, settings: Settings, seed: int) -> None:
        self._ledger, self._settings = ledger, settings
        self._random = random.Random(seed)
        self._order = itertools.count()
        self._left_hours: dict[int, float] = {}  # of trials that were taken away
        self._spent_hours: dict[int, float] = {}

    def run(self, num_workers: int) -> None:
        at_work: list[tuple[float, int, str, HeldLease, float, int]] = []
        places = list(itertools.islice(itertools.cycle(PRICES), num_workers))
        free = [(0.0, place) for place in places]
        while free or at_work:
            for now, place in free:
                if (begun := self._begin(place)) is not None:
                    lease, hours, code = begun
                    entry = (now + hours, next(self._order), place, lease, hours, code)
                    heapq.heappush(at_work, entry)
            if not at_work:
                return
            now, _, place, lease, hours, code = heapq.heappop(at_work)
            number = lease.slot.number
            before = self._spent_hours.get(number, 0.0)
            _end(lease, hours, code, earlier_hours=before)
            self._spent_hours[number] = before + hours
            if code != 0:  # nothing was saved
                self._left_hours[number] = 2 * hours
            free = [(now, place)]
            # What runs beside it has told its cost with its last renewal.
            for end, _, _, other, other_hours, _ in at_work:
                other.report(gpu_seconds=3600 * max(0.0, other_hours - (end - now)))
                other.renew()

    def _begin(self, place: str) -> tuple[HeldLease, float, int] | None:
        """Take a slot as a trial does; None where the budget lets no new one begin."""
        numbers = open_slots(self._ledger, self._settings.num_trials)
        waiting = [n for n in numbers if self._left_hours.get(n)]
        if waiting:
            hours = self._left_hours.pop(waiting[0])
            return _take(self._ledger, waiting[:1], place, PRICES[place]), hours, 0
        undrawn = [n for n in numbers if n not in self._spent_hours and not self._is_begun(n)]
        if not undrawn or budget_spent(self._settings, self._ledger) is not None:
            return None
        hours = self._random.uniform(*TRIAL_HOURS)
        lease = _take(self._ledger, undrawn[:1], place, PRICES[place])
        if self._random.random() < 0.3:  # taken away in the middle, nothing saved: paid for twice
            return lease, hours / 2, 75
        return lease, hours, 0

    def _is_begun(self, number: int) -> bool:
        return self._ledger.slot(number).spec() is not None


@pytest.mark.parametrize(("num_workers", "seed"), [(1, 0), (3, 0), (3, 1), (6, 2)])
def test_a_sweep_over_three_prices_ends_within_a_trials_price_of_its_budget(
    tmp_path: Path, num_workers: int, seed: int
) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    settings = _settings(num_trials=60, sweep_budget_usd=8.0, gpu_hourly_usd=0.1)
    _Sweep(ledger, settings, seed).run(num_workers)
    spent = sum(cost_of_slot(ledger, n).dollars(None) for n in range(60))
    dearest = TRIAL_HOURS[1] * max(PRICES.values())
    assert abs(spent - 8.0) < dearest, spent
    overview = read_overview(ledger, 60)
    assert sum(by_place(overview, None).values()) == pytest.approx(spent)
    assert wasted_by_cause(overview, None).get("preempted", 0) > 0, "wasted attempts are counted"


def test_the_budget_counts_running_trials_as_what_they_will_cost(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    _end(_take(ledger, [0], "a", 0.5), 2.0, 0)  # $1
    running = _take(ledger, [1], "b", 0.25)
    running.report(gpu_seconds=3600.0)
    running.renew()  # $0.25, and another hour to go: $0.25
    enough = _settings(sweep_budget_usd=1.51, gpu_hourly_usd=9)
    assert budget_spent(enough, ledger) is None
    said = budget_spent(_settings(sweep_budget_usd=1.5, gpu_hourly_usd=9), ledger)
    assert said == (
        "$1.25 are spent and about $0.25 bound by the trials at work, JOB_SWEEP_BUDGET_USD is 1.5"
    )


def test_attempts_without_a_price_count_at_the_readers(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    _end(_take(ledger, [0], "old", None), 1.0, 75)
    _end(_take(ledger, [0], "new", 0.5), 2.0, 0, earlier_hours=1.0)
    cost = cost_of_slot(ledger, 0)
    assert (cost.gpu_seconds, cost.usd, cost.unpriced_seconds) == (3 * 3600, 1.0, 3600)
    assert cost.dollars(0.3) == pytest.approx(1.3)
    assert budget_spent(_settings(sweep_budget_usd=1.3, gpu_hourly_usd=0.2), ledger) is None
    assert budget_spent(_settings(sweep_budget_usd=1.3, gpu_hourly_usd=0.3), ledger) is not None
    lines = cost_lines(read_overview(ledger, 1), None, 2.0)
    assert lines[0] == (
        "spent: $1.00 and 60 min of GPU without a price of $2.00 (JOB_SWEEP_BUDGET_USD):"
        " $1.00 on new"
    )


def test_what_was_paid_for_before_a_redo_is_waste_of_its_own(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    ledger.open_sweep(make_identity())
    _end(_take(ledger, [0], "a", 0.5), 2.0, 0)
    redo(ledger.slot(0))
    _end(_take(ledger, [0], "b", 0.2), 1.0, 74)
    overview = read_overview(ledger, 1)
    assert cost_lines(overview, None, None) == [
        "spent: $1.20: $1.00 on a, $0.20 on b",
        "wasted: $1.20 of it: $1.00 begun again, $0.20 outages and hangs",
    ]


def test_hours_are_counted_without_a_price(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    _end(_take(ledger, [0], "a", None), 2.0, 0)
    said = budget_spent(_settings(sweep_budget_gpu_hours=2), ledger)
    assert said == "2.0 GPU-hours are spent, JOB_SWEEP_BUDGET_GPU_HOURS is 2"
    assert cost_lines(read_overview(ledger, 1), None, None) == []


def test_many_places_are_summed_up(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    for number in range(9):
        _end(_take(ledger, [number], f"pod-{number}", 1.0 + number), 1.0, 0)
    (line,) = cost_lines(read_overview(ledger, 9), None, None)
    assert line.startswith("spent: $45.00: $9.00 on pod-8, $8.00 on pod-7, ")
    assert line.endswith(", $4.00 on pod-3, $6.00 on 3 others")
