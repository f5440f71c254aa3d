"""What every attempt cost, where it ran, and why it ended, for a terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from job.errors import SlotError
from job.ledger.accounts import read_accounts
from job.ledger.ledger import Ledger
from job.ledger.watch import lease_key
from job.store.documents import Json, read_document

COLUMNS = ("slot", "attempt", "node", "from", "to", "steps", "GPU s", "wasted", "code", "reason")


def attempts_table(ledger: Ledger, num_trials: int) -> Table:
    """A line an attempt; times are for people, in UTC."""
    table = Table(box=box.SIMPLE)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("node", "reason") else "right")
    for slot in range(num_trials):
        try:
            for told in _accounts(ledger, slot):
                steps = f"{_shown(told['first_step'])}-{_shown(told['last_step'])}"
                ended = told.get("ended_at") or told.get("heard_at")
                values = (told["node"], told["started_at"], ended, steps, told["gpu_seconds"],
                          told.get("wasted_gpu_seconds"), told.get("exit_code"),
                          told.get("reason", "running"))  # fmt: skip
                table.add_row(str(slot), str(told["epoch"]), *map(_shown, values))
        except (SlotError, KeyError, TypeError, AttributeError) as error:  # hides no other slot
            table.add_row(str(slot), *[""] * (len(COLUMNS) - 2), f"damaged: {error}")
    return table


def _accounts(ledger: Ledger, slot: int) -> list[Json]:
    view = ledger.pin(slot)
    lease = read_document(ledger.store, lease_key(view, slot))
    return read_accounts(view, slot, lease.content if lease else None)


def _shown(value: object) -> str:
    return "" if value is None else str(value).removesuffix("+00:00")
