"""The table of attempts for a terminal: what each cost, where it ran, and why it ended."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table

from job.errors import SlotError
from job.ledger.accounts import read_accounts
from job.ledger.ledger import Ledger
from job.ledger.records import Account
from job.report.overview import place

COLUMNS = ("slot", "attempt", "node", "from", "to", "steps", "GPU s", "wasted", "code", "reason")


def attempts_table(ledger: Ledger, num_trials: int) -> Table:
    """Make a table with a line for each attempt, also those before a redo; times are in UTC."""
    table = Table(box=box.SIMPLE)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("node", "reason") else "right")
    for number in range(num_trials):
        try:
            slot = ledger.slot(number)
        except SlotError as error:
            table.add_row(*_damaged(number, error))
            continue
        for generation in (*slot.earlier(), slot):
            try:
                accounts = read_accounts(generation)
            except SlotError as error:  # hides no other slot
                table.add_row(*_damaged(number, error))
                continue
            is_current = generation.generation == slot.generation
            for account in accounts:
                table.add_row(str(number), *_row(account, is_current=is_current))
    return table


def _row(account: Account, *, is_current: bool) -> Iterator[str]:
    """The attempt's columns; one of before a redo says so, as its number comes again."""
    steps = f"{_shown(account.first_step)}-{_shown(account.last_step)}"
    reason = "running" if account.state == "open" else account.reason
    if not is_current:
        reason = f"before a redo: {reason}"
    ended_at = account.ended_at or account.heard_at
    times, code = (account.started_at, ended_at), account.exit_code
    spent = (account.gpu_seconds, account.wasted_gpu_seconds)
    values = (account.epoch, place(account), *times, steps, *spent, code, reason)
    return map(_shown, values)


def _damaged(number: int, error: SlotError) -> list[str]:
    return [str(number), *[""] * (len(COLUMNS) - 2), f"damaged: {error}"]


def _shown(value: object) -> str:
    return "" if value is None else str(value).removesuffix("+00:00")
