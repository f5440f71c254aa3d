"""What only a CUDA GPU can show: fp16 autocast, loss scaling, memory. `make test-gpu`

Written without a GPU at hand; not run on one yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny_model import make_base, make_recipe, make_table

pytestmark = pytest.mark.gpu


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    import torch

    from job.training.model import add_adapters, load_base
    from job.training.trainer import Trainer

    device, recipe = torch.device("cuda", 0), make_recipe(lora_dropout=0.1)
    base = load_base(str(make_base(tmp_path)), None, device)
    return Trainer(
        add_adapters(base, recipe), recipe, device=device, token_budget=80, recompute="second"
    )


def test_inside_a_lora_layer_everything_is_fp16_and_adapters_stay_fp32(trainer: Any) -> None:
    import torch

    from job.training.state import TrainState

    seen: set[torch.dtype] = set()
    for name, module in trainer.model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda _m, _i, output: seen.add(output.dtype))
    trainer.step(make_table(8, seed=1), TrainState())
    assert seen == {torch.float16}
    assert {p.dtype for p in trainer.parameters} == {torch.float32}


def test_twenty_steps_learn_without_a_lost_step_after_the_scaler_settled(trainer: Any) -> None:
    from job.training.state import TrainState

    table, held_out, state = make_table(40, seed=1), make_table(12, seed=2), TrainState()
    before = trainer.evaluate(held_out, state)
    skipped = [trainer.step(table, state) and state.skipped_in_a_row for _ in range(20)]
    assert skipped[-1] == 0
    assert trainer.evaluate(held_out, state) < before


def test_a_restored_trainer_takes_the_same_steps(trainer: Any, tmp_path: Path) -> None:
    from job.training.state import TrainState

    table, state = make_table(40, seed=1), TrainState()
    for _ in range(5):
        trainer.step(table, state)
    saved, at = trainer.save(tmp_path), TrainState(step=state.step)
    expected = [trainer.step(table, state).train_loss for _ in range(3)]
    trainer.restore(tmp_path, saved)
    assert [trainer.step(table, at).train_loss for _ in range(3)] == pytest.approx(
        expected, abs=1e-3
    )
