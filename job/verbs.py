"""What each verb does: settings from the environment, options from the command line, its ending.

What a verb needs is imported inside its function, so that `--help` stays quick.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from typing import TYPE_CHECKING, Any, TypeAlias

from job.environment import mend
from job.errors import ExitCode, HeldError, OutageError, SettingsError
from job.log import last_words, log
from job.process.workspace import use_for_temporaries
from job.settings import NOT_NEEDED, Settings
from job.variables import load_settings

if TYPE_CHECKING:
    from job.ledger.ledger import Ledger
    from job.ledger.slot import Slot

# How a verb ends: None, with 0 and without a word; a last line, with 0; or an exit code with its
# last line, None where that was said already.
Ending: TypeAlias = str | tuple[int, str | None] | None


def read_reason(text: str | None) -> str:
    """Why a slot is excluded. Raises `SettingsError`."""
    reason = " ".join((text or "").split())
    if not reason or len(reason) > 500:
        raise SettingsError("exclude: --reason TEXT is needed, 1 to 500 characters")
    return reason


def read_hours(text: str) -> float:
    """How long something must have been unused, in hours. Raises `SettingsError`."""
    try:
        hours = float(text)
    except ValueError:
        hours = -1.0
    if not 0 <= hours <= 1e5:
        raise SettingsError(f"gc: --unused-hours is {text!r}; allowed: 0 to 100000")
    return hours


def _settings(*, tell: bool = True, **given: str) -> Settings:
    settings, warnings = load_settings(**given)
    for warning in warnings if tell else ():
        log.warning("%s", warning)
    use_for_temporaries(settings.work_dir)
    return settings


def _open_ledger() -> tuple[Settings, Ledger]:
    """The settings of a verb that reads no rows, and the ledger that they name."""
    from job.report.commands import open_ledger

    settings = _settings(dataset_uri=NOT_NEEDED)
    return settings, open_ledger(settings)


def _open_slot(options: Namespace) -> Slot:
    """The slot that a verb is to change, in its newest generation."""
    from job.ledger.ledger import check_sweep
    from job.ledger.redo import read_slot

    settings, ledger = _open_ledger()
    check_sweep(ledger)
    num_slots = ledger.num_slots(settings.num_trials)
    return ledger.slot(read_slot(options.slot, options.verb, num_slots))


def run(_options: Namespace) -> Ending:
    """Run one trial in a child process that is watched."""
    from job.supervisor import run_one

    return run_one(_settings())


def queue(_options: Namespace) -> Ending:
    """Run all trials of the sweep."""
    from job.supervisor import run_queue

    return run_queue(_settings())


def trial(options: Namespace) -> Ending:
    """Run one trial in this process."""
    from job.child import run_as_child

    settings = _settings(tell=options.heartbeat_fd is None)  # process 1 has told its warnings
    try:
        return run_as_child(settings, options.heartbeat_fd, worker=options.worker, die=_end_hung)
    except HeldError as error:
        if not options.of_queue:
            raise
        log.info("%s; the queue goes on", error)  # no end of the queue, so no last words either
        return error.exit_code, None


def _end_hung(reason: str) -> None:
    os._exit(last_words(ExitCode.OUTAGE, reason))  # the main thread would never get there


def plan(options: Namespace) -> Ending:
    """Print what the sweep will need."""
    from job.plan.command import run_plan

    run_plan(options, _settings())
    return None


def status(options: Namespace) -> Ending:
    """Print the sweep's slots."""
    from job.report.commands import show_status

    show_status(options, *_open_ledger())
    return None


def report(options: Namespace) -> Ending:
    """Write the page about the sweep, or bring W&B up to date."""
    from job.report.commands import write_report

    settings, ledger = _open_ledger()
    if options.mirror:
        return _mirror(settings, ledger)
    write_report(options, settings, ledger)
    return None


def _mirror(settings: Settings, ledger: Ledger) -> Ending:
    from job.wandb.client import check_wanted
    from job.wandb.confirmed import mirror_all

    check_wanted(settings)
    done, missing = mirror_all(settings, ledger)
    if done < missing:
        raise OutageError(f"W&B has confirmed {done} of {missing} trials; run this again")
    return f"W&B has all committed trials, {done} of them new"


def best(options: Namespace) -> Ending:
    """Print, fetch, merge or push the best adapter."""
    from job.report.commands import show_best

    show_best(options, *_open_ledger())
    return None


def answers(options: Namespace) -> Ending:
    """Have the base and the best adapters answer held-out prompts."""
    from job.report.answers import show_answers

    show_answers(options, *_open_ledger())
    return None


def redo(options: Namespace) -> Ending:
    """Begin a slot again."""
    from job.ledger import redo as ledger_redo

    slot = _open_slot(options)
    done = ledger_redo.redo(slot)
    if options.json:
        generation = slot.ledger.slot(slot.number).generation
        _print_json({"slot": slot.number, "generation": generation, "message": done})
    return done


def exclude(options: Namespace) -> Ending:
    """Take a slot out of the sweep."""
    from job.ledger import redo as ledger_redo

    reason = read_reason(options.reason)
    slot = _open_slot(options)
    done = ledger_redo.exclude(slot, reason)
    if options.json:
        _print_json({"slot": slot.number, "reason": slot.exclusion(), "message": done})
    return done


def gc(options: Namespace) -> Ending:
    """Delete what nothing refers to any more."""
    from job.ledger.garbage import collect
    from job.ledger.ledger import check_sweep

    unused_hours = read_hours(options.unused_hours)
    _, ledger = _open_ledger()
    check_sweep(ledger)
    collected = collect(
        ledger,
        dry_run=options.dry_run,
        old_generations=options.old_generations,
        unused_hours=unused_hours,
        say=(lambda _: None) if options.json else print,
    )
    if options.json:
        _print_json(collected.to_json())
    return collected.summary


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=1), flush=True)


def stage(options: Namespace) -> Ending:
    """Copy the base into the bucket."""
    from job import staged_base
    from job.trial.identity import base_revision

    settings, ledger = _open_ledger()
    staged = staged_base.stage(
        ledger.store,
        settings.base_model,
        base_revision(settings, ledger),
        settings.work_dir,
        60 * settings.outage_minutes,
    )
    if options.json:
        _print_json(staged._asdict())
    return staged.summary


def sweep(_options: Namespace) -> Ending:
    """Register the sweep file with W&B."""
    from job.trial.identity import load_sweep_file
    from job.wandb.sweeps import create_sweep, next_steps

    settings = _settings(dataset_uri=NOT_NEEDED, output_uri=NOT_NEEDED)
    sweep = create_sweep(settings, load_sweep_file(settings))
    print(next_steps(settings, sweep))
    return None


def demo(_options: Namespace) -> Ending:
    """Run the demo's sweep."""
    from job.demo.run import run_demo

    warnings, errors = mend(os.environ)
    if errors:
        raise SettingsError("\n".join(errors))
    for warning in warnings:
        log.warning("%s", warning)
    return run_demo(), None
