"""`python -m job`: runs one trial; other verbs look at the sweep or run all of it."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    # Before the imports, which take half a second: process 1 without a handler hears no SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))

import argparse
import contextlib
import ctypes
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import job
from job.errors import ExitCode, JobError, OutageError
from job.log import log, mask_secrets, set_up_logging
from job.plan.arguments import plan_arguments
from job.report.arguments import best_arguments, report_arguments, status_arguments
from job.settings import Settings, load_settings, variable
from job.stop import Stop

TERMINATION_LOG = Path("/dev/termination-log")  # shown by `kubectl describe pod`
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
NO_ROWS = "not-needed"  # JOB_DATASET_URI of verbs that read no rows

EXAMPLES = """\
examples:
  JOB_DATASET_URI=rows.jsonl JOB_OUTPUT_URI=out python -m job          one trial: first open slot
  JOB_DATASET_URI=rows.jsonl JOB_OUTPUT_URI=out python -m job queue    all trials, one after another
  JOB_DATASET_URI=rows.jsonl JOB_OUTPUT_URI=out python -m job status   what the bucket holds
  python -m job demo                                                   all of it on a laptop, no GPU

exit codes: 0 committed or nothing to do, 64 settings, 65 data, 69 slot, 70 bug, 72 GPU,
            74 store or network, 75 preempted, 77 credentials
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the verb, turn its end into an exit code and a last line."""
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as end:  # argparse's 2 is no code of ours
        return ExitCode.SETTINGS if end.code else ExitCode.OK
    set_up_logging(os.environ.get("JOB_LOG_FORMAT", "text"))
    try:
        return _guarded(partial(_VERBS[options.verb or "run"].run, options))
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
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutageError(f"{error.filename}: no space left: free or enlarge it") from error
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

    code = run_one(_settings())
    if code == ExitCode.BUG:  # the trial may have died without a word
        return _last_words(code, "the trial ended by a bug or was killed, see above")
    return code


def _queue(_options: argparse.Namespace) -> int:
    from job.supervisor import run_queue

    return _last_words(*run_queue(_settings()))


def _trial(_options: argparse.Namespace) -> int:
    from job.trial import run_trial

    _end_with_parent()
    settings = _settings()
    stop = Stop(settings.grace_seconds)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop.set)
    return _last_words(ExitCode.OK, run_trial(settings, stop))


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM when our parent dies, even by SIGKILL (Linux; see prctl(2))."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _plan(options: argparse.Namespace) -> int:
    from job.plan.command import run_plan

    run_plan(options, _settings())
    return ExitCode.OK


def _status(options: argparse.Namespace) -> int:
    from job.report.commands import show_status

    show_status(options, _settings(dataset_uri=NO_ROWS))
    return ExitCode.OK


def _report(options: argparse.Namespace) -> int:
    from job.report.commands import write_report

    write_report(options, _settings(dataset_uri=NO_ROWS))
    return ExitCode.OK


def _best(options: argparse.Namespace) -> int:
    from job.report.commands import show_best

    show_best(options, _settings(dataset_uri=NO_ROWS))
    return ExitCode.OK


def _demo(_options: argparse.Namespace) -> int:
    from job.demo.run import run_demo

    return run_demo()


@dataclass(frozen=True)
class Verb:
    """A word on the command line; `run` takes the parsed line and gives the exit code."""

    run: Callable[[argparse.Namespace], int]
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], object] = lambda _: None


# Without a word, `run`. What a verb needs is imported inside its function: --help stays quick.
_VERBS = {
    "run": Verb(_run, "run one trial as a supervised child process (the default)"),
    "trial": Verb(_trial, "run one trial in this very process"),
    "queue": Verb(_queue, "run all trials of the sweep, one after another"),
    "plan": Verb(_plan, "say what the sweep will need, take and cost; no GPU", plan_arguments),
    "status": Verb(_status, "print the sweep's slots", status_arguments),
    "report": Verb(_report, "write a page about the sweep, and a summary", report_arguments),
    "best": Verb(_best, "print, download or merge the best adapter", best_arguments),
    "demo": Verb(_demo, "run a small sweep on generated data and a generated model, on the CPU"),
}


def _parser() -> argparse.ArgumentParser:
    settings = "\n".join(
        f"  {variable(name):34} {info.description}"
        for name, info in Settings.model_fields.items()
        if info.description
    )
    parser = argparse.ArgumentParser(
        prog="job",
        description=f"{job.__doc__}\n\nsettings (environment variables):\n{settings}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"job {job.__version__}")
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="verb")
    for name, verb in _VERBS.items():
        parser_of_verb = verbs.add_parser(
            name,
            help=verb.help,
            description=verb.help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_arguments(parser_of_verb)
    return parser


if __name__ == "__main__":
    sys.exit(main())
