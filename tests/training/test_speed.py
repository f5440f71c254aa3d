"""A CPU's tokens a second, measured on few layers. `pytest tests/training/test_speed.py`"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.plan.forecast import throughput_on_this_cpu
from job.training.shape import model_shape
from tests.tiny_model import FAMILIES, make_base, make_recipe, make_table
from tests.training.tiny_training import make_trainer

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_whose_shape_is_known_can_be_measured(family: str, tmp_path: Path) -> None:
    from job.training.speed import measured_on_this_cpu

    folder = make_base(tmp_path, model_type=family, num_hidden_layers=5)
    config = json.loads((folder / "config.json").read_text())
    if model_shape(config) is None:
        pytest.skip("no plan is made for it")
    shallow, rate = measured_on_this_cpu(config, make_table(20, 1), make_recipe(), 4096)
    assert shallow.num_layers == 2
    assert rate > 0


def test_the_forecast_holds_the_speed_of_the_whole_model(tmp_path: Path) -> None:
    """Twelve layers of 256 features; twice the speed or half would be no forecast."""
    from job.training.speed import measured_on_this_cpu
    from job.training.state import TrainState

    folder = make_base(
        tmp_path, hidden_size=256, intermediate_size=768, num_hidden_layers=12, vocab_size=4096
    )
    config = json.loads((folder / "config.json").read_text())
    table, recipe, shape = make_table(100, 1, longest=200), make_recipe(), model_shape(config)
    assert shape is not None
    trainer, state = make_trainer(folder, recipe, 4096), TrainState()
    reports = [trainer.step(table, state) for _ in range(4)][1:]
    taken = sum(report.num_tokens for report in reports) / sum(r.seconds for r in reports)
    shallow, rate = measured_on_this_cpu(config, table, recipe, 4096)
    share = table.num_target_tokens / len(table.input_ids)
    told = throughput_on_this_cpu(shape, shallow, rate, share)
    assert told.slow / 2 < taken < told.fast * 2


class _Clocked:
    """A trainer whose samples take so many seconds each; nothing is computed."""

    def __init__(self, seconds: float, accumulation: int) -> None:
        self.seconds, self.sizes, self.spent = seconds, list[int](), 0.0
        self.recipe = make_recipe(gradient_accumulation_steps=accumulation)

    def step(self, _table: Any, state: Any) -> Any:
        samples = self.recipe.samples_per_step
        self.sizes.append(samples)
        self.spent += samples * self.seconds
        state.step += 1
        return SimpleNamespace(num_tokens=100 * samples, seconds=samples * self.seconds)


@pytest.mark.parametrize(
    ("seconds", "accumulation", "timed", "most"),
    [
        (1e-4, 2, [4, 4], 1),  # whole steps, twice
        (0.3, 512, [4, 4], 4),  # a step would take five minutes
        (1.0, 512, [1, 1], 4),
        (1e-3, 2**20, [1024, 1024], 4),
        (30.0, 512, [1], 31),  # a sample alone takes longer than there is time
    ],
)
def test_so_much_of_a_step_is_timed_as_there_is_time_for(
    seconds: float, accumulation: int, timed: list[int], most: float
) -> None:
    from job.training.speed import timed_steps

    clocked = _Clocked(seconds, accumulation)
    trainer: Any = clocked
    whole = clocked.recipe
    reports = timed_steps(trainer, make_table(20, 1))
    assert [report.num_tokens // 100 for report in reports] == timed
    assert clocked.spent <= most
    assert clocked.recipe == whole


def test_a_table_smaller_than_a_step_is_measured_too(tmp_path: Path) -> None:
    from job.training.speed import measured_on_this_cpu

    config = json.loads((make_base(tmp_path) / "config.json").read_text())
    recipe = make_recipe(gradient_accumulation_steps=1024, per_device_train_batch_size=1024)
    started = time.monotonic()
    _, rate = measured_on_this_cpu(config, make_table(20, 1), recipe, 4096)
    assert rate > 0
    assert time.monotonic() - started < 60, "a step of a million samples takes minutes"
