"""A CPU's tokens a second, measured on few layers. `pytest tests/training/test_speed.py`"""

from __future__ import annotations

import json
from pathlib import Path

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
