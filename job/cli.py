"""The command line: one table of verbs with words and options; `verbs.py` has what they do."""

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
from job import verbs
from job.settings import Settings, variable
from job.verbs import Ending

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


_SWEEP_URI = "JOB_OUTPUT_URI=s3://bucket/prefix"
_TRIAL_URIS = f"JOB_DATASET_URI=rows.jsonl {_SWEEP_URI}"
VERBS = {
    "run": Verb(
        verbs.run, "run one trial as a supervised child process (the default)", f"{_TRIAL_URIS} job"
    ),
    "trial": Verb(
        verbs.trial,
        "run one trial in this very process",
        f"{_TRIAL_URIS} job trial",
        _trial_options,
    ),
    "queue": Verb(
        verbs.queue,
        "run all trials of the sweep, JOB_WORKERS at once",
        f"{_TRIAL_URIS} JOB_WORKERS=auto job queue",
    ),
    "plan": Verb(
        verbs.plan,
        "say what the sweep will need, take and cost; prepares its rows, needs no GPU",
        f"{_TRIAL_URIS} JOB_GPU_HOURLY_USD=0.35 job plan",
        _plan_options,
    ),
    "stage": Verb(
        verbs.stage,
        "copy the hub's base model into the bucket once, or check the copy",
        f"{_SWEEP_URI} job stage",
        _json_option,
    ),
    "status": Verb(
        verbs.status, "print the sweep's slots", f"{_SWEEP_URI} job status --watch", _status_options
    ),
    "report": Verb(
        verbs.report,
        "write a page about the sweep, and a summary",
        f"{_SWEEP_URI} job report --output .",
        _report_options,
    ),
    "best": Verb(
        verbs.best,
        "print, download, merge or push the best adapter",
        f"{_SWEEP_URI} job best --download adapter",
        _best_options,
    ),
    "answers": Verb(
        verbs.answers,
        "have the untuned base and the best adapters answer held-out prompts",
        f"{_SWEEP_URI} job answers --rows 64 --match number",
        _answers_options,
    ),
    "redo": Verb(
        verbs.redo, "begin a slot again, from step 0", f"{_SWEEP_URI} job redo 3", _redo_options
    ),
    "exclude": Verb(
        verbs.exclude,
        "take a slot out of the sweep",
        f"{_SWEEP_URI} job exclude 3 --reason 'wrong rows'",
        _exclude_options,
    ),
    "gc": Verb(
        verbs.gc,
        "delete what nothing refers to any more",
        f"{_SWEEP_URI} job gc --dry-run",
        _gc_options,
    ),
    "sweep": Verb(
        verbs.sweep,
        "`sweep create`: register the sweep file with W&B",
        "WANDB_API_KEY=... JOB_SWEEP_FILE=sweep.yaml job sweep create",
        _sweep_options,
    ),
    "demo": Verb(
        verbs.demo,
        "run a small sweep of a real model of 135 M parameters, fetched once, on the CPU",
        "JOB_NUM_TRIALS=6 job demo",
    ),
}
