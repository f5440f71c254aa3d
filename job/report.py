"""What the bucket holds, as a table for a terminal. Reads documents only; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from job.ledger import Ledger


@dataclass(frozen=True)
class SlotRow:
    """A slot as a person sees it."""

    slot: int
    state: str  # empty, specified, or a result's status
    params: dict[str, Any]
    eval_loss: float | None
    steps: str
    adapter_key: str | None


def slot_rows(ledger: Ledger, num_trials: int) -> list[SlotRow]:
    """Every slot of the sweep, in order."""
    rows = []
    for slot in range(num_trials):
        spec, result = ledger.spec(slot), ledger.result(slot)
        params = spec["params"] if spec else {}
        if result is not None:
            planned = spec["recipe"]["planned_steps"] if spec else "?"
            steps = f"{result['steps']}/{planned}"
            loss, key = result["eval_loss"], result["adapter_key"]
            rows.append(SlotRow(slot, result["status"], params, loss, steps, key))
        else:
            rows.append(SlotRow(slot, "specified" if spec else "empty", params, None, "", None))
    return rows


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
