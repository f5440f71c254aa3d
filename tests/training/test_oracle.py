"""Our loop against transformers.Trainer, step by step. `pytest tests/training/test_oracle.py`"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_model import make_base, make_recipe, make_table

pytestmark = pytest.mark.slow


def _model(base: Path, recipe: Any) -> Any:
    import torch

    from job.training.model import add_adapters, load_base

    cpu = torch.device("cpu")
    return add_adapters(load_base(str(base), None, cpu, quantization=recipe.quantization), recipe)


@pytest.mark.parametrize(
    ("lr_scheduler", "quantization"),
    [("linear", "nf4"), ("cosine", "nf4"), ("linear", "none"), ("cosine", "mixed:o_proj,up_proj")],
)
def test_losses_equal_the_trainers_to_1e_5_over_20_steps(
    tmp_path: Path, lr_scheduler: str, quantization: str
) -> None:
    import torch

    from benchmarks.trainer_peer import train_with_trainer
    from job.training.state import TrainState
    from job.training.trainer import Trainer

    base = make_base(tmp_path / "base")
    table = make_table(30, seed=1)  # 20 steps of 4 cross the end of the epoch twice
    recipe = make_recipe(lr_scheduler=lr_scheduler, quantization=quantization)
    trainer = Trainer(_model(base, recipe), recipe, device=torch.device("cpu"), token_budget=60)
    state = TrainState()
    ours = [trainer.step(table, state) for _ in range(recipe.planned_steps)]
    oracle = train_with_trainer(_model(base, recipe), table, recipe, tmp_path / "trainer")
    assert len(ours) == len(oracle) == 20
    for mine, theirs in zip(ours, oracle, strict=True):
        assert math.isclose(mine.train_loss, theirs.loss, rel_tol=0, abs_tol=1e-5), mine.step
        assert math.isclose(mine.learning_rate, theirs.learning_rate, rel_tol=1e-9), mine.step
        assert math.isclose(mine.grad_norm, theirs.grad_norm, rel_tol=1e-4), mine.step
    assert ours[-1].train_loss < ours[0].train_loss - 0.1, "the comparison must cover learning"
