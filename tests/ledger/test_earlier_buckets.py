"""A bucket that an earlier version wrote is read whole, and its trials end with its losses.

`bucket_0_1` was written by version 0.1 (commit 397394d) with real training of a tiny model: slot 0
committed, 1 told to end at step 24 of 48, 2 begun again and committed twice, 3 excluded, 4 killed
after a checkpoint, 5 never begun. `expected.json` holds what that version's `job status --json`
said of it, and how its slots 1 and 4 ended in a copy in which nobody interrupted them, all of it on
an Intel CPU. On others PyTorch draws other dropout masks, so what that version made there of the
same checkpoints, on an AMD EPYC, is beside it.

`pytest tests/ledger/test_earlier_buckets.py`
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import forked

BUCKET = Path(__file__).parent / "bucket_0_1"
EXPECTED: dict[str, Any] = json.loads((BUCKET / "expected.json").read_text())


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(BUCKET, tmp_path / "bucket")


def _job(copy: Path, *verb: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run `python -m job` with the settings that the bucket was written with."""
    given = {
        "base_model": copy / "base", "dataset_uri": copy / "rows.jsonl", "output_uri": copy / "out",
        "work_dir": copy / "work", "sweep_file": copy / "sweep.yaml", "device": "cpu",
        "use_full_dataset": True, "max_steps": 48, "num_epochs": 40, "evals_per_trial": 4,
        "lora_dropout": 0.1, "lora_r": 4, "num_trials": 6, "lease_seconds": 1, **settings,
    }  # fmt: skip
    environ = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return forked.run(
        [sys.executable, "-m", "job", *verb],
        env=environ | {f"JOB_{name.upper()}": str(value) for name, value in given.items()},
        cwd=Path(__file__).parents[2], timeout=120,
    )  # fmt: skip


def test_every_slot_of_an_earlier_bucket_reads_as_its_own_version_read_it(copy: Path) -> None:
    told = json.loads(_job(copy, "status", "--json").stdout)
    expected = EXPECTED["status"]
    for view in (*told["slots"], *expected["slots"]):
        view.pop("lease_age_seconds")  # by the clock
    assert told["slots"] == expected["slots"]
    assert told["best_slot"] == expected["best_slot"]
    assert told["gpu_seconds"] == expected["gpu_seconds"]


def test_an_earlier_buckets_attempts_best_and_garbage_are_told(copy: Path) -> None:
    attempts = _job(copy, "status", "--attempts").stdout
    assert "slot 1: goes on from step 24 next time" in attempts
    best = json.loads(_job(copy, "best").stdout)
    assert (best["slot"], best["eval_loss"]) == (2, EXPECTED["status"]["slots"][2]["eval_loss"])
    fetched = _job(copy, "best", "--download", str(copy / "adapter"))
    assert fetched.returncode == 0, fetched.stderr
    assert (copy / "adapter/adapter_model.safetensors").exists()
    collected = _job(copy, "gc", "--old-generations")
    assert collected.returncode == 0, collected.stderr
    assert "0002/adapter-" in collected.stdout, "what the redo replaced"
    assert collected.stdout.count("deleting") == 2, "the adapter and its history, nothing else"


@pytest.mark.slow
@pytest.mark.parametrize("slot", [1, 4], ids=["told to end", "killed"])
def test_an_earlier_versions_checkpoint_is_resumed_to_equal_losses(copy: Path, slot: int) -> None:
    forked.with_torch()
    ended = _job(copy, completion_index=slot)
    assert ended.returncode == 0, ended.stderr
    assert "going on from the checkpoint at step" in ended.stderr
    result = json.loads((copy / f"out/sweeps/s/slots/{slot:04d}/result.json").read_text())
    calm = EXPECTED["calm"][str(slot)]
    assert result["attempts"] == 2
    assert [result[key] for key in ("status", "best_step", "steps")] == [
        calm[key] for key in ("status", "best_step", "steps")
    ]
    assert [step for step, _ in result["curve"]] == [step for step, _ in calm["curve"]]
    losses = [loss for _, loss in result["curve"]]
    on_intel, elsewhere = (
        # Another CPU rounds otherwise: to the bit they are equal on the one that wrote them.
        pytest.approx([loss for _, loss in curve], rel=2e-6)
        for curve in (calm["curve"], EXPECTED["resumed_on_amd"][str(slot)])
    )
    cpu = Path("/proc/cpuinfo")
    is_intel = cpu.exists() and "GenuineIntel" in cpu.read_text()
    assert losses == (on_intel if is_intel else elsewhere)


@pytest.mark.slow
def test_a_slot_that_an_earlier_version_left_is_drawn_and_committed(copy: Path) -> None:
    forked.with_torch()
    ended = _job(copy, completion_index=5)
    assert ended.returncode == 0, ended.stderr
    assert _job(copy, "redo", "3").returncode == 0, "an excluded one is begun again, too"
    states = [v["state"] for v in json.loads(_job(copy, "status", "--json").stdout)["slots"]]
    assert states == ["completed", "waiting", "completed", "waiting", "running", "completed"]
