"""The options of `plan`; apart, so that `job --help` imports little."""

from __future__ import annotations

from argparse import ArgumentParser


def plan_arguments(parser: ArgumentParser) -> None:
    """`--json`."""
    parser.epilog = (
        "example: JOB_DATASET_URI=rows.jsonl JOB_OUTPUT_URI=s3://bucket/out job plan\n\n"
        "It prepares the rows as the first trial would, and leaves them in the bucket for it."
    )
    parser.add_argument("--json", action="store_true", help="the numbers, for a program")
