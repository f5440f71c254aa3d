"""The benchmarks run, smallest of all. `pytest tests/test_benchmarks.py`"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow


def test_both_sides_train_and_the_table_has_their_ratio() -> None:
    command = [sys.executable, "-m", "benchmarks.training", "--shapes", "smoke", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--steps", "3", "--sides", "job,trainer"],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    job = next(row for row in rows if row[:1] == ["job"])
    assert float(job[1]) > 0
    assert any(row[:1] == ["transformers.Trainer,"] for row in rows)


def test_choosers_meet_the_same_losses_and_the_engine_is_ahead_of_random_search() -> None:
    from benchmarks.lora_worlds import worlds
    from benchmarks.sweep import built_in, regrets

    by_name = {world.name: world for world in worlds("two")}
    ours = regrets(list(built_in("two", 1, 4, "bayes")), by_name)
    chance = regrets(list(built_in("two", 1, 4, "random")), by_name)
    assert ours.shape == chance.shape == (len(by_name), 4)
    assert (ours >= -0.5).all(), "the best point is the best"
    assert ours[:, -1].mean() < chance[:, -1].mean() / 2


def test_rows_have_the_lengths_that_the_benchmark_names() -> None:
    from benchmarks.shapes import log_normal_rows

    table = log_normal_rows(4000, 100)
    lengths = table.lengths
    assert abs(float(np.median(lengths)) - 200) < 15
    assert (int(lengths.min()), int(lengths.max())) == (16, 1024)
    assert 0.7 < float(np.log(lengths).std()) < 0.85  # 0.8, cut at 1024
