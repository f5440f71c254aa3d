"""`LeaseWatch`: what this process has seen of other attempts' leases, on its own monotonic clock.

One serves a whole run: what it saw before the base was loaded still counts when a lease is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from job.errors import HeldError, SlotError
from job.ledger.ledger import Ledger
from job.ledger.slot import Slot, StoredLease
from job.log import log

LIVING = 2  # renewals seen, after which the holder counts as alive
# A share of the lease's time. A holder renews every third of it, so one that was silent for this
# share is probably dead, and the rest of the silence may pass while the base is loaded. Only the
# whole of it lets a lease be taken.
PROBABLY_DEAD = 0.5


@dataclass
class _Seen:
    """One lease as it was seen so far."""

    version: str
    since: float  # on the observer's clock
    renewals: int = 0


class LeaseWatch:
    """Watches leases until they are free: released, or silent for `lease_seconds`."""

    def __init__(
        self, lease_seconds: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.lease_seconds = lease_seconds
        self.clock = clock
        self._seen: dict[Slot, _Seen] = {}  # a slot begun again has another lease

    def is_free(self, slot: Slot, found: StoredLease | None, *, share: float = 1.0) -> bool:
        """Whether the lease just read was released, or silent for `share` of `lease_seconds`."""
        if found is None:
            return True
        seen = self._seen.setdefault(slot, _Seen(found.version, self.clock()))
        if found.version != seen.version:
            seen = _Seen(found.version, self.clock(), seen.renewals + 1)
            self._seen[slot] = seen
        is_silent = self.clock() - seen.since >= share * self.lease_seconds
        return not found.lease.is_held or is_silent

    def is_alive(self, slot: Slot) -> bool:
        """Whether the lease was seen to be renewed, often enough to count as alive."""
        return slot in self._seen and self._seen[slot].renewals >= LIVING


def open_slots_in_turn(
    ledger: Ledger,
    numbers: Sequence[int],
    watch: LeaseWatch,
    *,
    should_stop: Callable[[], None],
    wait: Callable[[float], None],
) -> Iterator[tuple[Slot, StoredLease | None]]:
    """Yield each open slot with its lease, round after round; end if none is open.

    A slot whose documents are damaged is passed over while there are others. Raises `SlotError` if
    there are none, `HeldError` once the holders of all others are seen to be alive.
    """
    is_told = False
    damaged: dict[int, SlotError] = {}
    while True:
        open_slots: list[Slot] = []
        for number in numbers:
            should_stop()
            if (found := _open_slot(ledger, number, damaged)) is not None:
                open_slots.append(found[0])
                yield found
        if not open_slots:
            if damaged:
                raise next(iter(damaged.values()))
            return
        names = ", ".join(str(slot.number) for slot in open_slots)
        if all(map(watch.is_alive, open_slots)):
            raise HeldError(
                f"slot {names}: another attempt is at work on it; nothing is left for this one"
            )
        if not is_told:
            log.info(
                "slot %s: another attempt holds it; watching for %g s at most whether it is alive",
                names,
                watch.lease_seconds,
            )
            is_told = True
        wait(watch.lease_seconds / 20)


def _open_slot(
    ledger: Ledger, number: int, damaged: dict[int, SlotError]
) -> tuple[Slot, StoredLease | None] | None:
    """The slot with its lease; None if it is closed, or damaged, which is entered and told once."""
    if number in damaged:
        return None
    try:
        slot = ledger.slot(number)
        with ThreadPoolExecutor(1) as pool:
            lease = pool.submit(slot.lease)
            is_open = slot.is_open()
        return (slot, lease.result()) if is_open else None
    except SlotError as error:
        log.warning("slot %d is passed over: %s", number, error)
        damaged[number] = error
        return None


def wait_for_a_free_slot(
    ledger: Ledger,
    numbers: Sequence[int],
    watch: LeaseWatch,
    *,
    should_stop: Callable[[], None],
    wait: Callable[[float], None],
) -> bool:
    """Return once a slot is free or its holder probably dead; False if none is open any more.

    It takes no lease: it is asked before minutes go into loading a base that may not be needed.
    Raises as `open_slots_in_turn`.
    """
    in_turn = open_slots_in_turn(ledger, numbers, watch, should_stop=should_stop, wait=wait)
    return any(watch.is_free(slot, found, share=PROBABLY_DEAD) for slot, found in in_turn)
