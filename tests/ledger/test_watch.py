"""A lease is looked at before anything is loaded. `pytest tests/ledger/test_watch.py`"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from job.errors import PreemptedError, SlotError
from job.ledger.lease import HeldLease, acquire
from job.ledger.ledger import Ledger
from job.ledger.redo import redo
from job.ledger.watch import LeaseWatch, wait_for_a_free_slot
from job.process.stop import Stop
from job.process.watchdog import Watchdog
from job.settings import Settings
from job.store.local import LocalStore
from job.trial.run import run_trial_on
from tests.fake_training import FAKE_TRAINING
from tests.ledger.documents import make_result, make_spec

SECONDS = 120.0
LEASE = 1.5  # of the one test on a real clock: a busy machine may delay a renewal by 0.25 s


class World:
    """A clock that moves when somebody waits; `beat` happens at every wait."""

    def __init__(self, folder: Path) -> None:
        self.ledger = Ledger(LocalStore(folder), "card")
        self.now = 1000.0
        self.beat: Callable[[], object] = lambda: None
        self.watch = LeaseWatch(SECONDS, clock=lambda: self.now)

    def wait(self, seconds: float) -> None:
        assert self.now < 1e5, "waits for ever"
        self.now += seconds
        self.beat()

    def look(self, *slots: int) -> bool:
        return wait_for_a_free_slot(
            self.ledger, slots or (0,), self.watch, should_stop=lambda: None, wait=self.wait
        )

    def acquire(self, *slots: int, watch: LeaseWatch | None = None) -> HeldLease:
        lease = acquire(
            self.ledger,
            slots or (0,),
            lease_seconds=SECONDS,
            should_stop=lambda: None,
            wait=self.wait,
            clock=lambda: self.now,
            watch=watch,
        )
        assert lease is not None
        return lease


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def _epoch(ledger: Ledger) -> int:
    stored = ledger.slot(0).lease()
    return 0 if stored is None else stored.lease.epoch


def test_a_look_waits_for_nothing_that_is_free_and_takes_nothing(world: World) -> None:
    assert world.look()
    assert _epoch(world.ledger) == 0
    world.acquire().release()
    assert world.look()
    assert _epoch(world.ledger) == 1
    world.acquire(0)
    assert world.look(0, 1), "another slot is free"
    assert world.now == 1000


def test_a_look_at_a_lease_that_is_renewed_ends_within_a_leases_time(world: World) -> None:
    holder = world.acquire()
    waits = 0

    def beat() -> None:
        nonlocal waits
        waits += 1
        if waits % 7 == 0:  # every 42 s of 120
            holder.renew()

    world.beat = beat
    with pytest.raises(PreemptedError, match="slot 0: another attempt is at work on it"):
        world.look()
    assert world.now - 1000 < SECONDS


def test_a_slot_committed_during_the_look_is_nobodys_work(world: World) -> None:
    world.acquire()
    world.beat = lambda: world.ledger.slot(0).commit(make_result("sweeps/card/slots/0000"))
    assert not world.look()


def test_a_damaged_lease_is_passed_over_while_there_are_other_slots(world: World) -> None:
    world.ledger.store.put_if_absent(world.ledger.slot(0).key("lease.json"), b"not JSON")
    with pytest.raises(SlotError, match="not JSON"):
        world.look(0)
    assert world.look(0, 1)
    assert world.acquire(0, 1).slot.number == 1
    with pytest.raises(SlotError):
        world.acquire(0)


@pytest.mark.parametrize("load", [0.0, 60.0])
def test_silence_before_the_load_counts_after_it(world: World, load: float) -> None:
    world.acquire()  # and then it was killed
    assert world.look()
    assert SECONDS / 2 <= world.now - 1000 < 0.6 * SECONDS, "probably dead"
    world.now += load
    assert world.acquire(watch=world.watch).epoch == 2
    assert SECONDS <= world.now - 1000 < 1.2 * SECONDS, "the whole silence, and no more"


def test_a_holder_that_wakes_during_the_load_keeps_its_slot(world: World) -> None:
    frozen = world.acquire()
    assert world.look()
    frozen.renew()
    woken = world.now
    assert world.acquire(watch=world.watch).epoch == 2
    assert world.now - woken >= SECONDS, "silent for a whole lease's time again"


def test_a_slot_begun_again_during_the_load_is_watched_afresh(world: World) -> None:
    """The new lease's version equals that of the old one, which stood still for long."""
    world.ledger.slot(0).specify(make_spec())
    world.acquire()
    assert world.look()
    redo(world.ledger.slot(0))
    world.acquire()
    begun = world.now
    world.acquire(watch=world.watch)
    assert world.now - begun >= SECONDS


def test_a_held_slot_costs_no_device_no_rows_and_no_base(tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("touched though the slot is held")

    training = replace(FAKE_TRAINING, open_device=fail, load_base=fail)
    settings = Settings(
        dataset_uri="nowhere.jsonl", output_uri="out", work_dir=tmp_path / "work",
        completion_index=0, lease_seconds=LEASE,
    )  # fmt: skip
    store, stop = LocalStore(tmp_path / "out"), Stop(15)
    holder = acquire(Ledger(store, "card"), [0], lease_seconds=LEASE, should_stop=lambda: None)
    assert holder is not None
    with holder, pytest.raises(PreemptedError, match="another attempt is at work"):
        run_trial_on(store, settings, stop, training, Watchdog(stop, fail))
    with pytest.raises(AssertionError, match="touched"):  # free now
        run_trial_on(store, settings, stop, training, Watchdog(stop, fail))
