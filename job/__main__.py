"""`python -m job`: runs one trial; other verbs look at the sweep or run all of it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

if __name__ == "__main__":

    def _end_at_once(*_: object) -> None:
        """75 with its last line, wherever an import stands: no lock, no buffer, no log yet."""
        verb = sys.argv[1] if sys.argv[1:] else "run"
        is_trial = verb in ("run", "trial", "queue")
        outlook = b" before the trial began" if is_trial else b""
        words = b"exit 75 (preempted): told to end%s\n" % outlook
        with contextlib.suppress(OSError):
            os.write(2, words)
        with contextlib.suppress(OSError):
            os.write(os.open("/dev/termination-log", os.O_WRONLY | os.O_TRUNC), words)
        sys.exit(75)

    # Before the imports, which take half a second: process 1 without a handler hears no SIGTERM.
    signal.signal(signal.SIGTERM, _end_at_once)

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from job.command_line import parse
from job.errors import VOLUME_FULL, ExitCode, HeldError, JobError, OutageError
from job.log import log, mask_secrets, set_up_logging
from job.settings import Settings, load_settings
from job.verbs import run_exclude, run_gc, run_redo

if TYPE_CHECKING:
    from job.ledger.ledger import Ledger

TERMINATION_LOG = Path("/dev/termination-log")  # shown by `kubectl describe pod`
NOT_NEEDED = "not-needed"  # a required URI, for verbs that do without it


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the verb, turn its end into an exit code and a last line."""
    try:
        options = parse(arguments)
    except SystemExit as end:  # argparse's 2 is no code of ours
        return ExitCode.SETTINGS if end.code else ExitCode.OK
    set_up_logging(os.environ.get("JOB_LOG_FORMAT", "text"))
    try:
        return _guarded(partial(_VERBS[options.verb], options))
    except JobError as error:
        return _last_words(error.exit_code, str(error))
    except KeyboardInterrupt:
        return _last_words(ExitCode.PREEMPTED, "interrupted")
    except Exception:
        log.exception("a bug in the job")
        return _last_words(ExitCode.BUG, "a bug in the job, see the traceback")


def _guarded(verb: Callable[[], int]) -> int:
    try:
        return verb()
    except OSError as error:
        if error.errno in VOLUME_FULL:
            place = error.filename or "the volume of JOB_WORK_DIR, or stdout's"
            raise OutageError(f"{place}: no space left: free or enlarge it") from error
        raise


def _last_words(code: int, message: str) -> int:
    """Log the line that people look for first, and leave it where Kubernetes shows it."""
    line = mask_secrets(f"exit {int(code)} ({ExitCode(code).name.lower()}): {message}")
    (log.info if code == ExitCode.OK else log.error)("%s", line)
    with contextlib.suppress(OSError):
        if TERMINATION_LOG.exists():
            TERMINATION_LOG.write_text(line[:4096])
    return int(code)


def _settings(**given: str) -> Settings:
    settings, warnings = load_settings(**given)
    for warning in warnings:
        log.warning("%s", warning)
    return settings


def _run(_options: argparse.Namespace) -> int:
    from job.supervisor import run_one

    code, last_words = run_one(_settings())
    # The trial says its own end, unless it died without a word.
    return code if last_words is None else _last_words(code, last_words)


def _queue(_options: argparse.Namespace) -> int:
    from job.supervisor import run_queue

    return _last_words(*run_queue(_settings()))


def _trial(options: argparse.Namespace) -> int:
    from job.child import run_as_child

    settings = _settings()
    try:
        line = run_as_child(settings, options.pulse_fd, die=_end_hung)
    except HeldError as error:
        if not options.of_queue:
            raise
        slot = settings.completion_index  # no end of the queue, so no last words either
        log.info("slot %s: held by another worker; the queue goes on", slot)
        return error.exit_code
    return _last_words(ExitCode.OK, line)


def _end_hung(reason: str) -> None:
    os._exit(_last_words(ExitCode.OUTAGE, reason))  # the main thread would never get there


def _open_ledger() -> tuple[Settings, Ledger]:
    from job.report.commands import open_ledger

    settings = _settings(dataset_uri=NOT_NEEDED)
    return settings, open_ledger(settings)


def _plan(options: argparse.Namespace) -> int:
    from job.plan.command import run_plan

    run_plan(options, _settings())
    return ExitCode.OK


def _status(options: argparse.Namespace) -> int:
    from job.report.commands import show_status

    show_status(options, *_open_ledger())
    return ExitCode.OK


def _best(options: argparse.Namespace) -> int:
    from job.report.commands import show_best

    show_best(options, *_open_ledger())
    return ExitCode.OK


def _change(
    verb: Callable[[Settings, Ledger, argparse.Namespace], str], options: argparse.Namespace
) -> int:
    return _last_words(ExitCode.OK, verb(*_open_ledger(), options))


def _sweep_create(_options: argparse.Namespace) -> int:
    from job.trial.identity import load_sweep_file
    from job.wandb.sweeps import create_sweep, next_steps

    settings = _settings(dataset_uri=NOT_NEEDED, output_uri=NOT_NEEDED)
    sweep = create_sweep(settings, load_sweep_file(settings))
    print(next_steps(settings, sweep))
    return ExitCode.OK


def _report(options: argparse.Namespace) -> int:
    from job.report.commands import write_report

    settings, ledger = _open_ledger()
    if options.mirror:
        return _mirror(settings, ledger)
    write_report(options, settings, ledger)
    return ExitCode.OK


def _mirror(settings: Settings, ledger: Ledger) -> int:
    from job.wandb.client import check_wanted
    from job.wandb.confirmed import mirror_all

    check_wanted(settings)
    done, missing = mirror_all(settings, ledger)
    if done < missing:
        raise OutageError(f"W&B has confirmed {done} of {missing} trials; run this again")
    return _last_words(ExitCode.OK, f"W&B has all committed trials, {done} of them new")


def _demo(_options: argparse.Namespace) -> int:
    from job.demo.run import run_demo

    return run_demo()


# What a verb needs is imported inside its function: --help stays quick.
_VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "trial": _trial,
    "queue": _queue,
    "plan": _plan,
    "status": _status,
    "report": _report,
    "best": _best,
    "redo": partial(_change, run_redo),
    "exclude": partial(_change, run_exclude),
    "gc": partial(_change, run_gc),
    "sweep": _sweep_create,
    "demo": _demo,
}


if __name__ == "__main__":
    sys.exit(main())
