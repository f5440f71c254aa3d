"""The words of the command line: each verb's help, options and example. Imports little."""

from __future__ import annotations

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

from pydantic.fields import FieldInfo

import job
from job.settings import Settings, variable

EXAMPLES = """\
examples:
  JOB_DATASET_URI=rows.jsonl JOB_OUTPUT_URI=out python -m job          one trial: first open slot
  JOB_DATASET_URI=rows.jsonl JOB_OUTPUT_URI=out python -m job queue    all trials, one after another
  JOB_DATASET_URI=rows.jsonl JOB_OUTPUT_URI=out python -m job status   what the bucket holds
  python -m job demo                                                   all of it on a laptop, no GPU

exit codes: 0 committed or nothing to do, 64 settings, 65 data, 69 slot, 70 bug, 72 GPU,
            74 store or network, 75 preempted, 77 credentials
"""


@dataclass(frozen=True)
class Verb:
    """A word on the command line."""

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


# Values are looked at by the verb, not by argparse: a mistake is then one line. So what is required
# is optional for argparse, and the usage is written out.


def _path(text: str) -> Path:
    """A path; of an empty one, as from a variable that is not set, `Path` would make `.`."""
    if not text:
        raise ArgumentTypeError("is empty; give a path, or . for this folder")
    return Path(text)


def _trial(parser: ArgumentParser) -> None:
    # Given by the parent.
    parser.add_argument("--pulse-fd", type=int, help=SUPPRESS)
    parser.add_argument("--of-queue", action="store_true", help=SUPPRESS)


def _plan(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the numbers, for a program")


def _status(parser: ArgumentParser) -> None:
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


def _report(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=_path,
        metavar="DIR",
        help="write report.html and report.md to this folder instead of to the bucket",
    )
    parser.add_argument(
        "--mirror", action="store_true", help="write none, bring W&B up to date with the bucket"
    )


def _best(parser: ArgumentParser) -> None:
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--download", type=_path, metavar="DIR", help="fetch the adapter, every byte checked"
    )
    way.add_argument(
        "--merge", type=_path, metavar="DIR", help="write base and adapter as one fp16 model"
    )


def _redo(parser: ArgumentParser) -> None:
    parser.usage = "%(prog)s [-h] SLOT"
    parser.add_argument("slot", nargs="?", metavar="SLOT", help="its number")


def _exclude(parser: ArgumentParser) -> None:
    parser.usage = "%(prog)s [-h] --reason TEXT SLOT"
    parser.add_argument("slot", nargs="?", metavar="SLOT", help="its number")
    parser.add_argument("--reason", metavar="TEXT", help="why, for those who come later")


def _gc(parser: ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="say it, delete nothing")
    parser.add_argument(
        "--old-generations",
        action="store_true",
        help="also what slots held before a redo that is committed",
    )
    hours = "prepared data and probes go if an earlier gc, N hours ago, found them unused (24)"
    parser.add_argument("--unused-hours", default="24", metavar="N", help=hours)


def _sweep(parser: ArgumentParser) -> None:
    parser.add_argument("action", choices=["create"])


_SWEEP = "JOB_OUTPUT_URI=s3://bucket/prefix"
_TRIAL = f"JOB_DATASET_URI=rows.jsonl {_SWEEP}"
VERBS = {
    "run": Verb("run one trial as a supervised child process (the default)", f"{_TRIAL} job"),
    "trial": Verb("run one trial in this very process", f"{_TRIAL} job trial", _trial),
    "queue": Verb("run all trials of the sweep, one after another", f"{_TRIAL} job queue"),
    "plan": Verb(
        "say what the sweep will need, take and cost; prepares its rows, needs no GPU",
        f"{_TRIAL} JOB_GPU_HOURLY_USD=0.35 job plan",
        _plan,
    ),
    "status": Verb("print the sweep's slots", f"{_SWEEP} job status --watch", _status),
    "report": Verb(
        "write a page about the sweep, and a summary", f"{_SWEEP} job report --output .", _report
    ),
    "best": Verb(
        "print, download or merge the best adapter", f"{_SWEEP} job best --download adapter", _best
    ),
    "redo": Verb("begin a slot again, from step 0", f"{_SWEEP} job redo 3", _redo),
    "exclude": Verb(
        "take a slot out of the sweep", f"{_SWEEP} job exclude 3 --reason 'wrong rows'", _exclude
    ),
    "gc": Verb("delete what nothing refers to any more", f"{_SWEEP} job gc --dry-run", _gc),
    "sweep": Verb(
        "`sweep create`: register the sweep file with W&B",
        "WANDB_API_KEY=... JOB_SWEEP_FILE=sweep.yaml job sweep create",
        _sweep,
    ),
    "demo": Verb(
        "run a small sweep on generated data and a generated model, on the CPU",
        "JOB_NUM_TRIALS=6 job demo",
    ),
}
