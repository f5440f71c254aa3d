"""What every attempt cost, where it ran, and why it ended, for a terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from job.errors import SlotError
from job.ledger.accounts import read_accounts
from job.ledger.ledger import Ledger

COLUMNS = ("slot", "attempt", "node", "from", "to", "steps", "GPU s", "wasted", "code", "reason")


def attempts_table(ledger: Ledger, num_trials: int) -> Table:
    """A line an attempt; times are for people, in UTC."""
    table = Table(box=box.SIMPLE)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("node", "reason") else "right")
    for number in range(num_trials):
        try:
            accounts = read_accounts(ledger.slot(number))
        except SlotError as error:  # hides no other slot
            table.add_row(str(number), *[""] * (len(COLUMNS) - 2), f"damaged: {error}")
            continue
        for told in accounts:
            steps = f"{_shown(told.first_step)}-{_shown(told.last_step)}"
            reason = "running" if told.state == "open" else told.reason
            ended_at = told.ended_at or told.heard_at
            values = (told.node, told.started_at, ended_at, steps, told.gpu_seconds,
                      told.wasted_gpu_seconds, told.exit_code, reason)  # fmt: skip
            table.add_row(str(number), str(told.epoch), *map(_shown, values))
    return table


def _shown(value: object) -> str:
    return "" if value is None else str(value).removesuffix("+00:00")
