"""The options of `status`, `report` and `best`; apart, so that `job --help` imports little."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path


def status_arguments(parser: ArgumentParser) -> None:
    """`--watch`, `--json`, `--prometheus`."""
    parser.epilog = "example: JOB_OUTPUT_URI=s3://bucket/prefix job status --watch"
    parser.add_argument("--attempts", action="store_true", help="also every attempt and its cost")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--watch", action="store_true", help="again every 10 s, until Ctrl-C")
    form.add_argument("--json", action="store_true", help="everything, for a program")
    form.add_argument(
        "--prometheus",
        nargs="?",
        const=Path("-"),
        type=Path,
        metavar="FILE",
        help="for node_exporter's textfile collector; FILE is replaced in one step",
    )


def report_arguments(parser: ArgumentParser) -> None:
    """`--output`."""
    parser.epilog = "example: JOB_OUTPUT_URI=s3://bucket/prefix job report --output ."
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write report.html and report.md to this folder instead of to the bucket",
    )
    parser.add_argument(
        "--mirror", action="store_true", help="write none, bring W&B up to date with the bucket"
    )


def best_arguments(parser: ArgumentParser) -> None:
    """`--download`, `--merge`."""
    parser.epilog = "example: JOB_OUTPUT_URI=s3://bucket/prefix job best --download adapter"
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--download", type=Path, metavar="DIR", help="fetch the adapter, every byte checked"
    )
    way.add_argument(
        "--merge", type=Path, metavar="DIR", help="write base and adapter as one fp16 model"
    )
