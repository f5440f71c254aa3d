"""A trainer of a tiny model, and a whole training on tiny tables, bucket and clock left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from job.data.samples import Tables
from job.training.state import TrainState
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


class InMemory:
    """A `Recorder` that keeps evaluations and the best adapter in memory instead of a bucket."""

    def __init__(self, trainer: Any) -> None:
        self.state = TrainState()
        self.evals: list[tuple[int, float, bool]] = []
        self._trainer = trainer

    def on_step(self, report: Any) -> None:
        """Nothing is kept of a step."""

    def on_eval(self, step: int, loss: float, is_best: bool) -> None:
        self.evals.append((step, loss, is_best))

    def on_best(self, measured: Any) -> dict[str, Any]:
        from job.training.model import adapter_state

        return {"adapter": adapter_state(self._trainer.model)}


def train_on_tables(trainer: Any, recorder: Any = None, **ending: Any) -> Any:
    from job.training.loop import Ending, train

    tables = Tables(make_table(40, seed=1), make_table(12, seed=2))
    return train(trainer, tables, recorder or InMemory(trainer), Ending(**ending))
