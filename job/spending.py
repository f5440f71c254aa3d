"""GPU time that a sweep has taken, of all attempts at its slots."""

from __future__ import annotations

from job.errors import SlotError
from job.ledger import Ledger
from job.log import log
from job.lookout import lease_key
from job.store.documents import read_document


def gpu_hours_spent(ledger: Ledger, num_trials: int) -> float:
    """GPU-hours of all attempts at all slots: ended, killed and running, as of the last renewal.

    Also those of excluded slots, and of what came before a redo: they were paid for. A slot whose
    documents are damaged counts nothing, and ends no other slot's trial.
    """
    seconds = 0.0
    for slot in range(num_trials):
        for generation in range(ledger.generation(slot) + 1):
            try:
                seconds += gpu_seconds(ledger.pin(slot, generation), slot)
            except (SlotError, KeyError, TypeError, ValueError, AttributeError) as error:
                log.warning("the sweep's budget does not count slot %d: %s", slot, error)
    return seconds / 3600


def gpu_seconds(ledger: Ledger, slot: int) -> float:
    """Of all attempts at the slot in the ledger's generation of it."""
    result = ledger.result(slot)
    committed = float(result["gpu_seconds"]) if result is not None else 0.0
    lease = read_document(ledger.store, lease_key(ledger, slot))
    if lease is None:
        return committed
    own = lease.content["attempt"].get("gpu_seconds", 0.0)
    # Of a slot that two attempts worked on at once, the lease knows of both.
    return max(committed, float(lease.content["gpu_seconds_before"] + own))
