"""The training loop on the CPU and each of its ends. `pytest tests/training/test_loop.py`"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from job.errors import GpuError, SettingsError
from tests.tiny_model import make_base, make_recipe, make_table
from tests.training.tiny_training import InMemory, make_trainer, never_stop, train_on_tables

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def test_training_lowers_eval_loss_and_keeps_the_best(base: Path) -> None:
    trainer = make_trainer(base, make_recipe(learning_rate=0.03))
    recorder = InMemory(trainer)
    outcome = train_on_tables(trainer, recorder)
    state = outcome.state
    assert (outcome.status, state.step) == ("completed", 20)
    assert [step for step, _ in state.curve] == [0, 5, 10, 15, 20]
    assert state.best_loss == min(loss for step, loss in state.curve if step > 0)
    assert state.best_loss < 0.99 * state.curve[0][1]
    assert [best for _, _, best in recorder.evals][:2] == [False, True]


def test_two_runs_with_one_seed_are_bitwise_equal_with_dropout_on(base: Path) -> None:
    import torch

    recipe = make_recipe(lora_dropout=0.1)
    first, second = (train_on_tables(make_trainer(base, recipe)).state for _ in range(2))
    assert first.curve == second.curve
    assert first.best is not None
    assert second.best is not None
    for name, tensor in first.best["adapter"].items():
        assert torch.equal(tensor, second.best["adapter"][name]), name
    other = train_on_tables(make_trainer(base, make_recipe(lora_dropout=0.1, seed=18))).state
    assert other.curve != first.curve


def test_eval_loss_does_not_depend_on_the_token_budget(base: Path) -> None:
    from job.training.state import TrainState

    table = make_table(20, seed=7)
    losses = [
        make_trainer(base, make_recipe(), token_budget=budget).evaluate(
            table, TrainState(), never_stop
        )
        for budget in (1, 50, 333, 100_000)
    ]
    assert max(losses) - min(losses) < 1e-6 * losses[0]


def test_patience_ends_the_trial_with_the_best_adapter(base: Path) -> None:
    import torch

    from job.training.state import TrainState

    # A learning rate that only does harm after the first steps.
    recipe = make_recipe(learning_rate=3.0, lr_scheduler="constant", patience=2, planned_steps=80,
                         eval_steps=tuple(range(81)))  # fmt: skip
    trainer = make_trainer(base, recipe)
    outcome = train_on_tables(trainer)
    state = outcome.state
    assert outcome.status == "completed"
    assert "no better eval/loss in 2 evaluations" in outcome.reason
    assert state.step < 80
    assert state.best_step == state.step - 2
    from peft import set_peft_model_state_dict

    assert state.best is not None
    set_peft_model_state_dict(trainer.model, state.best["adapter"])
    again = trainer.evaluate(make_table(12, seed=2), TrainState(), never_stop)
    assert math.isclose(again, state.best_loss, rel_tol=1e-6)
    assert not any(torch.isnan(t).any() for t in state.best["adapter"].values())


def test_the_budget_truncates_after_a_last_evaluation(base: Path) -> None:
    outcome = train_on_tables(
        make_trainer(base, make_recipe()), out_of_time=lambda state: "the budget is spent"
    )
    assert (outcome.status, outcome.state.step) == ("truncated", 1)
    assert outcome.state.best_step == 1


def test_a_nan_diverges_and_keeps_no_bad_adapter(base: Path) -> None:
    trainer = make_trainer(base, make_recipe())
    nll = trainer._nll
    trainer._nll = lambda batch: nll(batch) * (math.nan if trainer.model.training else 1)
    outcome = train_on_tables(trainer)
    assert (outcome.status, outcome.state.step) == ("diverged", 1)
    assert outcome.state.best is None


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_an_untuned_model_whose_loss_is_no_number_is_the_settings_fault(
    base: Path, loss: float
) -> None:
    """Every trial of the sweep would meet it; later ones no longer evaluate at step 0."""
    trainer = make_trainer(base, make_recipe())
    nll, row_nll = trainer._nll, trainer._row_nll
    trainer._nll = lambda batch: nll(batch) * loss
    trainer._row_nll = lambda table, should_stop: row_nll(table, should_stop) * loss
    with pytest.raises(SettingsError, match="the untuned model's eval/loss is (nan|inf): it overf"):
        train_on_tables(trainer)
    trainer.recipe = make_recipe(eval_steps=(5, 20))
    assert train_on_tables(trainer).status == "diverged", "another trial's step 0 was a number"


def test_twenty_skipped_steps_in_a_row_diverge(base: Path) -> None:
    from job.training.trainer import MAX_SKIPPED_STEPS

    trainer = make_trainer(base, make_recipe(planned_steps=40))
    nll = trainer._nll

    def overflowing(batch: Any) -> Any:  # a finite loss whose gradients are not
        loss = nll(batch)
        if loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    trainer._nll = overflowing
    outcome = train_on_tables(trainer)
    assert (outcome.status, outcome.state.step) == ("diverged", MAX_SKIPPED_STEPS)


def test_a_person_ends_a_trial_after_a_last_evaluation(base: Path) -> None:
    asked: list[str] = []

    def stop_asked() -> str | None:
        asked.append("")
        return "stopped on W&B" if len(asked) == 3 else None

    outcome = train_on_tables(
        make_trainer(base, make_recipe()),
        stop_asked=stop_asked,
        out_of_time=lambda state: "the budget is spent" if state.step == 3 else None,
    )
    assert (outcome.status, outcome.reason) == ("stopped", "stopped on W&B")
    assert [step for step, _ in outcome.state.curve] == [0, 3]
    assert outcome.state.best_step == 3


def test_the_untuned_model_is_evaluated_only_where_the_recipe_says_so(base: Path) -> None:
    outcome = train_on_tables(make_trainer(base, make_recipe(eval_steps=(10, 20))))
    assert [step for step, _ in outcome.state.curve] == [10, 20]


def test_a_hopeless_trial_is_stopped_after_an_evaluation(base: Path) -> None:
    outcome = train_on_tables(
        make_trainer(base, make_recipe()),
        hopeless=lambda state: "worse than others" if len(state.curve) == 3 else None,
    )
    assert (outcome.status, outcome.state.step) == ("stopped", 10)
    assert outcome.state.best is not None


def test_out_of_memory_recomputes_then_halves_the_budget_and_changes_no_loss(base: Path) -> None:
    import torch

    recipe = make_recipe(lora_dropout=0.0)
    calm = train_on_tables(make_trainer(base, recipe, token_budget=256)).state
    trainer = make_trainer(base, recipe, token_budget=256)
    nll = trainer._nll

    def tight(batch: Any) -> torch.Tensor:
        if batch.num_tokens > 100:
            raise torch.OutOfMemoryError("planted")
        return nll(batch)

    trainer._nll = tight
    outcome = train_on_tables(trainer)
    assert (trainer.recompute, trainer.token_budget) == ("all", 64)
    assert outcome.status == "completed"
    for (_, mine), (_, theirs) in zip(outcome.state.curve, calm.curve, strict=True):
        assert math.isclose(mine, theirs, rel_tol=1e-5)


def test_a_sample_that_never_fits_is_infeasible(base: Path) -> None:
    import torch

    def full(batch: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("planted")

    trainer = make_trainer(base, make_recipe())
    trainer._nll = full
    outcome = train_on_tables(trainer)
    assert (outcome.status, outcome.state.step) == ("infeasible", 0)


def test_a_card_that_gets_too_small_in_mid_trial_is_this_nodes_and_not_the_trials(
    base: Path,
) -> None:
    import torch

    def full(batch: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("planted")

    class FullAfterStep3(InMemory):
        def on_step(self, report: Any) -> None:
            if report.step == 3:
                trainer._nll = full

    trainer = make_trainer(base, make_recipe())
    with pytest.raises(GpuError, match="out of GPU memory at step 3, where the steps before"):
        train_on_tables(trainer, FullAfterStep3(trainer))


def test_should_stop_ends_within_one_micro_batch(base: Path) -> None:
    class StopError(Exception):
        pass

    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise StopError

    with pytest.raises(StopError):
        train_on_tables(make_trainer(base, make_recipe()), should_stop=stop)
