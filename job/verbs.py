"""The command line of the verbs that change a sweep: their arguments, and what they say at the end.

Heavy imports sit inside: `--help` stays quick.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from job.ledger import Ledger
    from job.settings import Settings


def run_redo(settings: Settings, ledger: Ledger, options: argparse.Namespace) -> str:
    """`job redo SLOT`."""
    from job.operations import check_sweep, redo, slot_argument

    slot = slot_argument(options.slot, "redo", settings.num_trials)
    check_sweep(ledger)
    return redo(ledger, slot)


def run_exclude(settings: Settings, ledger: Ledger, options: argparse.Namespace) -> str:
    """`job exclude SLOT --reason TEXT`."""
    from job.operations import check_sweep, exclude, reason_argument, slot_argument

    slot = slot_argument(options.slot, "exclude", settings.num_trials)
    reason = reason_argument(options.reason)
    check_sweep(ledger)
    return exclude(ledger, slot, reason)


def run_gc(_settings: Settings, ledger: Ledger, options: argparse.Namespace) -> str:
    """`job gc [--dry-run]`."""
    from job.garbage import collect, hours_argument
    from job.operations import check_sweep

    unused_hours = hours_argument(options.unused_hours)
    check_sweep(ledger)
    return collect(
        ledger,
        dry_run=options.dry_run,
        old_generations=options.old_generations,
        unused_hours=unused_hours,
        say=print,
    )


# Values are looked at by the verb, not by argparse: a mistake is then one line.


def add_redo(parser: argparse.ArgumentParser) -> None:
    """Arguments of `redo`."""
    parser.add_argument("slot", nargs="?", metavar="SLOT", help="its number")


def add_exclude(parser: argparse.ArgumentParser) -> None:
    """Arguments of `exclude`."""
    parser.add_argument("slot", nargs="?", metavar="SLOT", help="its number")
    parser.add_argument("--reason", metavar="TEXT", help="why, for those who come later")


def add_gc(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gc`."""
    parser.add_argument("--dry-run", action="store_true", help="say it, delete nothing")
    parser.add_argument(
        "--old-generations", action="store_true", help="also what slots held before a redo"
    )
    hours = "prepared data and probes go if an earlier gc, N hours ago, found them unused (24)"
    parser.add_argument("--unused-hours", default="24", metavar="N", help=hours)
