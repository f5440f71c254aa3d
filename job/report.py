"""What the bucket holds, as a table for a terminal. Reads documents only; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.table import Table

from job.attempts import read_accounts
from job.errors import SlotError
from job.lease import lease_key
from job.ledger import Ledger
from job.log import log
from job.store.documents import read_document


@dataclass(frozen=True)
class SlotRow:
    """A slot as a person sees it."""

    slot: int
    state: str  # empty, waiting, leased, given up, damaged, or a result's status
    params: dict[str, Any]
    eval_loss: float | None
    steps: str
    adapter_key: str | None
    attempts: int = 0
    gpu_seconds: float = 0.0
    note: str = ""


def slot_rows(ledger: Ledger, num_trials: int) -> list[SlotRow]:
    """Every slot of the sweep, in order."""
    return [_slot_row(ledger, slot) for slot in range(num_trials)]


def _slot_row(ledger: Ledger, slot: int) -> SlotRow:
    """One slot; a damaged one says so and hides no other."""
    try:
        view = ledger.pin(slot)
        row = _generation_row(view, slot)
        lease = read_document(ledger.store, lease_key(view, slot))
        if lease is not None:
            seconds = lease.content["attempt"].get("gpu_seconds", 0.0)
            row = replace(
                row,
                attempts=lease.content["epoch"],
                gpu_seconds=lease.content["gpu_seconds_before"] + seconds,
            )
        generation = view.generation(slot)
        return replace(row, note=f"redo {generation}") if generation else row
    except (SlotError, KeyError, TypeError) as error:
        log.warning("slot %d is damaged: %s", slot, error)
        return SlotRow(slot, "damaged", {}, None, "", None)


def _generation_row(ledger: Ledger, slot: int) -> SlotRow:
    spec, result, failure = ledger.spec(slot), ledger.result(slot), ledger.failure(slot)
    excluded = ledger.exclusion(slot) is not None
    if spec is None:
        state = "excluded" if excluded else "empty" if result is None else "damaged"
        return SlotRow(slot, state, {}, None, "", None)
    params, planned = spec["params"], spec["recipe"]["planned_steps"]
    if result is None:
        lease = read_document(ledger.store, lease_key(ledger, slot))
        step = lease.content["attempt"].get("step") if lease else None
        steps = "" if step is None else f"{step}/{planned}"
        held = lease is not None and lease.content["state"] == "held"
        state = "given up" if failure else "leased" if held else "waiting"
        return SlotRow(slot, "excluded" if excluded else state, params, None, steps, None)
    steps, state = f"{result['steps']}/{planned}", "excluded" if excluded else result["status"]
    return SlotRow(slot, state, params, result["eval_loss"], steps, result["adapter_key"])


def best_row(rows: list[SlotRow]) -> SlotRow | None:
    """The committed trial with the lowest eval/loss; None before the first."""
    apart = ("diverged", "excluded")
    judged = [row for row in rows if row.eval_loss is not None and row.state not in apart]
    return min(judged, key=lambda row: row.eval_loss or 0.0, default=None)


def slot_table(rows: list[SlotRow]) -> Table:
    """The slots as a table, the best one marked."""
    names = list(dict.fromkeys(name for row in rows for name in row.params))
    table = Table(box=box.SIMPLE)
    for name in ("slot", "state", "steps", *names, "attempts", "GPU h", "eval/loss", ""):
        table.add_column(name, justify="left" if name in ("state", "") else "right")
    best = best_row(rows)
    for row in rows:
        values = [_short(row.params[name]) if name in row.params else "" for name in names]
        loss = "" if row.eval_loss is None else f"{row.eval_loss:.4f}"
        cost = (str(row.attempts), f"{row.gpu_seconds / 3600:.2f}") if row.attempts else ("", "")
        mark = " ".join(word for word in ("best" if row is best else "", row.note) if word)
        table.add_row(str(row.slot), row.state, row.steps, *values, *cost, loss, mark)
    return table


def attempts_table(ledger: Ledger, num_trials: int) -> Table:
    """What every attempt cost, where it ran, and why it ended; times are for people, in UTC."""
    table = Table(box=box.SIMPLE)
    names = ("slot", "attempt", "node", "from", "to", "steps", "GPU s", "wasted", "code", "reason")
    for name in names:
        table.add_column(name, justify="left" if name in ("node", "reason") else "right")
    for slot in range(num_trials):
        view = ledger.pin(slot)
        lease = read_document(ledger.store, lease_key(view, slot))
        for told in read_accounts(view, slot, lease.content if lease else None):
            steps = f"{_shown(told['first_step'])}-{_shown(told['last_step'])}"
            ended = told.get("ended_at") or told.get("heard_at")
            values = (told["node"], told["started_at"], ended, steps, told["gpu_seconds"],
                      told.get("wasted_gpu_seconds"), told.get("exit_code"),
                      told.get("reason", "running"))  # fmt: skip
            table.add_row(str(slot), str(told["epoch"]), *map(_shown, values))
    return table


def _shown(value: object) -> str:
    return "" if value is None else str(value).removesuffix("+00:00")


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
