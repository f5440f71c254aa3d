"""The table of attempts for a terminal: what each cost, where it ran, and why it ended."""

from __future__ import annotations

from rich import box
from rich.table import Table

from job.errors import SlotError
from job.ledger.accounts import read_accounts
from job.ledger.ledger import Ledger
from job.report.overview import place

COLUMNS = ("slot", "attempt", "node", "from", "to", "steps", "GPU s", "wasted", "code", "reason")


def attempts_table(ledger: Ledger, num_trials: int) -> Table:
    """Make a table with a line for each attempt; its times are in UTC."""
    table = Table(box=box.SIMPLE)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("node", "reason") else "right")
    for number in range(num_trials):
        try:
            accounts = read_accounts(ledger.slot(number))
        except SlotError as error:  # hides no other slot
            table.add_row(str(number), *[""] * (len(COLUMNS) - 2), f"damaged: {error}")
            continue
        for account in accounts:
            steps = f"{_shown(account.first_step)}-{_shown(account.last_step)}"
            reason = "running" if account.state == "open" else account.reason
            ended_at = account.ended_at or account.heard_at
            values = (place(account), account.started_at, ended_at, steps, account.gpu_seconds,
                      account.wasted_gpu_seconds, account.exit_code, reason)  # fmt: skip
            table.add_row(str(number), str(account.epoch), *map(_shown, values))
    return table


def _shown(value: object) -> str:
    return "" if value is None else str(value).removesuffix("+00:00")
