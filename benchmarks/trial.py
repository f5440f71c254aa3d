"""Where a trial's seconds go, and our training against a padded `transformers.Trainer`.

`make bench`: one CPU thread, a random model of 2.0 M parameters. Prints tables; asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.shapes import make_recipe
from benchmarks.trainer_peer import train_with_trainer
from job.data.samples import SampleTable
from job.data.table_parquet import read_table
from job.demo.docstrings import write_rows
from job.demo.run import SETTINGS
from job.ledger.records import Recipe
from job.training.memory import CPU_TOKEN_BUDGET
from job.training.model import add_adapters, load_base
from job.training.state import TrainState
from job.training.trainer import Trainer
from tests.tiny_model import make_base
from tests.tiny_tokenizer import byte_level_tokenizer

ROUNDS = 5  # of each side in turn; medians are shown
STEPS = 12  # a round; the first two are not counted
CPU = torch.device("cpu")


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    console = Console(width=100, highlight=False)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread,"
        f" Python {platform.python_version()}, torch {torch.__version__}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl")
        base = make_base(
            folder / "base",
            vocab_size=2048,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            max_position_embeddings=2048,
        )
        byte_level_tokenizer().save_pretrained(base)
        for slot in (0, 1):  # the first on a cold work folder, the next on a warm one
            console.print(_phase_table(*_run_trial(folder, base, slot)))
        (train_file,) = folder.glob("store/prepared/*/train-*.parquet")
        console.print(_training_table(base, read_table(train_file), folder))


def _run_trial(folder: Path, base: Path, slot: int) -> tuple[dict[str, Any], float, str]:
    """Run a slot: its result, the seconds it took, and the log's line of what was prepared."""
    environ = {
        **os.environ,
        **SETTINGS,
        "OMP_NUM_THREADS": "1",
        "JOB_MAX_STEPS": "45",
        "JOB_EVAL_ROWS": "96",
        "JOB_BASE_MODEL": str(base),
        "JOB_DATASET_URI": str(folder / "rows.jsonl"),
        "JOB_OUTPUT_URI": str(folder / "store"),
        "JOB_WORK_DIR": str(folder / "work"),
        "JOB_COMPLETION_INDEX": str(slot),
    }
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "job"], env=environ, check=True, stderr=subprocess.PIPE, text=True
    )
    wall_seconds = time.monotonic() - started
    (path,) = folder.glob(f"store/sweeps/*/slots/{slot:04d}/result.json")
    result: dict[str, Any] = json.loads(path.read_text())
    (prepared,) = [line for line in done.stderr.splitlines() if "prepared in" in line]
    return result, wall_seconds, prepared.partition("prepared in")[2]


def _phase_table(result: dict[str, Any], wall_seconds: float, prepared: str) -> Table:
    phases = dict(result["phase_seconds"])
    phases["start, exit"] = wall_seconds - sum(phases.values())
    table = Table(title=f"One trial: {result['steps']} steps", box=box.SIMPLE, title_justify="left")
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for phase, seconds in phases.items():
        table.add_row(phase, f"{seconds:.1f}", f"{seconds / wall_seconds:.0%}")
    table.add_row("all", f"{wall_seconds:.1f}", "100%")
    table.caption = f"prepare:{prepared}"
    return table


def _training_table(base: Path, table: SampleTable, folder: Path) -> Table:
    recipe = make_recipe(STEPS, learning_rate=5e-3, lora_dropout=0.0)
    ours, theirs, last_losses = [], [], []
    for _ in range(ROUNDS):  # in turn, so that a slow minute hits both
        trainer = Trainer(_model(base, recipe), recipe, device=CPU, token_budget=CPU_TOKEN_BUDGET)
        state = TrainState()
        mine = [trainer.step(table, state) for _ in range(STEPS)]
        peer = train_with_trainer(_model(base, recipe), table, recipe, folder / "trainer")
        num_tokens = sum(step.num_tokens for step in mine[2:])
        ours.append(num_tokens / sum(step.seconds for step in mine[2:]))
        theirs.append(num_tokens / sum(step.seconds for step in peer[2:]))
        last_losses = [mine[-1].train_loss, peer[-1].loss]
    shown = Table(
        title=f"Training: real (non-padding) tokens/s, median of {ROUNDS} rounds in turn",
        box=box.SIMPLE,
        title_justify="left",
    )
    for column in ("", "tokens/s", "lowest", "highest", f"loss at step {STEPS}"):
        shown.add_column(column, justify="left" if not column else "right")
    names = ("job", "transformers.Trainer, padded")
    for name, rates, loss in zip(names, (ours, theirs), last_losses, strict=True):
        median = statistics.median(rates)
        shown.add_row(
            name, f"{median:.0f}", f"{min(rates):.0f}", f"{max(rates):.0f}", f"{loss:.5f}"
        )
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    shown.add_row("ratio, median of rounds", f"{ratio:.2f}")
    return shown


def _model(base: Path, recipe: Recipe) -> Any:
    return add_adapters(load_base(str(base), None, CPU), recipe)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
