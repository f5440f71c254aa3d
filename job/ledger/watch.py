"""`LeaseWatch`: what this process has seen of other attempts' leases, on its own monotonic clock.

It outlives a look: what was seen before the base was loaded still counts when the lease is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from job.errors import HeldError, SlotError
from job.ledger.ledger import Ledger, damage_told
from job.log import log
from job.store.documents import Document, read_document

DAMAGED: Final = "damaged"
LIVING = 2  # renewals; an observer who saw so many says that the holder is alive
# Of a lease's time in silence: a holder renews every third, so it is probably dead, and the rest of
# the silence may pass while the base is loaded. Only the whole of it lets a lease be taken.
PROBABLY_DEAD = 0.5


@dataclass
class _Watch:
    """What was seen of one lease."""

    version: str
    since: float
    renewals: int = 0


class LeaseWatch:
    """Watches leases until they are free: released, or silent for `lease_seconds`."""

    def __init__(
        self, lease_seconds: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.lease_seconds = lease_seconds
        self.clock = clock
        self._watches: dict[str, _Watch] = {}  # by key: a slot begun again has another lease

    def is_free(self, key: str, found: Document | None, *, share: float = 1.0) -> bool:
        """Whether the lease that was just read may be taken; after a `share` of the silence."""
        if found is None:
            return True
        watch = self._watches.setdefault(key, _Watch(found.version, self.clock()))
        if found.version != watch.version:
            watch = _Watch(found.version, self.clock(), watch.renewals + 1)
            self._watches[key] = watch
        is_silent = self.clock() - watch.since >= share * self.lease_seconds
        return found.content.get("state") == "released" or is_silent

    def is_alive(self, key: str) -> bool:
        """Whether the lease was renewed under our eyes."""
        return key in self._watches and self._watches[key].renewals >= LIVING


def lease_key(ledger: Ledger, slot: int) -> str:
    """Where a slot's lease lies."""
    return f"{ledger.slot_prefix(slot)}/lease.json"


def open_slots_in_turn(
    ledger: Ledger,
    slots: Sequence[int],
    lookout: LeaseWatch,
    *,
    should_stop: Callable[[], None],
    wait: Callable[[float], None],
) -> Iterator[tuple[int, Ledger, Document | None]]:
    """Each open slot with its lease, its ledger pinned, round after round; ends if none is open.

    A slot whose lease is damaged is left to `status` while there are others. Raises `SlotError` if
    there are none, `HeldError` once all others are seen to be alive.
    """
    is_told = False
    damaged: dict[int, SlotError] = {}
    while True:
        views = {slot: ledger.pin(slot) for slot in slots}
        open_slots = [slot for slot, view in views.items() if view.is_open(slot)]
        if not open_slots:
            return
        for slot in open_slots:
            should_stop()
            if (found := _read_lease(views[slot], slot, damaged)) != DAMAGED:
                yield slot, views[slot], found
        open_slots = [slot for slot in open_slots if slot not in damaged]
        if not open_slots:
            raise next(iter(damaged.values()))
        names = ", ".join(map(str, open_slots))
        if all(lookout.is_alive(lease_key(views[slot], slot)) for slot in open_slots):
            raise HeldError(
                f"slot {names}: another attempt is at work on it; nothing is left for this one"
            )
        if not is_told:
            log.info(
                "slot %s: another attempt holds it; watching for %g s at most whether it is alive",
                names,
                lookout.lease_seconds,
            )
            is_told = True
        wait(lookout.lease_seconds / 20)


def _read_lease(
    ledger: Ledger, slot: int, damaged: dict[int, SlotError]
) -> Document | Literal["damaged"] | None:
    """The slot's lease; one that cannot be read is entered into `damaged`, and told once."""
    if slot in damaged:
        return DAMAGED
    try:
        with damage_told(slot):
            return read_document(ledger.store, lease_key(ledger, slot))
    except SlotError as error:
        log.warning("slot %d is passed over: %s", slot, error)
        damaged[slot] = error
        return DAMAGED


def wait_for_a_free_slot(
    ledger: Ledger,
    slots: Sequence[int],
    lookout: LeaseWatch,
    *,
    should_stop: Callable[[], None],
    wait: Callable[[float], None],
) -> bool:
    """Return once a slot is free or its holder probably dead; False if none is open any more.

    Takes nothing. Asked before minutes go into a base that a held slot would not need. Raises
    `HeldError`.
    """
    in_turn = open_slots_in_turn(ledger, slots, lookout, should_stop=should_stop, wait=wait)
    return any(
        lookout.is_free(lease_key(view, slot), found, share=PROBABLY_DEAD)
        for slot, view, found in in_turn
    )
