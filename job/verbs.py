"""The command line of the verbs that change a sweep: what they are given and say at the end.

Heavy imports sit inside: `--help` stays quick.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from job.ledger.ledger import Ledger
    from job.settings import Settings


def run_redo(settings: Settings, ledger: Ledger, options: argparse.Namespace) -> str:
    """`job redo SLOT`."""
    from job.ledger.ledger import check_sweep
    from job.ledger.redo import redo, slot_argument

    check_sweep(ledger)
    slot = slot_argument(options.slot, "redo", ledger.num_slots(settings.num_trials))
    return redo(ledger, slot)


def run_exclude(settings: Settings, ledger: Ledger, options: argparse.Namespace) -> str:
    """`job exclude SLOT --reason TEXT`."""
    from job.ledger.ledger import check_sweep
    from job.ledger.redo import exclude, reason_argument, slot_argument

    reason = reason_argument(options.reason)
    check_sweep(ledger)
    slot = slot_argument(options.slot, "exclude", ledger.num_slots(settings.num_trials))
    return exclude(ledger.slot(slot), reason)


def run_gc(_settings: Settings, ledger: Ledger, options: argparse.Namespace) -> str:
    """`job gc [--dry-run] [--old-generations] [--unused-hours N]`."""
    from job.ledger.garbage import collect, hours_argument
    from job.ledger.ledger import check_sweep

    unused_hours = hours_argument(options.unused_hours)
    check_sweep(ledger)
    return collect(
        ledger,
        dry_run=options.dry_run,
        old_generations=options.old_generations,
        unused_hours=unused_hours,
        say=print,
    )
