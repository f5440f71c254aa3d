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
from job.ledger.accounts import FRESH, account, now, taken_over
from job.ledger.ledger import Ledger
from job.ledger.records import AttemptProgress, Lease
from job.ledger.slot import Slot, StoredLease
from job.ledger.watch import LeaseWatch, open_slots_in_turn
from job.log import log


class HeldLease:
    """A lease that this process holds, renewed by a small thread while the context is open."""

    def __init__(
        self,
        slot: Slot,
        stored: StoredLease,
        *,
        lease_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.slot = slot
        self._record = stored.lease
        self._version = stored.version
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._renewed_at = clock()
        self._lost = False
        self._swapping = threading.Lock()
        self._closing = threading.Event()
        self._progress: dict[str, Any] = {}  # fields of `AttemptProgress` for the next renewal
        self._paid_since: float | None = None  # on the monotonic clock; None: no GPU is held
        self._paid_until: float | None = None
        self._thread = threading.Thread(target=self._keep_renewing, daemon=True, name="lease")

    @property
    def epoch(self) -> int:
        """The number of this attempt at the slot, from 1."""
        return self._record.epoch

    @property
    def record(self) -> Lease:
        """The lease as last written."""
        return self._record

    @property
    def lost(self) -> bool:
        """Whether another attempt holds the slot: then nothing may be touched any more."""
        return self._lost

    def report(self, **progress: Any) -> None:
        """Note fields of `AttemptProgress` for the next renewal; writes nothing."""
        AttemptProgress.model_validate(progress)  # a wrong value fails here, not at the renewal
        self._progress = {**self._progress, **progress}

    def start_paying(self, *, seconds_before: float) -> None:
        """Count GPU-seconds from now on, after those that preparing and loading took."""
        self._paid_since = time.monotonic() - seconds_before

    def stop_paying(self) -> None:
        """Count no more: the attempt's account is closed."""
        self._paid_until = time.monotonic()

    @property
    def own_gpu_seconds(self) -> float:
        """GPU-seconds of this attempt so far, which every renewal tells."""
        if self._paid_since is None:
            return 0.0
        return round((self._paid_until or time.monotonic()) - self._paid_since, 1)

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
                stored = self.slot.swap_lease(self._next(changes), self._version)
                holder = stored.lease.owner, stored.lease.epoch
                if holder != (self._record.owner, self._record.epoch):
                    self._lost = True
                    break
                # Our own write: of this call, or of an earlier one whose answer was lost.
                self._record, self._version = stored.lease, stored.version
                if stored.ours:
                    self._renewed_at = started
                    return
        raise PreemptedError(f"slot {self.slot.number}: a newer attempt holds it, this one ends")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        try:
            if error is None:
                self.end(ExitCode.OK, self._progress.get("reason", "nothing to do"))
            else:
                self.end(*_ending(error))
            if not self._lost and not isinstance(
                error, StoreError
            ):  # else the next attempt writes it
                self.slot.write_account(account(self._record, ended=True))
        except JobError as failure:  # must not hide how the attempt ended
            log.warning("lease not released: %s", failure)

    def open_account(self) -> None:
        """Write the accounts that earlier attempts left unwritten, and open our own."""
        for ended in self._record.ended:
            self.slot.write_account(ended)
        self._record = self._record.changed(ended=())  # written with the next renewal
        self.slot.write_account(account(self._record, ended=False))

    def end(self, exit_code: int, reason: str) -> None:
        """Release the lease, which then says how the attempt ended."""
        self.report(exit_code=int(exit_code), reason=reason, ended_at=now())
        self.release()

    def release(self) -> None:
        """Stop renewing and give the slot free at once; a lease that is lost is left alone."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._lease_seconds)
        if not self._lost:
            self.renew(state="released")

    def _next(self, changes: dict[str, Any]) -> Lease:
        """The lease as the next renewal will write it."""
        progress = dict(self._progress)
        if self._paid_since is not None:
            progress["gpu_seconds"] = self.own_gpu_seconds
        attempt = self._record.attempt.changed(**progress, heard_at=now())
        return self._record.changed(**changes, attempt=attempt, beat=self._record.beat + 1)

    def _keep_renewing(self) -> None:
        while not self._closing.wait(self._lease_seconds / 3):
            try:
                self.renew()
            except PreemptedError as error:
                log.warning("%s", error)
                return
            except JobError as error:  # the next renewal tries again, and publishing waits for it
                log.warning("lease not renewed: %s", error)


def acquire(
    ledger: Ledger,
    numbers: Sequence[int],
    *,
    lease_seconds: float,
    should_stop: Callable[[], None],
    wait: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
    watch: LeaseWatch | None = None,
    opening: AttemptProgress | None = None,
) -> HeldLease | None:
    """Take the first slot that is open and free; None if none is open any more.

    A lease that another attempt holds is watched until it is released, until it stood still for
    `lease_seconds`, or until it is seen to be alive. Raises `HeldError` if all are alive.
    `watch` holds what was seen of those leases so far, `opening` what the attempt's account says
    from its first moment on.
    """
    owner = uuid.uuid4().hex
    watch = watch or LeaseWatch(lease_seconds, clock=clock)
    for slot, found in open_slots_in_turn(
        ledger, numbers, watch, should_stop=should_stop, wait=wait
    ):
        if not watch.is_free(slot, found):
            continue
        if found is None:
            stored = slot.create_lease(taken_over(FRESH, owner, opening))
        else:
            stored = slot.swap_lease(taken_over(found.lease, owner, opening), found.version)
        if not stored.ours:
            continue
        lease = HeldLease(slot, stored, lease_seconds=lease_seconds, clock=clock)
        if slot.is_current() and slot.is_open():
            return lease
        lease.end(ExitCode.OK, "the slot was closed while its lease was taken")
    return None


def _ending(error: BaseException) -> tuple[int, str]:
    """The exit code and the reason of an attempt that ends by `error`."""
    if isinstance(error, JobError):
        return error.exit_code, str(error).partition("\n")[0]
    return ExitCode.BUG, type(error).__name__
