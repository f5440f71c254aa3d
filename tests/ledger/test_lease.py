"""Leases: one holder at a time, without comparing clocks. `pytest tests/ledger/test_lease.py`"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from job.errors import PreemptedError, StoreError
from job.ledger.lease import HeldLease, acquire
from job.ledger.ledger import Ledger
from job.store.local import LocalStore
from tests.ledger.documents import make_result

SECONDS = 120.0


class World:
    """A clock that moves only when somebody waits; others act while we wait."""

    def __init__(self, folder: Path) -> None:
        self.ledger = Ledger(LocalStore(folder), "card")
        self.now = 1000.0
        self.meanwhile: Callable[[], None] = lambda: None

    def clock(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        assert self.now < 1e5, "waits for ever"
        self.now += seconds
        self.meanwhile()

    def acquire(self, *slots: int) -> HeldLease | None:
        return acquire(
            self.ledger,
            slots or (0,),
            lease_seconds=SECONDS,
            should_stop=lambda: None,
            wait=self.wait,
            clock=self.clock,
        )

    def take(self, *slots: int) -> HeldLease:
        lease = self.acquire(*slots)
        assert lease is not None
        return lease


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_an_empty_slot_is_taken_at_once(world: World) -> None:
    assert world.take().epoch == 1
    assert world.now == 1000


def test_a_released_lease_is_taken_at_once_under_the_next_epoch(world: World) -> None:
    first = world.take()
    first.release()
    assert world.take().epoch == 2
    assert world.now == 1000


def test_a_silent_lease_is_broken_after_the_lease_time_and_not_before(world: World) -> None:
    world.take()
    assert world.take().epoch == 2
    assert SECONDS <= world.now - 1000 < SECONDS * 1.2


def test_a_lease_that_is_renewed_is_never_broken(world: World) -> None:
    holder = world.take()
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1
        if beats % 6 == 0:  # every 36 s of 120
            holder.renew()

    world.meanwhile = beat
    with pytest.raises(PreemptedError, match="another attempt is at work"):
        world.acquire()
    holder.renew()
    assert not holder.lost


def test_the_old_holder_learns_that_it_lost_and_touches_nothing(world: World) -> None:
    frozen = world.take()
    newer = world.take()
    for act in (frozen.renew, frozen.ensure_held):
        world.now += SECONDS
        with pytest.raises(PreemptedError, match="a newer attempt holds it"):
            act()
    frozen.release()
    newer.renew()
    stored = world.ledger.slot(0).lease()
    assert stored is not None
    assert stored.lease.owner == newer.record.owner


def test_a_stale_lease_must_be_renewed_before_anything_is_published(world: World) -> None:
    lease = world.take()
    before = lease.record.beat
    lease.ensure_held()
    assert lease.record.beat == before, "a fresh one costs no request"
    world.now += SECONDS / 2
    lease.ensure_held()
    assert lease.record.beat == before + 1


def test_a_renewal_whose_answer_was_lost_is_still_ours(world: World) -> None:
    lease = world.take()
    store = world.ledger.store
    real = store.put_if_version

    def applied_but_failed(key: str, data: bytes, version: str) -> bool:
        real(key, data, version)
        raise StoreError("connection reset")

    store.put_if_version = applied_but_failed  # type: ignore[method-assign]
    with pytest.raises(StoreError):
        lease.renew(fruitless=1)
    store.put_if_version = real  # type: ignore[method-assign]
    lease.renew()
    assert not lease.lost
    assert (lease.record.epoch, lease.record.fruitless) == (1, 1)


def test_without_an_index_the_first_free_slot_is_taken(world: World) -> None:
    world.take(0)
    world.ledger.slot(1).commit(make_result(world.ledger.slot(1).folder))
    world.ledger.slot(2).give_up("no progress")
    lease = world.take(0, 1, 2, 3)
    assert lease.slot.number == 3
    assert world.now == 1000, "no waiting while a slot is free"


def test_a_slot_committed_while_we_wait_leaves_nothing_to_do(world: World) -> None:
    world.take(0)
    world.meanwhile = lambda: (
        world.ledger.slot(0).commit(make_result("sweeps/card/slots/0000")) and None
    )
    assert world.acquire(0) is None


def test_gpu_seconds_of_all_attempts_are_carried_on(world: World) -> None:
    for seconds in (10.0, 20.0):
        lease = world.take()
        lease.report(gpu_seconds=seconds)
        lease.renew()  # then it dies
    assert world.take().record.gpu_seconds_before == 30.0


def test_attempts_without_progress_are_counted_and_progress_forgets_them(world: World) -> None:
    def attempt(**progress: float) -> tuple[int, int]:
        lease = world.take()
        lease.report(patience_seconds=600, **progress)
        lease.release()
        return lease.record.fruitless, lease.record.startless

    in_vain = {"first_step": 5, "step": 40, "trained_seconds": 700}
    attempt(first_step=0)  # never finished a step
    assert attempt(first_step=0) == (0, 1)
    assert attempt(**in_vain) == (0, 2)
    assert attempt(**in_vain) == (1, 0)
    assert attempt(**in_vain | {"trained_seconds": 90}) == (2, 0), "killed early: not its fault"
    assert attempt(**in_vain | {"published_step": 30}) == (2, 0)
    assert attempt() == (0, 0)


def test_the_background_thread_renews_and_stops(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "card")
    lease = acquire(ledger, [0], lease_seconds=0.15, should_stop=lambda: None)
    assert lease is not None
    with lease, pytest.raises(PreemptedError, match="another attempt is at work"):
        acquire(ledger, [0], lease_seconds=0.15, should_stop=lambda: None)
    other = acquire(ledger, [0], lease_seconds=60, should_stop=lambda: None)
    assert other is not None
    assert other.epoch == 2
