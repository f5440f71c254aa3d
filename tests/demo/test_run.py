"""The demo, whole, with a shorter pre-training. `pytest tests/demo/test_run.py`"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

# 250 steps of pre-training instead of 750: the same losses to learn from, a minute less.
DEMO = """
import sys
from job.demo.pretraining import PretrainingPlan
from job.demo.run import run_demo
sys.exit(run_demo(PretrainingPlan(num_steps=250)))
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of a demo of six trials: three of the ladder, one random, two of the GP."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, "-c", DEMO],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2]),
             "JOB_NUM_TRIALS": "6", "JOB_MAX_STEPS": "30", "JOB_EVAL_ROWS": "64",
             "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


@pytest.fixture(scope="module")
def results(demo: tuple[Path, str]) -> list[dict[str, Any]]:
    slots = sorted(demo[0].glob(".demo/store/sweeps/demo-*/slots/*/result.json"))
    return [json.loads(path.read_text()) for path in slots]


def test_the_best_of_the_first_three_lowers_eval_loss_by_5_percent(
    results: list[dict[str, Any]],
) -> None:
    step, untuned = results[0]["curve"][0]
    assert step == 0
    assert min(r["eval_loss"] for r in results[:3]) < 0.95 * untuned


def test_the_first_three_trials_differ_by_1_percent(results: list[dict[str, Any]]) -> None:
    losses = [r["eval_loss"] for r in results[:3]]
    assert max(losses) > 1.01 * min(losses)


def test_six_trials_have_six_different_points_and_the_last_are_the_gps(
    demo: tuple[Path, str], results: list[dict[str, Any]]
) -> None:
    points = {json.dumps(r["params"], sort_keys=True) for r in results}
    assert len(points) == 6
    rates = [r["params"]["learning_rate"] for r in results]
    assert rates[:3] == pytest.approx([2e-2 / 3, 2e-2, 2e-2 / 9], rel=1e-5)
    assert all(2e-4 <= rate <= 2e-2 for rate in rates)


def test_the_demo_ends_with_what_a_person_wants_to_see(demo: tuple[Path, str]) -> None:
    folder, out = demo
    assert "eval/loss untuned" in out
    assert out.count("completed") == 6
    adapter = Path(next(line for line in out.splitlines() if line.startswith("adapter: "))[9:])
    assert (adapter / "adapter_model.safetensors").is_file()
    assert folder in adapter.parents
    assert out.count("before:") == out.count("after:") == 2
    assert "another trial is expected to gain" in out
    page = (folder / ".demo/report.html").read_text()
    assert "Expected gain of the next trial" in page
