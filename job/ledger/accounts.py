"""Accounts: the cost of each attempt and why it ended, and the cost of a sweep so far.

The lease is the truth, swapped as a whole; the account of the attempt that holds it is part of it.
`attempts/<epoch>-<owner>.json` only repeats that account: opened with the lease, completed at the
attempt's end. A killed attempt's is completed by its successor, from what its last renewal said, so
a kill between any two writes loses nothing that counts.
"""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from datetime import UTC, datetime

import job
from job.errors import SlotError
from job.ledger.ledger import Ledger
from job.ledger.records import Account, AttemptProgress, Lease
from job.ledger.slot import Slot
from job.log import log

UNHEARD = "killed or cut off: nothing was heard of it after its last renewal"
FRESH = Lease(owner="", epoch=0)  # the lease of a slot that nobody has begun


def taken_over(old: Lease, owner: str, opening: AttemptProgress | None = None) -> Lease:
    """The lease of the next epoch: the last attempt's account closed, a new one opened."""
    last = old.attempt
    patience = math.inf if last.patience_seconds is None else last.patience_seconds
    trained_in_vain = last.trained_seconds >= patience
    first_step = last.first_step or 0
    progressed = last.published_step > first_step
    started = (last.step or 0) > first_step
    is_first = old.epoch == 0
    ended = () if is_first else (account(old, ended=True),)
    wasted = sum(closed.wasted_gpu_seconds or 0.0 for closed in ended)
    cost = _cost_by(old)
    return Lease(
        **(old.model_extra or {}),  # keys of a newer version
        owner=owner,
        epoch=old.epoch + 1,
        state="held",
        beat=0,
        checkpoints=old.checkpoints,
        gpu_seconds_before=old.gpu_seconds_before + last.gpu_seconds,
        seconds_before=old.seconds_before + last.gpu_seconds / last.num_gpus,
        wasted_gpu_seconds_before=old.wasted_gpu_seconds_before + wasted,
        usd_before=cost.usd,
        priced_gpu_seconds_before=cost.gpu_seconds - cost.unpriced_seconds,
        ended=(*old.ended, *ended),
        fruitless=0 if progressed else old.fruitless + trained_in_vain,
        startless=0 if started or is_first else old.startless + 1,
        attempt=(opening or AttemptProgress()).changed(
            node=platform.node(),
            code_version=job.__version__,
            started_at=now(),
            clock_before=saved_clock_seconds(old),
        ),
    )


def account(lease: Lease, *, ended: bool) -> Account:
    """The account of the attempt that `lease` tells of, as its document shows it."""
    attempt = lease.attempt
    shown = Account(
        epoch=lease.epoch,
        owner=lease.owner,
        node=attempt.node,
        gpu=attempt.gpu,
        worker=attempt.worker,
        hourly_usd=attempt.hourly_usd,
        code_version=attempt.code_version,
        started_at=attempt.started_at,
        heard_at=attempt.heard_at,
        state="ended" if ended else "open",
        first_step=attempt.first_step,
        last_step=attempt.step,
        gpu_seconds=attempt.gpu_seconds,
    )
    if not ended:
        return shown
    return shown.changed(
        ended_at=attempt.ended_at,
        exit_code=attempt.exit_code,
        reason=attempt.reason or UNHEARD,
        saved_step=lease.checkpoints[0].step if lease.checkpoints else None,
        wasted_gpu_seconds=wasted_gpu_seconds(lease),
    )


def wasted_gpu_seconds(lease: Lease) -> float:
    """GPU-seconds of the lease's attempt on which nothing later rests.

    Useful is the training time between the checkpoint that the attempt found and its newest one;
    an attempt that commits says itself how much was useful.
    """
    attempt = lease.attempt
    saved = (saved_clock_seconds(lease) - attempt.clock_before) * attempt.num_gpus
    useful = saved if attempt.useful_seconds is None else attempt.useful_seconds
    return round(max(0.0, attempt.gpu_seconds - useful), 1)


def saved_clock_seconds(lease: Lease) -> float:
    """The training clock in the newest checkpoint that the lease names."""
    return lease.checkpoints[0].clock_seconds if lease.checkpoints else 0.0


def read_accounts(slot: Slot) -> list[Account]:
    """The accounts of the slot's attempts by epoch, for people; open ones as the lease has them."""
    by_epoch = {document.epoch: document for document in slot.accounts()}
    stored = slot.lease()
    if stored is not None:
        lease = stored.lease
        for newer in (*lease.ended, account(lease, ended=not lease.is_held)):
            if by_epoch.get(newer.epoch, newer).state == "open":
                by_epoch[newer.epoch] = newer
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


@dataclass(frozen=True)
class Cost:
    """What attempts cost: GPU-seconds, and dollars of those whose price an hour is known."""

    gpu_seconds: float = 0.0
    usd: float = 0.0
    unpriced_seconds: float = 0.0  # GPU-seconds without a price

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.gpu_seconds + other.gpu_seconds,
            self.usd + other.usd,
            self.unpriced_seconds + other.unpriced_seconds,
        )

    @property
    def is_priced(self) -> bool:
        """Whether every attempt tells its price, but for what rounding leaves over."""
        return self.unpriced_seconds < 1

    def dollars(self, hourly_usd: float | None) -> float:
        """All of it in dollars; `hourly_usd` is the price where an attempt tells none."""
        return self.usd + self.unpriced_seconds / 3600 * (hourly_usd or 0.0)


NOTHING = Cost()


def dollars(amount: float) -> str:
    """An amount as $4.12; below a cent with two digits that say something, never as 5e-05."""
    if 0 < amount < 0.0001:
        return "under $0.0001"
    return f"${amount:,.2f}" if amount >= 0.01 or amount == 0 else f"${amount:.2g}"


def cost_of_slot(ledger: Ledger, number: int) -> Cost:
    """The cost of all attempts at a slot: ended, killed and running, as of the last renewal.

    An excluded slot and what came before a redo count, too: they were paid for. What a damaged
    document does not say is not counted, and ends no other slot's trial.
    """
    try:
        newest = ledger.slot(number)
    except SlotError as error:
        log.warning("the sweep's budget does not count slot %d: %s", number, error)
        return NOTHING
    return sum((cost_of(slot) for slot in (*newest.earlier(), newest)), NOTHING)


def cost_of(slot: Slot) -> Cost:
    """The cost of all attempts at the slot in this generation of it.

    They were paid for: where one of its two documents is damaged, the other one is believed.
    """
    by_result, by_lease = 0.0, NOTHING
    try:
        result = slot.result()
        by_result = result.gpu_seconds if result is not None else 0.0
    except SlotError as error:
        log.warning("GPU time is taken from the lease alone: %s", error)
    try:
        stored = slot.lease()
        if stored is not None:
            by_lease = _cost_by(stored.lease)
    except SlotError as error:
        log.warning("GPU time is taken from the result alone: %s", error)
    # Where two attempts worked on a slot at once, the lease has the cost of both. The attempt that
    # committed may have paid for longer than its last renewal says.
    untold = max(0.0, by_result - by_lease.gpu_seconds)
    return by_lease + Cost(untold, 0.0, untold)


def _cost_by(lease: Lease) -> Cost:
    """The cost of all attempts up to the lease's own, as it tells them."""
    attempt, before = lease.attempt, lease.gpu_seconds_before
    unpriced = max(0.0, before - lease.priced_gpu_seconds_before)
    earlier = Cost(before, lease.usd_before, unpriced)
    if attempt.hourly_usd is None:
        return earlier + Cost(attempt.gpu_seconds, 0.0, attempt.gpu_seconds)
    return earlier + Cost(attempt.gpu_seconds, attempt.gpu_seconds / 3600 * attempt.hourly_usd)


def now() -> str:
    """The present time in UTC for people to read; nothing compares it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
