"""Two ranks at one trial equal one. `pytest tests/training/test_crew.py`"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from job.training.memory import MemoryPlan
from tests.tiny_model import make_base, make_recipe, make_table
from tests.training.test_resume import Disk, StopAt

slow = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@slow  # the crew imports torch
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_samples_are_split_evenly_and_none_is_lost(num_ranks: int) -> None:
    from job.training.crew import split_evenly

    lengths, indices = [9, 1, 1, 7, 3, 3, 8, 2], [40, 41, 42, 43, 44, 45, 46, 47]
    shares = split_evenly(lengths, indices, num_ranks)
    assert sorted(index for share in shares for index in share) == indices
    assert all(share == sorted(share) for share in shares), "in the step's order"
    tokens = [sum(lengths[index - 40] for index in share) for share in shares]
    assert max(tokens) - min(tokens) <= 2


@slow
def test_more_ranks_than_samples_leave_some_idle() -> None:
    from job.training.crew import split_evenly

    assert split_evenly([5, 3], [7, 8], 3) == [[7], [8], []]


def _fit(base: Path, folder: Path, *, meeting: Path | None, budget: int = 64) -> Any:
    import torch

    from job.training.crew import CrewPlan
    from job.training.fit import FitInputs, fit
    from job.training.model import load_base

    folder.mkdir()
    inputs = FitInputs(
        base=load_base(str(base), None, torch.device("cpu")),
        train_table=make_table(24, seed=1),
        eval_table=make_table(7, seed=2),
        memory=MemoryPlan(budget),
        out_of_time=lambda _: None,
        stop_early=lambda _: None,
        measure_step_0=True,
        max_adapter_bytes=10**9,
        crew=CrewPlan(meeting, 2, str(base), None) if meeting else None,
    )
    disk = Disk(folder)
    recipe = make_recipe(planned_steps=8)
    fitted = fit(
        recipe,
        inputs,
        device=torch.device("cpu"),
        work_dir=folder,
        keeper=disk,
        should_stop=StopAt(None),
    )
    (best,) = folder.glob(fitted.state.best["key"])
    return fitted, best


def _weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def _follower(meeting: Path, *words: str) -> subprocess.Popen[bytes]:
    meeting.mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.crew_follower", str(meeting), *words], cwd=ROOT
    )


@slow
@pytest.mark.parametrize("most_tokens", [None, 40], ids=["calm", "a follower out of memory"])
def test_two_ranks_train_what_one_trains(tmp_path: Path, most_tokens: int | None) -> None:
    base = make_base(tmp_path / "base")
    alone, best_alone = _fit(base, tmp_path / "alone", meeting=None)
    words = [] if most_tokens is None else [str(most_tokens)]
    follower = _follower(tmp_path / "meeting", *words)
    try:
        together, best = _fit(base, tmp_path / "together", meeting=tmp_path / "meeting")
        assert follower.wait(timeout=60) == 0
    finally:
        follower.kill()
        follower.wait()
    assert [step for step, _ in together.state.curve] == [step for step, _ in alone.state.curve]
    for (_, ours), (_, theirs) in zip(together.state.curve, alone.state.curve, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert together.state.tokens == alone.state.tokens
    one, two = _weights(best_alone), _weights(best)
    for name, weight in one.items():
        assert (two[name].float() - weight.float()).abs().max() < 2e-4, name
