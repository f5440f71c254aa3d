"""The command line: one table of verbs with their words, options and functions.

What a verb needs is imported inside its function, so that `--help` stays quick.
"""

from __future__ import annotations

import json
import os
from argparse import (
    SUPPRESS,
    ArgumentParser,
    ArgumentTypeError,
    Namespace,
    RawDescriptionHelpFormatter,
)
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic.fields import FieldInfo

import job
from job.environment import mend
from job.errors import ExitCode, HeldError, OutageError, SettingsError
from job.log import last_words, log
from job.process.workspace import use_for_temporaries
from job.settings import NOT_NEEDED, Settings, variable
from job.variables import load_settings

if TYPE_CHECKING:
    from job.ledger.ledger import Ledger
    from job.ledger.slot import Slot

EXAMPLES = """\
examples:
  JOB_DATASET_URI=rows.jsonl JOB_OUTPUT_URI=out python -m job          one trial: first open slot
  JOB_DATASET_URI=rows.jsonl JOB_OUTPUT_URI=out python -m job queue    all trials, one after another
  JOB_DATASET_URI=rows.jsonl JOB_OUTPUT_URI=out python -m job status   what the bucket holds
  python -m job demo                                                   all of it on a laptop, no GPU

exit codes: 0 committed or nothing to do, 64 settings, 65 data, 69 slot, 70 bug, 72 GPU,
            74 store or network, 75 preempted, 77 credentials
"""


# How a verb ends: None, with 0 and without a word; a last line, with 0; or an exit code with its
# last line, None where that was said already.
Ending: TypeAlias = str | tuple[int, str | None] | None


@dataclass(frozen=True)
class Verb:
    """A word on the command line."""

    run: Callable[[Namespace], Ending]
    help: str
    example: str
    add_options: Callable[[ArgumentParser], None] = lambda _: None


def parse(arguments: list[str] | None) -> Namespace:
    """The command line; `verb` is `run` without a word. Exits as argparse does."""
    heading = "settings (environment variables, defaults in brackets)"
    settings = "\n".join(
        f"  {variable(name):34} {info.description}{_default(info)}"
        for name, info in Settings.model_fields.items()
        if info.description
    )
    parser = ArgumentParser(
        prog="job",
        description=f"{job.__doc__}\n\n{heading}:\n{settings}",
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    # The Dockerfile sets IMAGE_REVISION to the commit that the image was built from.
    commit = os.environ.get("IMAGE_REVISION", "not built as an image")
    version = f"job {job.__version__} (commit: {commit})"
    parser.add_argument("--version", action="version", version=version)
    # Given by a demo: the verb ends with the process that has this id.
    parser.add_argument("--with-parent", type=int, help=SUPPRESS)
    words = parser.add_subparsers(title="verbs", dest="verb", metavar="verb")
    for name, verb in VERBS.items():
        verb.add_options(
            words.add_parser(
                name,
                help=verb.help,
                description=verb.help,
                epilog=f"example: {verb.example}",
                formatter_class=RawDescriptionHelpFormatter,
            )
        )
    options = parser.parse_args(arguments)
    options.verb = options.verb or "run"
    return options


def _default(info: FieldInfo) -> str:
    """' (12)' behind a setting's meaning, unless that says what happens without it."""
    if info.is_required():
        return " (required)"
    if info.default is None:
        return "" if "default:" in (info.description or "") else " (none)"
    return f" ({info.default})"


# Values are read by the verbs, not by argparse: a mistake is then one line. So what is required is
# optional for argparse, and the usage is written out.


def _path(text: str) -> Path:
    """A path; of an empty one, as from a variable that is not set, `Path` would make `.`."""
    if not text:
        raise ArgumentTypeError("is empty; give a path, or . for this folder")
    return Path(text)


def _json_option(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="what was done, for a program")


def _trial_options(parser: ArgumentParser) -> None:
    # Given by the parent.
    parser.add_argument("--heartbeat-fd", type=int, help=SUPPRESS)
    parser.add_argument("--of-queue", action="store_true", help=SUPPRESS)
    parser.add_argument("--worker", type=int, help=SUPPRESS)


def _plan_options(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the numbers, for a program")
    parser.add_argument(
        "--price",
        action="append",
        metavar="CARD=USD",
        help="compare kinds of card by their price an hour: --price t4=0.15 --price l4=0.28",
    )


def _status_options(parser: ArgumentParser) -> None:
    parser.add_argument("--attempts", action="store_true", help="also every attempt and its cost")
    form = parser.add_mutually_exclusive_group()
    again = "again every 10 s, until no slot can change any more or Ctrl-C"
    form.add_argument("--watch", action="store_true", help=again)
    form.add_argument("--json", action="store_true", help="everything, for a program")
    form.add_argument(
        "--prometheus",
        nargs="?",
        const=Path("-"),
        type=_path,
        metavar="FILE",
        help="for node_exporter's textfile collector; FILE is replaced in one step",
    )


def _report_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=_path,
        metavar="DIR",
        help="write report.html and report.md to this folder instead of to the bucket",
    )
    _json_option(parser)
    parser.add_argument(
        "--mirror", action="store_true", help="write none, bring W&B up to date with the bucket"
    )


def _best_options(parser: ArgumentParser) -> None:
    parser.add_argument("--slot", metavar="N", help="another trial than the best one")
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--download", type=_path, metavar="DIR", help="fetch the adapter, every byte checked"
    )
    way.add_argument(
        "--merge",
        type=_path,
        metavar="DIR",
        help="write base and adapter as one fp16 model, by the way that is measured to be better",
    )
    way.add_argument(
        "--push", metavar="OWNER/NAME", help="upload the adapter to the Hugging Face hub"
    )
    parser.add_argument("--merged", action="store_true", help="of --push: the merged model instead")
    parser.add_argument(
        "--public", action="store_true", help="of --push: a new repository is public"
    )
    parser.add_argument(
        "--onto",
        choices=["16bit", "4bit"],
        help="of a merge: into the base's own weights, or into those that it was trained on",
    )
    base = "of a merge: the model that a quantised base was made of, for its 16-bit weights"
    parser.add_argument("--base", metavar="ID", help=base)
    _json_option(parser)


def _answers_options(parser: ArgumentParser) -> None:
    parser.add_argument("--rows", default="16", metavar="N", help="held-out rows to answer (16)")
    parser.add_argument("--best", default="3", metavar="K", help="adapters, the best ones (3)")
    parser.add_argument("--max-new-tokens", default="128", metavar="N", help="of an answer (128)")
    rule = "compare the answers with the rows': exact, number (the last one), regex:PATTERN"
    parser.add_argument("--match", metavar="RULE", help=rule)
    parser.add_argument("--json", action="store_true", help="everything, for a program")


def _redo_options(parser: ArgumentParser) -> None:
    parser.usage = "%(prog)s [-h] [--json] SLOT"
    parser.add_argument("slot", nargs="?", metavar="SLOT", help="its number")
    _json_option(parser)


def _exclude_options(parser: ArgumentParser) -> None:
    parser.usage = "%(prog)s [-h] [--json] --reason TEXT SLOT"
    parser.add_argument("slot", nargs="?", metavar="SLOT", help="its number")
    parser.add_argument("--reason", metavar="TEXT", help="why, for those who come later")
    _json_option(parser)


def _gc_options(parser: ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="say it, delete nothing")
    parser.add_argument(
        "--old-generations",
        action="store_true",
        help="also what slots held before a redo that is committed",
    )
    hours = (
        "prepared data, bases and probes go if an earlier gc, N hours ago, found them unused (24)"
    )
    parser.add_argument("--unused-hours", default="24", metavar="N", help=hours)
    _json_option(parser)


def _sweep_options(parser: ArgumentParser) -> None:
    parser.add_argument("action", choices=["create"])


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


def _run(_options: Namespace) -> Ending:
    from job.supervisor import run_one

    return run_one(_settings())


def _queue(_options: Namespace) -> Ending:
    from job.supervisor import run_queue

    return run_queue(_settings())


def _trial(options: Namespace) -> Ending:
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


def _plan(options: Namespace) -> Ending:
    from job.plan.command import run_plan

    run_plan(options, _settings())
    return None


def _status(options: Namespace) -> Ending:
    from job.report.commands import show_status

    show_status(options, *_open_ledger())
    return None


def _report(options: Namespace) -> Ending:
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


def _best(options: Namespace) -> Ending:
    from job.report.commands import show_best

    show_best(options, *_open_ledger())
    return None


def _answers(options: Namespace) -> Ending:
    from job.report.answers import show_answers

    show_answers(options, *_open_ledger())
    return None


def _redo(options: Namespace) -> Ending:
    from job.ledger.redo import redo

    slot = _open_slot(options)
    done = redo(slot)
    if options.json:
        generation = slot.ledger.slot(slot.number).generation
        _print_json({"slot": slot.number, "generation": generation, "message": done})
    return done


def _exclude(options: Namespace) -> Ending:
    from job.ledger.redo import exclude

    reason = read_reason(options.reason)
    slot = _open_slot(options)
    done = exclude(slot, reason)
    if options.json:
        _print_json({"slot": slot.number, "reason": slot.exclusion(), "message": done})
    return done


def _gc(options: Namespace) -> Ending:
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


def _stage(options: Namespace) -> Ending:
    from job.staged_base import stage
    from job.trial.identity import base_revision

    settings, ledger = _open_ledger()
    staged = stage(
        ledger.store,
        settings.base_model,
        base_revision(settings, ledger),
        settings.work_dir,
        60 * settings.outage_minutes,
    )
    if options.json:
        _print_json(staged._asdict())
    return staged.summary


def _sweep(_options: Namespace) -> Ending:
    from job.trial.identity import load_sweep_file
    from job.wandb.sweeps import create_sweep, next_steps

    settings = _settings(dataset_uri=NOT_NEEDED, output_uri=NOT_NEEDED)
    sweep = create_sweep(settings, load_sweep_file(settings))
    print(next_steps(settings, sweep))
    return None


def _demo(_options: Namespace) -> Ending:
    from job.demo.run import run_demo

    warnings, errors = mend(os.environ)
    if errors:
        raise SettingsError("\n".join(errors))
    for warning in warnings:
        log.warning("%s", warning)
    return run_demo(), None


_SWEEP_URI = "JOB_OUTPUT_URI=s3://bucket/prefix"
_TRIAL_URIS = f"JOB_DATASET_URI=rows.jsonl {_SWEEP_URI}"
VERBS = {
    "run": Verb(
        _run, "run one trial as a supervised child process (the default)", f"{_TRIAL_URIS} job"
    ),
    "trial": Verb(
        _trial, "run one trial in this very process", f"{_TRIAL_URIS} job trial", _trial_options
    ),
    "queue": Verb(
        _queue,
        "run all trials of the sweep, JOB_WORKERS at once",
        f"{_TRIAL_URIS} JOB_WORKERS=auto job queue",
    ),
    "plan": Verb(
        _plan,
        "say what the sweep will need, take and cost; prepares its rows, needs no GPU",
        f"{_TRIAL_URIS} JOB_GPU_HOURLY_USD=0.35 job plan",
        _plan_options,
    ),
    "stage": Verb(
        _stage,
        "copy the hub's base model into the bucket once, or check the copy",
        f"{_SWEEP_URI} job stage",
        _json_option,
    ),
    "status": Verb(
        _status, "print the sweep's slots", f"{_SWEEP_URI} job status --watch", _status_options
    ),
    "report": Verb(
        _report,
        "write a page about the sweep, and a summary",
        f"{_SWEEP_URI} job report --output .",
        _report_options,
    ),
    "best": Verb(
        _best,
        "print, download, merge or push the best adapter",
        f"{_SWEEP_URI} job best --download adapter",
        _best_options,
    ),
    "answers": Verb(
        _answers,
        "have the untuned base and the best adapters answer held-out prompts",
        f"{_SWEEP_URI} job answers --rows 64 --match number",
        _answers_options,
    ),
    "redo": Verb(
        _redo, "begin a slot again, from step 0", f"{_SWEEP_URI} job redo 3", _redo_options
    ),
    "exclude": Verb(
        _exclude,
        "take a slot out of the sweep",
        f"{_SWEEP_URI} job exclude 3 --reason 'wrong rows'",
        _exclude_options,
    ),
    "gc": Verb(
        _gc,
        "delete what nothing refers to any more",
        f"{_SWEEP_URI} job gc --dry-run",
        _gc_options,
    ),
    "sweep": Verb(
        _sweep,
        "`sweep create`: register the sweep file with W&B",
        "WANDB_API_KEY=... JOB_SWEEP_FILE=sweep.yaml job sweep create",
        _sweep_options,
    ),
    "demo": Verb(
        _demo,
        "run a small sweep of a real model of 135 M parameters, fetched once, on the CPU",
        "JOB_NUM_TRIALS=6 job demo",
    ),
}
