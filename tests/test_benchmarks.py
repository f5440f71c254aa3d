"""The benchmarks run, smallest of all. `pytest tests/test_benchmarks.py`"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import forked

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "benchmarks").rglob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)
# Those of other environments: what they import there.
PEERS = {"sweep_peers": "optuna", "trl_peer": "trl", "unsloth_peer": "unsloth"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_starts_no_benchmark(name: str, tmp_path: Path) -> None:
    if (library := PEERS.get(name.removeprefix("benchmarks."))) is not None:
        pytest.importorskip(library)
    forked.with_torch()
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", name, "--help"]
    done = forked.run(command, env=environ, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert "-h, --help" in done.stdout


def test_the_page_of_verbs_has_the_rows_that_its_script_prints() -> None:
    from benchmarks.verbs import VERBS

    page = (ROOT / "benchmarks/verbs.md").read_text()
    assert re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE) == list(VERBS)


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


def test_peers_train_the_jobs_samples_in_the_jobs_order(tmp_path: Path) -> None:
    """They import nothing of the job, so order and targets are written a second time for them."""
    from benchmarks import peer
    from benchmarks.shapes import log_normal_rows, make_recipe
    from job.training.batching import samples_of_step

    recipe, table = make_recipe(7), log_normal_rows(20, 1024)  # 7 steps of 8: over two epochs
    np.savez(
        tmp_path / "rows.npz",
        input_ids=table.input_ids, is_target=table.is_target, offsets=table.offsets,
    )  # fmt: skip
    rows = peer.read_rows(tmp_path)
    steps = peer.steps_of(recipe.to_json(), len(rows))
    assert steps == [samples_of_step(recipe, len(table), step) for step in range(7)]
    assert [len(ids) for ids, _ in rows] == table.lengths.tolist()
    for index, row in enumerate(rows):
        wanted = [label for label in peer.labels(row) if label != peer.IGNORED]
        assert len(wanted) == table.targets_of([index])
        assert wanted == row[0][-len(wanted) :]
