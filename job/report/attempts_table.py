"""The attempts of a sweep, for a terminal and for a program: cost, place, and why each ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table

from job.errors import SlotError
from job.ledger.accounts import read_accounts
from job.ledger.ledger import Ledger
from job.ledger.records import Account
from job.ledger.slot import Slot
from job.report.overview import place

COLUMNS = ("slot", "attempt", "node", "from", "to", "steps", "GPU s", "wasted", "code", "reason")


def attempts_table(ledger: Ledger, num_trials: int) -> Table:
    """Make a table with a line for each attempt, also those before a redo; times are in UTC."""
    table = Table(box=box.SIMPLE)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("node", "reason") else "right")
    for number, slot, found in _attempts(ledger, num_trials):
        if isinstance(found, SlotError):
            table.add_row(str(number), *[""] * (len(COLUMNS) - 2), f"damaged: {found}")
        else:
            is_current = slot is not None and not slot.is_earlier
            table.add_row(str(number), *_row(found, is_current=is_current))
    return table


def attempts_json(ledger: Ledger, num_trials: int) -> list[dict[str, Any]]:
    """The accounts of the same attempts as JSON objects; a damaged slot's says what is damaged."""
    return [
        {
            "slot": number,
            "generation": slot.generation if slot else None,
            **({"damaged": str(found)} if isinstance(found, SlotError) else found.to_json()),
        }
        for number, slot, found in _attempts(ledger, num_trials)
    ]


def _attempts(
    ledger: Ledger, num_trials: int
) -> Iterator[tuple[int, Slot | None, Account | SlotError]]:
    """Each attempt's slot in its generation and its account, or why that cannot be read.

    Damage hides no other slot; the slot is None where its newest generation is not known.
    """
    for number in range(num_trials):
        try:
            newest = ledger.slot(number)
        except SlotError as error:
            yield number, None, error
            continue
        for slot in (*newest.earlier(), newest):
            try:
                accounts = read_accounts(slot)
            except SlotError as error:
                yield number, slot, error
                continue
            for account in accounts:
                yield number, slot, account


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


def _shown(value: object) -> str:
    return "" if value is None else str(value).removesuffix("+00:00")
