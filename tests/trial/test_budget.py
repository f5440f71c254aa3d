"""The budgets that keep a sweep from beginning another trial, over prices that differ by place.

`pytest tests/trial/test_budget.py`
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from job.errors import HeldError
from job.ledger.accounts import cost_of_slot
from job.ledger.lease import HeldLease, acquire
from job.ledger.ledger import Ledger
from job.ledger.records import AttemptProgress
from job.ledger.redo import exclude, redo
from job.ledger.watch import LeaseWatch
from job.report.costs import by_place, cost_lines, wasted_by_cause
from job.report.gain import outlook_of
from job.report.overview import read_overview
from job.settings import Settings
from job.store.base import Stored
from job.store.local import LocalStore
from job.trial.budget import Looks, affordable, budget_reached, rooms
from job.trial.slots import open_slots
from tests.ledger.documents import make_identity, make_result, make_spec
from tests.workers import make_inputs, start_worker, wait_for

PRICES = {"lab": 0.05, "spot": 0.16, "on-demand": 0.55}  # dollars an hour, by place
TRIAL_HOURS = (2.0, 3.0)
LOAD_HOURS = 0.2
NUM_SLOTS = 24


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
    return lease


def _begin(ledger: Ledger, slots: list[int], place: str | None, price: float | None) -> HeldLease:
    lease = _take(ledger, slots, place, price)
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


class _Worker(NamedTuple):
    """What a worker does next; without a lease it looks whether to load a base."""

    place: str
    lease: HeldLease | None = None
    hours: float = 0.0  # that its trial takes, and
    code: int = 0  # how it ends


class _Sweep:
    """Workers at places of different prices, in simulated hours, until the budget lets none begin.

    They start at once and look at once: when they come, after the base is loaded and the lease
    taken, and again later where the question was put off.
    """

    def __init__(self, ledger: Ledger, settings: Settings, seed: int) -> None:
        self._ledger = ledger
        self._settings = {
            place: settings.model_copy(update={"gpu_hourly_usd": price})
            for place, price in PRICES.items()
        }
        self._random = random.Random(seed)
        self._order = itertools.count()
        self._events: list[tuple[float, int, str, _Worker]] = []  # hour, order, what, by whom
        self._began: dict[int, tuple[float, HeldLease]] = {}  # trials at work, by slot
        self._hours: dict[int, float] = {}  # of trials that were taken away: what they take in all
        self._spent_hours: dict[int, float] = {}
        self.put_off = self.taken_away = 0

    def run(self, places: list[str]) -> None:
        for place in places:
            self._at(0.0, "come", _Worker(place))
        while self._events:
            now, _, what, worker = heapq.heappop(self._events)
            for began, lease in self._began.values() if what in ("come", "draw") else ():
                lease.report(gpu_seconds=3600 * (now - began))
                lease.renew()
            try:
                getattr(self, f"_{what}")(now, worker)
            except HeldError:
                self.put_off += 1
                if worker.lease is not None:
                    worker.lease.end(75, "put off")
                self._at(now + 0.25, "come", _Worker(worker.place))

    def _at(self, hour: float, what: str, worker: _Worker) -> None:
        heapq.heappush(self._events, (hour, next(self._order), what, worker))

    def _come(self, now: float, worker: _Worker) -> None:
        slots, _ = affordable(self._settings[worker.place], self._ledger, self._free())
        if slots:
            self._at(now + LOAD_HOURS, "take", worker)

    def _take(self, now: float, worker: _Worker) -> None:
        lease = _take(self._ledger, self._free()[:1], worker.place, PRICES[worker.place])
        self._at(now + 0.01, "draw", worker._replace(lease=lease))

    def _draw(self, now: float, worker: _Worker) -> None:
        assert worker.lease is not None
        slot = worker.lease.slot
        if slot.spec() is None:
            settings = self._settings[worker.place]
            if budget_reached(settings, self._ledger, held=slot.number) is not None:
                worker.lease.end(0, "nothing to do")
                return
            slot.specify(make_spec())
        hours = self._hours.pop(slot.number, None)
        if hours is None:
            hours = self._random.uniform(*TRIAL_HOURS)
            if self._random.random() < 0.3:  # taken away half-way, nothing saved: paid for twice
                self._hours[slot.number] = hours
                self.taken_away += 1
                worker, hours = worker._replace(code=75), hours / 2
        self._began[slot.number] = now, worker.lease
        self._at(now + hours, "end", worker._replace(hours=hours))

    def _end(self, now: float, worker: _Worker) -> None:
        assert worker.lease is not None
        number = worker.lease.slot.number
        del self._began[number]
        before = self._spent_hours.get(number, 0.0)
        _end(worker.lease, worker.hours, worker.code, earlier_hours=before)
        self._spent_hours[number] = before + worker.hours
        self._at(now, "come", _Worker(worker.place))

    def _free(self) -> list[int]:
        """The open slots that nobody is at, those first that were begun."""
        numbers = open_slots(self._ledger, NUM_SLOTS)
        leases = {number: self._ledger.slot(number).lease() for number in numbers}
        free = [n for n, stored in leases.items() if not (stored and stored.lease.is_held)]
        return sorted(free, key=lambda number: number not in self._hours)


@pytest.mark.parametrize("limit_in_trials", [1.5, 5])
@pytest.mark.parametrize(
    "places",
    [["spot"], ["on-demand", "lab"], ["lab", "spot", "on-demand", "lab"], ["on-demand"] * 4],
    ids=" ".join,
)
def test_a_sweep_over_three_prices_ends_within_a_trials_price_of_its_budget(
    tmp_path: Path, places: list[str], limit_in_trials: float
) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    dearest = TRIAL_HOURS[1] * max(PRICES[place] for place in places)
    limit = limit_in_trials * dearest
    settings = _settings(num_trials=NUM_SLOTS, sweep_budget_usd=limit, gpu_hourly_usd=0)
    sweep = _Sweep(ledger, settings, seed=1)
    sweep.run(places)
    spent = sum(cost_of_slot(ledger, n).dollars(None) for n in range(NUM_SLOTS))
    assert abs(spent - limit) < dearest, spent
    overview = read_overview(ledger, NUM_SLOTS)
    assert sum(by_place(overview, None).values()) == pytest.approx(spent)
    if sweep.taken_away:
        assert wasted_by_cause(overview, None)["preempted"] > 0, "wasted attempts are counted"
    may_wait = len(places) > 1 and limit_in_trials < len(places)
    assert (sweep.put_off > 0) <= may_wait, "put off only where those at work may take it all"


def test_the_budget_counts_what_running_trials_and_another_one_will_cost(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    _end(_begin(ledger, [0], "a", 0.5), 2.0, 0)  # $1
    running = _begin(ledger, [1], "b", 0.25)
    running.report(gpu_seconds=3600.0)
    running.renew()  # $0.25, and another hour to go: $0.25; another trial here is $1
    enough = _settings(sweep_budget_usd=2.5, gpu_hourly_usd=0.5)
    assert budget_reached(enough, ledger) is None
    said = budget_reached(_settings(sweep_budget_usd=2.49, gpu_hourly_usd=0.5), ledger)
    assert said == (
        "$1.25 are spent, about $0.25 bound by the trials at work and about $1.00 needed for"
        " another, JOB_SWEEP_BUDGET_USD is 2.49"
    )
    cheaper = _settings(sweep_budget_usd=2.49, gpu_hourly_usd=0.4)
    assert budget_reached(cheaper, ledger) is None, "at a cheaper place there is room for one"


def test_the_room_in_a_budget_is_as_many_trials_as_would_begin(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    given: dict[str, Any] = {"sweep_budget_usd": 1.0, "sweep_budget_gpu_hours": 40.0}
    settings = _settings(gpu_hourly_usd=0.05, num_trials=6, **given)
    assert rooms(_settings(), ledger, shortest=1, longest=2) == []

    def found(shortest: float, longest: float) -> list[tuple[int, int]]:
        told = rooms(settings, ledger, shortest=3600 * shortest, longest=3600 * longest)
        assert [room.variable for room in told] == [
            "JOB_SWEEP_BUDGET_GPU_HOURS", "JOB_SWEEP_BUDGET_USD",
        ]  # fmt: skip
        return [(room.least, room.most) for room in told]

    assert found(3, 4) == [(10, 13), (5, 6)]
    assert found(10, 50) == [(1, 4), (1, 2)], "a first trial always begins"
    for slot, hours in ((0, 6.0), (1, 6.0)):
        _end(_begin(ledger, [slot], "lab", 0.05), hours, code=0)
    assert found(1, 2) == [(4, 4), (1, 1)], (
        "$0.60 are spent; a trial took 6 h, whatever was foretold"
    )
    assert [room.spent for room in rooms(settings, ledger, shortest=1, longest=1)] == [
        "12.0 GPU-hours", "$0.60",
    ]  # fmt: skip
    _begin(ledger, [2], "lab", 0.05).end(75, "scripted")
    assert found(1, 2) == [(3, 3), (0, 0)], "what is drawn is ended, and binds 6 h"
    settings = settings.model_copy(update={"sweep_budget_usd": 0.91})
    assert found(1, 2)[1] == (0, 0)
    reached = budget_reached(settings, ledger)
    assert reached is not None
    assert "JOB_SWEEP_BUDGET_USD is 0.91" in reached


def test_before_the_first_commit_the_question_is_put_off(tmp_path: Path) -> None:
    """Nobody knows what a trial takes, and a worker that left with 0 would not come again."""
    ledger = Ledger(LocalStore(tmp_path), "s")
    one = _settings(sweep_budget_usd=1.0, gpu_hourly_usd=0.5)  # a trial may take 3 h: $1.50
    assert affordable(one, ledger, [0, 1]) == ([0, 1], None), "a first trial always begins"
    running = _begin(ledger, [0], "a", 0.5)
    said = (
        r"^sweep s, all 200 slots: \$0.00 are spent, up to \$1.50 bound by the trials at work and"
        r" up to \$1.50 needed for another, JOB_SWEEP_BUDGET_USD is 1: put off until a first trial"
        " has ended"
    )
    with pytest.raises(HeldError, match=said):
        affordable(one, ledger, [1])
    drawn, reached = affordable(one, ledger, [0, 1])
    assert drawn == [0], "what is begun may be ended"
    assert reached is not None
    two = _settings(sweep_budget_usd=3.0, gpu_hourly_usd=0.5)
    assert affordable(two, ledger, [1]) == ([1], None), "both fit, whatever they take"
    running.report(gpu_seconds=2 * 3600.0)
    running.renew()
    assert affordable(one, ledger, [1])[1] == "$1.00 are spent, JOB_SWEEP_BUDGET_USD is 1"
    hours = _settings(sweep_budget_gpu_hours=5)
    with pytest.raises(HeldError, match="2.0 GPU-hours are spent, up to 1.0 GPU-hours bound"):
        affordable(hours, ledger, [1])


@pytest.mark.slow
@pytest.mark.parametrize(("index", "is_drawn"), [(None, False), (1, False), (1, True)])
def test_a_worker_that_was_killed_puts_nobody_off_for_ever(
    tmp_path: Path, index: int | None, is_drawn: bool
) -> None:
    """A lone `job` takes the first slot that is free, a pod its own: neither takes the dead one's.

    An index whose tries are used up never comes again, and leaves no word in the bucket.
    """
    limits = {"num_trials": 2, "trial_budget_hours": 3, "sweep_budget_gpu_hours": 5}
    given = make_inputs(tmp_path) | limits | {"lease_seconds": 1, "completion_index": index}
    ledger = Ledger(LocalStore(tmp_path / "out"), "s")
    (_begin if is_drawn else _take)(ledger, [0], "gone", None)
    assert wait_for(start_worker(given, lambda: ledger.store)) == 0
    assert ledger.slot(1).state() == "committed"


@pytest.mark.parametrize(("code", "is_put_off"), [(75, True), (70, False), (72, False)])
def test_a_trial_that_failed_puts_nobody_off(tmp_path: Path, code: int, is_put_off: bool) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    _end(_begin(ledger, [0], "a", None), 0.5, code)
    settings = _settings(sweep_budget_gpu_hours=5)
    with pytest.raises(HeldError) if is_put_off else contextlib.nullcontext():
        assert affordable(settings, ledger, [1]) == ([1], None)


@pytest.mark.parametrize("is_drawn", [False, True])
def test_a_worker_that_is_alive_puts_off_once_it_is_seen_to_be(
    tmp_path: Path, is_drawn: bool
) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    lower = (_begin if is_drawn else _take)(ledger, [0], "a", None)
    own = _take(ledger, [1], "a", None)
    waits = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        lower.renew()

    looks = Looks(LeaseWatch(60), lambda: None, wait)
    settings = _settings(num_trials=2, sweep_budget_gpu_hours=5)
    with pytest.raises(HeldError):
        budget_reached(settings, ledger, held=own.slot.number, looks=looks)
    assert waits == [3.0, 3.0]


@pytest.mark.parametrize("name", ["spec.json", "lease.json", "result.json"])
def test_a_damaged_slot_is_its_own_workers_and_ends_no_other(tmp_path: Path, name: str) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    one = _settings(sweep_budget_usd=1.0, gpu_hourly_usd=0.5)
    _end(_begin(ledger, [0], "lab", 0.5), 1.0, 0)
    _end(_begin(ledger, [1], "lab", 0.5), 0.5, 75)
    (tmp_path / ledger.slot(1).key(name)).write_text("{")
    assert affordable(one, ledger, [1, 2])[0] == [1]
    nine = one.model_copy(update={"sweep_budget_usd": 9.0})
    assert affordable(nine, ledger, [1, 2]) == ([1, 2], None)


def test_a_trial_that_is_begun_again_takes_its_whole_price_again(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    ledger.open_sweep(make_identity())
    for number in range(2):
        _end(_begin(ledger, [number], "a", 0.5), 2.0, 0)  # $1
    redo(ledger.slot(0))
    _begin(ledger, [0], "a", 0.5)
    said = "$2.00 are spent, about $1.00 bound by the trials at work and about $1.00 needed"
    settings = _settings(sweep_budget_usd=3.9, gpu_hourly_usd=0.5)
    assert said in str(budget_reached(settings, ledger))


def test_of_workers_that_loaded_at_once_those_at_higher_slots_stand_back(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    _end(_begin(ledger, [0], "a", 0.5), 2.0, 0)  # $1 is spent
    settings = _settings(sweep_budget_usd=2.5, gpu_hourly_usd=0.5)
    for number in (1, 2):
        _take(ledger, [number], "a", 0.5)
    assert budget_reached(settings, ledger, held=1) is None
    said = "$1.00 are spent, about $1.00 bound by the trials at work and about $1.00 needed"
    assert said in str(budget_reached(settings, ledger, held=2))


@pytest.mark.parametrize("how", ["excluded", "given up", "left undrawn"])
def test_a_slot_that_nobody_is_at_any_more_binds_nothing(tmp_path: Path, how: str) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    _end(_begin(ledger, [0], "a", 0.5), 2.0, 0)  # $1 is spent, and another is $1
    lease = (_take if how == "left undrawn" else _begin)(ledger, [1], "a", 0.5)
    settings = _settings(sweep_budget_usd=2.5, gpu_hourly_usd=0.5)
    assert budget_reached(settings, ledger, held=2) is not None
    if how == "excluded":
        exclude(lease.slot, "wrong rows")
    elif how == "given up":
        lease.slot.give_up("no progress")
    else:
        lease.end(0, "no new trial is begun")
    assert budget_reached(settings, ledger, held=2) is None


def test_an_excluded_trial_was_paid_for_and_says_nothing_of_the_next(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    for number, hours in enumerate((1.0, 1.0, 9.0, 9.0, 9.0)):
        lease = _begin(ledger, [number], "a", 0.5)
        _end(lease, hours, 0)
        if hours == 9:
            exclude(lease.slot, "wrong rows")
    said = budget_reached(_settings(sweep_budget_usd=14.9, gpu_hourly_usd=0.5), ledger)
    assert said is not None
    assert said.startswith("$14.50 are spent and about $0.50 needed for another")


def test_attempts_without_a_price_count_at_the_readers(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    _end(_begin(ledger, [0], "old", None), 1.0, 75)
    _end(_begin(ledger, [0], "new", 0.5), 2.0, 0, earlier_hours=1.0)
    cost = cost_of_slot(ledger, 0)
    assert (cost.gpu_seconds, cost.usd, cost.unpriced_seconds) == (3 * 3600, 1.0, 3600)
    assert cost.dollars(0.3) == pytest.approx(1.3)
    # $1.20 or $1.30 are spent, and another takes the three hours that this one took.
    assert budget_reached(_settings(sweep_budget_usd=1.8, gpu_hourly_usd=0.2), ledger) is None
    assert budget_reached(_settings(sweep_budget_usd=2.19, gpu_hourly_usd=0.3), ledger) is not None
    assert budget_reached(_settings(sweep_budget_usd=2.21, gpu_hourly_usd=0.3), ledger) is None
    lines = cost_lines(read_overview(ledger, 1), None, 2.0)
    assert lines[0] == (
        "spent: $1.00 and 60 min of GPU without a price of $2.00 (JOB_SWEEP_BUDGET_USD):"
        " $1.00 on new"
    )


def test_what_was_paid_for_before_a_redo_is_waste_of_its_own(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    ledger.open_sweep(make_identity())
    _end(_begin(ledger, [0], "a", 0.5), 2.0, 0)
    redo(ledger.slot(0))
    _end(_begin(ledger, [0], "b", 0.2), 1.0, 74)
    overview = read_overview(ledger, 1)
    assert cost_lines(overview, None, None) == [
        "spent: $1.20: $1.00 on a, $0.20 on b",
        "wasted: $1.20 of it: $1.00 begun again, $0.20 outages and hangs",
    ]


class _EndsMeanwhile(LocalStore):
    """A folder in which the trial at slot 0 ends while the slot is read for a budget."""

    end: Callable[[], object] | None = None

    def get(self, key: str) -> Stored | None:
        found = super().get(key)
        if self.end is not None and key.endswith("0000/spec.json"):
            end, self.end = self.end, None
            end()
        return found


def test_a_trial_that_ends_while_the_slots_are_read_is_counted_whole(tmp_path: Path) -> None:
    store, others = _EndsMeanwhile(tmp_path), Ledger(LocalStore(tmp_path), "s")
    running = _begin(others, [0], "a", 0.5)  # its lease tells of no GPU time yet
    store.end = lambda: _end(running, 2.0, 0)
    said = budget_reached(_settings(sweep_budget_usd=1.5, gpu_hourly_usd=0.5), Ledger(store, "s"))
    assert said is not None
    assert said.startswith("$1.00 are spent and about $1.00 needed for another")


def test_hours_are_counted_without_a_price(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    _end(_begin(ledger, [0], "a", None), 2.0, 0)
    said = budget_reached(_settings(sweep_budget_gpu_hours=2), ledger)
    assert said == "2.0 GPU-hours are spent, JOB_SWEEP_BUDGET_GPU_HOURS is 2"
    assert cost_lines(read_overview(ledger, 1), None, None) == []


def test_a_small_budget_is_told_in_digits_that_say_something(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    _end(_begin(ledger, [0], "a", 0.5), 0.006, 0)
    said = budget_reached(_settings(sweep_budget_usd=0.001, gpu_hourly_usd=0.5), ledger)
    assert said == "$0.003 are spent, JOB_SWEEP_BUDGET_USD is 0.001"


def test_a_trial_has_its_price_from_the_accounts_but_not_from_before_a_redo(
    tmp_path: Path,
) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    ledger.open_sweep(make_identity())
    _end(_begin(ledger, [0], "a", 1000.0), 2.0, 0)
    assert outlook_of(read_overview(ledger, 1)).trial_usd(5.0) == 2000
    redo(ledger.slot(0))
    assert outlook_of(read_overview(ledger, 1)).trial_usd(5.0) is None, "none is trained"
    _end(_begin(ledger, [0], "b", 0.2), 1.0, 75)
    _end(_begin(ledger, [0], "c", 0.4), 2.0, 0, earlier_hours=1.0)
    assert outlook_of(read_overview(ledger, 1)).trial_usd(5.0) == 1


def test_many_places_are_summed_up(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    for number in range(9):
        _end(_begin(ledger, [number], f"pod-{number}", 1.0 + number), 1.0, 0)
    (line,) = cost_lines(read_overview(ledger, 9), None, None)
    assert line.startswith("spent: $45.00: $9.00 on pod-8, $8.00 on pod-7, ")
    assert line.endswith(", $4.00 on pod-3, $6.00 on 3 others")
