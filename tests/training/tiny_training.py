"""A trainer of a tiny model, and a whole training on tiny tables, bucket and clock left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny_model import make_recipe, make_table

on_every_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)


def make_model(base: Path, recipe: Any) -> Any:
    import torch

    from job.training.model import add_adapters, load_base

    return add_adapters(load_base(str(base), None, torch.device("cpu")), recipe)


def make_trainer(base: Path, recipe: Any, token_budget: int = 80) -> Any:
    import torch

    from job.training.trainer import Trainer

    model = make_model(base, recipe)
    return Trainer(model, recipe, device=torch.device("cpu"), token_budget=token_budget)


def half_trainer(folder: Path, device: str, dtype_name: str = "float16", **recipe: Any) -> Any:
    """In a GPU's precision, on a CPU as well."""
    import torch

    from job.training.model import add_adapters, load_base
    from job.training.trainer import Trainer

    where, what = torch.device(device), make_recipe(**{"lora_dropout": 0.1} | recipe)
    model = load_base(str(folder), None, where, dtype=getattr(torch, dtype_name))
    return Trainer(add_adapters(model, what), what, device=where, token_budget=80)


def never_stop() -> None:
    """A `should_stop` that never stops."""


def train_on_tables(trainer: Any, **changes: Any) -> Any:
    from job.training.loop import train
    from job.training.model import adapter_state
    from job.training.state import TrainState

    options: dict[str, Any] = {
        "state": TrainState(),
        "measure_step_0": True,
        "out_of_time": lambda state: None,
        "stop_early": lambda state: None,
        "on_step": lambda report: None,
        "on_eval": lambda step, loss, is_best: None,
        # In memory instead of a bucket.
        "on_best": lambda: {"adapter": adapter_state(trainer.model)},
        "should_stop": never_stop,
    }
    return train(trainer, make_table(40, seed=1), make_table(12, seed=2), **options | changes)
