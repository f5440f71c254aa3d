"""The lease on a slot: who may publish and commit for it. No clocks of two machines are compared.

`lease.json` is only ever replaced by compare-and-swap. Its holder renews it every third of
`JOB_LEASE_SECONDS`; it is broken when its *version* stood still for that long on the observer's own
monotonic clock. It also names the slot's checkpoints: a checkpoint counts only if the swap that
names it succeeded, so what a holder that lost the lease uploads later counts for nothing.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Self

from job.errors import ExitCode, JobError, PreemptedError, StoreError
from job.ledger.accounts import FRESH, account, now, taken_over, write_account
from job.ledger.ledger import Ledger
from job.ledger.watch import LeaseWatch, lease_key, open_slots_in_turn
from job.log import log
from job.store.documents import Document, Json, create_document, swap_document


class Lease:
    """A lease that this process holds, renewed by a small thread while the context is open."""

    def __init__(
        self,
        ledger: Ledger,
        slot: int,
        document: Document,
        *,
        lease_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.slot = slot
        self.ledger = ledger  # pinned to the slot's generation
        # Asked at every renewal for what changes by itself, such as the GPU-seconds.
        self.measure: Callable[[], Json] = dict
        self.outcome = "nothing to do"  # why an attempt ended that no error ended
        self._content = document.content
        self._version = document.version
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._renewed_at = clock()
        self._lost = False
        self._swapping = threading.Lock()
        self._closing = threading.Event()
        self._progress: Json = {}
        self._thread = threading.Thread(target=self._keep_renewing, daemon=True, name="lease")

    @property
    def epoch(self) -> int:
        return int(self._content["epoch"])

    @property
    def owner(self) -> str:
        return str(self._content["owner"])

    @property
    def content(self) -> Json:
        """The lease as last written."""
        return self._content

    @property
    def lost(self) -> bool:
        """Another attempt holds the slot; nothing may be touched any more."""
        return self._lost

    def report(self, **progress: Any) -> None:
        """Note what the next renewal shall say of this attempt; writes nothing."""
        self._progress = {**self._progress, **progress}

    def ensure_held(self) -> None:
        """Return only if the lease is fresh, renewing it if it is not.

        Raises `PreemptedError` if it is lost, `StoreError` if the store fails for too long.
        """
        if self._lost or self._clock() - self._renewed_at >= self._lease_seconds / 2:
            self.renew()

    def renew(self, **changes: Any) -> None:
        """Write the lease with `changes`, under the same epoch; raises as `ensure_held`."""
        with self._swapping:
            while not self._lost:
                started = self._clock()
                content = {**self._content, **changes}
                said = {**self._content["attempt"], **self._progress, **self.measure()}
                content["attempt"] = said | {"heard_at": now()}
                content["beat"] = content.get("beat", 0) + 1
                document = swap_document(self.ledger.store, self._key, content, self._version)
                same_holder = (document.content.get("owner"), document.content.get("epoch")) == (
                    self.owner,
                    self.epoch,
                )
                if not same_holder:
                    self._lost = True
                    break
                # Ours in any case: of this call, or of an earlier one whose answer was lost.
                self._content, self._version = document.content, document.version
                if document.ours:
                    self._renewed_at = started
                    return
        raise PreemptedError(f"slot {self.slot}: a newer attempt holds it, this one ends")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        try:
            self.end(*((ExitCode.OK, self.outcome) if error is None else _ending(error)))
            if not self._lost and not isinstance(error, StoreError):  # else the next one writes it
                write_account(self.ledger, self.slot, account(self._content, ended=True))
        except JobError as failure:  # must not hide how the attempt ended
            log.warning("lease not released: %s", failure)

    def open_account(self) -> None:
        """Write what earlier attempts left unwritten of themselves, and open our own document."""
        for ended in self._content["ended"]:
            write_account(self.ledger, self.slot, ended)
        self._content = {**self._content, "ended": []}  # the next renewal says so
        write_account(self.ledger, self.slot, account(self._content, ended=False))

    def end(self, exit_code: int, reason: str) -> None:
        """Release the lease, which then says how the attempt ended."""
        self.report(exit_code=exit_code, reason=reason, ended_at=now())
        self.release()

    def release(self) -> None:
        """Stop renewing and give the slot free at once; a lease that is lost is left alone."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._lease_seconds)
        if not self._lost:
            self.renew(state="released")

    @property
    def _key(self) -> str:
        return lease_key(self.ledger, self.slot)

    def _keep_renewing(self) -> None:
        while not self._closing.wait(self._lease_seconds / 3):
            try:
                self.renew()
            except PreemptedError as error:
                log.warning("%s", error)
                return
            except JobError as error:  # the next beat tries again; publishing waits for one
                log.warning("lease not renewed: %s", error)


def acquire(
    ledger: Ledger,
    slots: Sequence[int],
    *,
    lease_seconds: float,
    should_stop: Callable[[], None],
    wait: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
    lookout: LeaseWatch | None = None,
) -> Lease | None:
    """Take the first slot that is open and free; None if none is open any more.

    A lease that another attempt holds is watched until it is released, until it stood still for
    `lease_seconds`, or until it is seen to be alive. Raises `PreemptedError` if all are alive.
    `lookout`: what was seen of them so far.
    """
    owner = uuid.uuid4().hex
    lookout = lookout or LeaseWatch(lease_seconds, clock=clock)
    for slot, view, found in open_slots_in_turn(
        ledger, slots, lookout, should_stop=should_stop, wait=wait
    ):
        key = lease_key(view, slot)
        if not lookout.is_free(key, found):
            continue
        if found is None:
            held = create_document(ledger.store, key, taken_over(FRESH, owner))
        else:
            content = taken_over(found.content, owner)
            held = swap_document(ledger.store, key, content, found.version)
        if not held.ours:
            continue
        lease = Lease(view, slot, held, lease_seconds=lease_seconds, clock=clock)
        if view.is_current(slot) and view.is_open(slot):
            return lease
        lease.end(ExitCode.OK, "the slot was closed while its lease was taken")
    return None


def _ending(error: BaseException) -> tuple[int, str]:
    """Exit code and reason of an attempt that ends by `error`."""
    if isinstance(error, JobError):
        return error.exit_code, str(error).partition("\n")[0]
    return ExitCode.BUG, type(error).__name__
