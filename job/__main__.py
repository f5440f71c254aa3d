"""`python -m job`: runs one trial; other verbs look at the sweep or run all of it."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    # Before the imports, which take half a second: process 1 without a handler hears no SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))

import argparse
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import job
from job.errors import VOLUME_FULL, ExitCode, JobError, OutageError
from job.log import log, mask_secrets, set_up_logging
from job.plan.arguments import plan_arguments
from job.report.arguments import best_arguments, report_arguments, status_arguments
from job.settings import Settings, load_settings, variable
from job.verbs import add_exclude, add_gc, add_redo, run_exclude, run_gc, run_redo

if TYPE_CHECKING:
    from job.ledger import Ledger

TERMINATION_LOG = Path("/dev/termination-log")  # shown by `kubectl describe pod`
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
        if error.errno in VOLUME_FULL:
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

    code, last_words = run_one(_settings())
    # The trial says its own end, unless it died without a word.
    return code if last_words is None else _last_words(code, last_words)


def _queue(_options: argparse.Namespace) -> int:
    from job.supervisor import run_queue

    return _last_words(*run_queue(_settings()))


def _trial(options: argparse.Namespace) -> int:
    from job.child import follow_rank_0, run_as_child

    settings = _settings()
    if options.rank:  # one more GPU of a trial; the last words are rank 0's
        return follow_rank_0(settings, options.rank, options.meeting)
    line = run_as_child(settings, options.pulse_fd, options.meeting, die=_end_hung)
    return _last_words(ExitCode.OK, line)


def _end_hung(reason: str) -> None:
    os._exit(_last_words(ExitCode.OUTAGE, reason))  # the main thread would never get there


def _trial_arguments(parser: argparse.ArgumentParser) -> None:
    # Given by the parent.
    parser.add_argument("--pulse-fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", type=Path, help=argparse.SUPPRESS)


def _open_ledger() -> tuple[Settings, Ledger]:
    from job.report.commands import open_ledger

    settings = _settings(dataset_uri=NO_ROWS)
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
    from job.spec import load_sweep_file
    from job.sweep.wandb import create_sweep, next_steps

    settings = _settings(dataset_uri="not-needed", output_uri="not-needed")
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
    from job.mirror.confirmed import mirror_all
    from job.wandb_client import check_wanted

    check_wanted(settings)
    done, missing = mirror_all(settings, ledger)
    if done < missing:
        raise OutageError(f"W&B has confirmed {done} of {missing} trials; run this again")
    return _last_words(ExitCode.OK, f"W&B has all committed trials, {done} of them new")


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
    "trial": Verb(_trial, "run one trial in this very process", _trial_arguments),
    "queue": Verb(_queue, "run all trials of the sweep, one after another"),
    "plan": Verb(_plan, "say what the sweep will need, take and cost; no GPU", plan_arguments),
    "status": Verb(_status, "print the sweep's slots", status_arguments),
    "report": Verb(_report, "write a page about the sweep, and a summary", report_arguments),
    "best": Verb(_best, "print, download or merge the best adapter", best_arguments),
    "redo": Verb(partial(_change, run_redo), "begin a slot again, from step 0", add_redo),
    "exclude": Verb(partial(_change, run_exclude), "take a slot out of the sweep", add_exclude),
    "gc": Verb(partial(_change, run_gc), "delete what nothing refers to any more", add_gc),
    "sweep": Verb(
        _sweep_create,
        "`sweep create`: register the sweep file with W&B",
        lambda parser: parser.add_argument("action", choices=["create"]),
    ),
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
    # The Dockerfile sets IMAGE_REVISION to the commit that the image was built from.
    commit = os.environ.get("IMAGE_REVISION", "not built as an image")
    parser.add_argument(
        "--version", action="version", version=f"job {job.__version__} (commit: {commit})"
    )
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
