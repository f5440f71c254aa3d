"""Loss scaling in fp16: overflows, resume, out of memory.

`pytest tests/training/test_loss_scaling.py`

On the CPU, and on a GPU if there is one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny_model import make_base, make_table
from tests.training.tiny_training import half_trainer, on_every_device


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def _adapter(trainer: Any) -> Any:
    import torch

    return torch.cat([p.detach().flatten().cpu() for p in trainer.parameters])


@on_every_device
def test_twenty_steps_learn_without_a_lost_step_after_the_scaler_settled(
    base: Path, device: str
) -> None:
    from job.training.state import TrainState

    trainer = half_trainer(base, device)
    table, held_out, state = make_table(40, seed=1), make_table(12, seed=2), TrainState()
    before = trainer.evaluate(held_out, state)
    skipped = [trainer.step(table, state) and state.skipped_in_a_row for _ in range(20)]
    assert skipped[-1] == 0
    assert not state.diverged
    assert trainer.evaluate(held_out, state) < before


@on_every_device
def test_a_step_that_overflows_changes_no_weight_and_halves_the_scale(
    base: Path, device: str
) -> None:
    import torch

    from job.training.state import TrainState

    trainer, state, table = (
        half_trainer(base, device, warmup_ratio=0.0),
        TrainState(),
        make_table(8, 1),
    )
    _set_scale(trainer, 2.0**40)
    before = _adapter(trainer)
    report = trainer.step(table, state)
    assert (state.step, state.skipped_in_a_row, state.diverged) == (1, 1, False)
    assert report.train_loss == pytest.approx(trainer.evaluate(table, state), rel=0.3)
    assert torch.equal(_adapter(trainer), before)
    assert trainer.scaler.get_scale() == 2.0**39
    _set_scale(trainer, 2.0**10)
    trainer.step(table, state)
    assert state.skipped_in_a_row == 0
    assert not torch.equal(_adapter(trainer), before)


@on_every_device
def test_twenty_overflows_in_a_row_are_a_divergence(base: Path, device: str) -> None:
    from job.training.state import TrainState

    trainer, state = half_trainer(base, device, planned_steps=30), TrainState()
    for step in range(1, 21):
        _set_scale(trainer, 2.0**60)
        trainer.step(make_table(8, 1), state)
        assert state.diverged == (step == 20)


@on_every_device
def test_a_restored_trainer_takes_the_same_steps_at_the_same_loss_scale(
    base: Path, device: str, tmp_path: Path
) -> None:
    import torch

    from job.training.state import TrainState

    trainer, table, state = half_trainer(base, device), make_table(40, seed=1), TrainState()
    _set_scale(trainer, 2.0**30)
    for _ in range(5):  # some of them overflow, so the scale moves
        trainer.step(table, state)
    saved, at = trainer.save(tmp_path), state.step
    scale = trainer.scaler.get_scale()
    assert scale < 2.0**30
    expected = [trainer.step(table, state).train_loss for _ in range(3)]
    other = half_trainer(base, device)  # in a new process its scaler was not used yet
    other.restore(tmp_path, saved)
    assert other.scaler.get_scale() == scale
    again = TrainState(step=at)
    losses = [other.step(table, again).train_loss for _ in range(3)]
    if device == "cpu":
        assert losses == expected
        assert torch.equal(_adapter(other), _adapter(trainer))
    else:  # a GPU's attention backward sums in no fixed order
        assert losses == pytest.approx(expected, abs=1e-3)


@on_every_device
@pytest.mark.parametrize("where", ["micro-batch", "update"])
def test_out_of_memory_loses_no_step_and_keeps_the_scale(
    base: Path, device: str, where: str
) -> None:
    """Also between unscaling and the update, where a scaler refuses to be asked twice."""
    import torch

    from job.training.loop import easing_on_oom
    from job.training.state import TrainState

    trainer, table, state = half_trainer(base, device), make_table(40, seed=1), TrainState()
    _set_scale(trainer, 2.0**10)
    trainer.step(table, state)
    left = [torch.OutOfMemoryError("planted")]

    def fail_once(*_: Any, **__: Any) -> None:
        if left:
            raise left.pop()

    if where == "update":
        trainer.optimizer.register_step_pre_hook(fail_once)
    else:
        trainer.model.get_base_model().base_model.register_forward_pre_hook(fail_once)
    report = easing_on_oom(trainer, lambda: trainer.step(table, state))
    assert (report.step, state.step, state.skipped_in_a_row) == (2, 2, 0)
    assert trainer.recompute == "second"
    assert trainer.scaler.get_scale() == 2.0**10


@on_every_device
def test_a_rehearsal_leaves_the_loss_scale_as_it_was(base: Path, device: str) -> None:
    from job.training.memory import MemoryPlan
    from job.training.state import TrainState
    from job.training.warmup import warm_up

    table = make_table(40, seed=1)

    def first_steps(trainer: Any) -> list[float]:
        state = TrainState()
        return [trainer.step(table, state).train_loss for _ in range(3)]

    expected = first_steps(half_trainer(base, device))
    trainer = half_trainer(base, device)
    assert warm_up(trainer, table, MemoryPlan(80, warm_up=True)) is None
    assert first_steps(trainer) == pytest.approx(expected, abs=0 if device == "cpu" else 1e-3)
    assert trainer.scaler.get_scale() == 2.0**16


def _set_scale(trainer: Any, scale: float) -> None:
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": scale})
