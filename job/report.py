"""What the bucket holds, as a table for a terminal. Reads documents only; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

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


def slot_rows(ledger: Ledger, num_trials: int) -> list[SlotRow]:
    """Every slot of the sweep, in order."""
    return [_slot_row(ledger, slot) for slot in range(num_trials)]


def _slot_row(ledger: Ledger, slot: int) -> SlotRow:
    """One slot; a damaged one says so and hides no other."""
    try:
        spec, result, failure = ledger.spec(slot), ledger.result(slot), ledger.failure(slot)
        if spec is None:
            damaged = result is not None
            return SlotRow(slot, "damaged" if damaged else "empty", {}, None, "", None)
        params, planned = spec["params"], spec["recipe"]["planned_steps"]
        if result is None:
            lease = read_document(ledger.store, lease_key(ledger, slot))
            step = lease.content["attempt"].get("step") if lease else None
            steps = "" if step is None else f"{step}/{planned}"
            held = lease is not None and lease.content["state"] == "held"
            state = "given up" if failure else "leased" if held else "waiting"
            return SlotRow(slot, state, params, None, steps, None)
        steps = f"{result['steps']}/{planned}"
        loss, key = result["eval_loss"], result["adapter_key"]
        return SlotRow(slot, result["status"], params, loss, steps, key)
    except (SlotError, KeyError, TypeError) as error:
        log.warning("slot %d is damaged: %s", slot, error)
        return SlotRow(slot, "damaged", {}, None, "", None)


def best_row(rows: list[SlotRow]) -> SlotRow | None:
    """The committed trial with the lowest eval/loss; None before the first."""
    judged = [row for row in rows if row.eval_loss is not None and row.state != "diverged"]
    return min(judged, key=lambda row: row.eval_loss or 0.0, default=None)


def slot_table(rows: list[SlotRow]) -> Table:
    """The slots as a table, the best one marked."""
    names = list(dict.fromkeys(name for row in rows for name in row.params))
    table = Table(box=box.SIMPLE)
    for name in ("slot", "state", "steps", *names, "eval/loss", ""):
        table.add_column(name, justify="left" if name in ("state", "") else "right")
    best = best_row(rows)
    for row in rows:
        values = [_short(row.params[name]) if name in row.params else "" for name in names]
        loss = "" if row.eval_loss is None else f"{row.eval_loss:.4f}"
        mark = "best" if row is best else ""
        table.add_row(str(row.slot), row.state, row.steps, *values, loss, mark)
    return table


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
