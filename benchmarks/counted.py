"""What a T4 would have to compute, move and hold, counted without one: `make bench-counted`.

Whole models of 1B to 8B on a fake card (`benchmarks.fake_cuda`), two optimizer steps of ours and
two of a padded `transformers.Trainer`'s. Its seconds are no measurement but a roofline: every
operation at 24 TFLOPS or 240 GB/s, whichever takes longer. Real steps take more on both sides.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.fake_cuda.library import run_with_fake_card, why_not
from benchmarks.shapes import SHAPES

SIDES = {"job": "job", "padded": "padded pairs, all layers recomputed"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="1b,3b,7b,8b", help=f"some of {','.join(SHAPES)}")
    arguments = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    console = Console(width=120, highlight=False)
    console.print(time.strftime("%Y-%m-%d"))
    for name in arguments.shapes.split(","):
        console.print(_table(name))


def _table(name: str) -> Table:
    config = {"max_position_embeddings": 4096, **SHAPES[name]}
    requests = [{"side": side, "config": config} for side in SIDES]
    with tempfile.TemporaryDirectory() as folder:
        output = run_with_fake_card(
            "benchmarks.fake_cuda.steps", json.dumps(requests), folder=Path(folder)
        )
    job, padded = json.loads(output.splitlines()[-1])
    shown = Table(
        title=f"{name}: {job['tokens']} real tokens on a fake T4 of 14.6 GiB",
        caption=f"job: {job['plan']}",
        box=box.SIMPLE,
        title_justify="left",
        caption_justify="left",
    )
    for column in ("", "TFLOP", "GB moved", "peak GB", "calls", "roofline s", "tokens/s", "ratio"):
        shown.add_column(column, justify="right" if column else "left")
    for side, counted in zip(SIDES.values(), (job, padded), strict=True):
        shown.add_row(side, *_row(counted, ratio_to=job))
    return shown


def _row(counted: dict[str, Any], *, ratio_to: dict[str, Any]) -> list[str]:
    return [
        f"{counted['flops'] / 1e12:.1f}",
        f"{counted['moved_bytes'] / 1e9:.0f}",
        f"{counted['peak_bytes'] / 1e9:.2f}",
        f"{counted['calls']}",
        f"{counted['seconds']:.2f}",
        f"{ratio_to['tokens'] / counted['seconds']:.0f}",
        f"{counted['seconds'] / ratio_to['seconds']:.2f}",
    ]


if __name__ == "__main__":
    main()
