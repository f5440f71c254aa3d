"""What every attempt at a slot cost and why it ended: accounts in the lease, documents for people.

The lease is the truth, swapped as a whole; the account of the attempt that holds it is part of it.
`attempts/<epoch>-<owner>.json` only repeats that account: opened with the lease, completed at the
attempt's end. A killed attempt's is completed by its successor, from what its last renewal said, so
a kill between any two writes loses nothing that counts.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import job
from job.errors import SlotError
from job.ledger.ledger import Ledger
from job.ledger.watch import lease_key
from job.log import log
from job.store.documents import Json, create_document, read_document, swap_document

UNHEARD = "killed or cut off: nothing was heard of it after its last renewal"

FRESH: Json = {
    "epoch": 0,
    "checkpoints": [],  # newest first: key, sha256, step, clock_seconds, best
    "gpu_seconds_before": 0.0,  # of all earlier attempts
    "seconds_before": 0.0,  # likewise, on however many GPUs
    "wasted_gpu_seconds_before": 0.0,  # of them, what no later attempt could build on
    "attempt": {},  # the current attempt's account: seconds, steps, where it runs
    "ended": [],  # accounts of earlier attempts whose documents may not be written yet
    "fruitless": 0,  # attempts in a row that trained long and published no later checkpoint
    "startless": 0,  # attempts in a row that never finished a step
}


def taken_over(old: Json, owner: str) -> Json:
    """The lease of the next epoch: the last attempt's account closed, a new one opened."""
    old = {**FRESH, **old}  # a lease of an earlier version knows less
    last = old["attempt"]
    trained_in_vain = last.get("trained_seconds", 0) >= last.get("patience_seconds", float("inf"))
    progressed = last.get("published_step", -1) > last.get("first_step", 0)
    started = last.get("step", 0) > last.get("first_step", 0)
    first = old["epoch"] == 0
    ended = [] if first else [account(old, ended=True)]
    return {
        "owner": owner,
        "epoch": old["epoch"] + 1,
        "state": "held",
        "beat": 0,
        "checkpoints": old["checkpoints"],
        "gpu_seconds_before": old["gpu_seconds_before"] + last.get("gpu_seconds", 0.0),
        "seconds_before": old["seconds_before"]
        + last.get("gpu_seconds", 0.0) / last.get("num_gpus", 1),
        "wasted_gpu_seconds_before": old["wasted_gpu_seconds_before"]
        + sum(closed["wasted_gpu_seconds"] for closed in ended),
        "ended": [*old["ended"], *ended],
        "fruitless": 0 if progressed else old["fruitless"] + trained_in_vain,
        "startless": 0 if started or first else old["startless"] + 1,
        "attempt": {
            "node": platform.node(),
            "code_version": job.__version__,
            "started_at": now(),
            "clock_before": saved_clock_seconds(old),
        },
    }


def account(lease: Json, *, ended: bool) -> Json:
    """The account of the attempt that `lease` tells of, as its document shows it."""
    attempt: Mapping[str, Any] = lease["attempt"]
    shown = {
        "epoch": lease["epoch"],
        "owner": lease["owner"],
        "node": attempt.get("node"),
        "code_version": attempt.get("code_version"),
        "started_at": attempt.get("started_at"),
        "heard_at": attempt.get("heard_at"),
        "state": "ended" if ended else "open",
        "first_step": attempt.get("first_step"),
        "last_step": attempt.get("step"),
        "gpu_seconds": attempt.get("gpu_seconds", 0.0),
    }
    if not ended:
        return shown
    return shown | {
        "ended_at": attempt.get("ended_at"),
        "exit_code": attempt.get("exit_code"),
        "reason": attempt.get("reason", UNHEARD),
        "saved_step": lease["checkpoints"][0]["step"] if lease["checkpoints"] else None,
        "wasted_gpu_seconds": wasted_gpu_seconds(lease),
    }


def wasted_gpu_seconds(lease: Json) -> float:
    """GPU-seconds of the lease's attempt on which nothing later rests.

    What counts is the training clock that its newest checkpoint is ahead of the one it found; the
    attempt that commits says itself what counted.
    """
    attempt = lease["attempt"]
    saved = saved_clock_seconds(lease) - attempt.get("clock_before", 0.0)
    saved *= attempt.get("num_gpus", 1)
    useful = float(attempt.get("useful_seconds", saved))
    return round(max(0.0, float(attempt.get("gpu_seconds", 0.0)) - useful), 1)


def saved_clock_seconds(lease: Json) -> float:
    """The training clock in the newest checkpoint that the lease names."""
    newest = lease["checkpoints"][:1]
    return float(newest[0].get("clock_seconds", 0.0)) if newest else 0.0


def write_account(ledger: Ledger, slot: int, shown: Json) -> None:
    """Create the attempt's document, or complete it if it is open; writing it again is harmless."""
    key = f"{ledger.slot_prefix(slot)}/attempts/{shown['epoch']}-{shown['owner']}.json"
    document = create_document(ledger.store, key, shown)
    if not document.ours and document.content["state"] == "open" and shown["state"] == "ended":
        swap_document(ledger.store, key, shown, document.version)


def read_accounts(ledger: Ledger, slot: int, lease: Json | None) -> list[Json]:
    """The slot's attempts by epoch, for people; `lease` says more of those still open."""
    prefix = f"{ledger.slot_prefix(slot)}/attempts/"
    documents = [read_document(ledger.store, key) for key in ledger.store.list(prefix)]
    found = {document.content["epoch"]: document.content for document in documents if document}
    if lease is not None:
        told = [*lease.get("ended", []), account(lease, ended=lease["state"] != "held")]
        found |= {a["epoch"]: a for a in told if found.get(a["epoch"], a)["state"] == "open"}
    return [found[epoch] for epoch in sorted(found)]


def now() -> str:
    """The time for people to read; nothing compares it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


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
