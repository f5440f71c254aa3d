"""The heaviest step, tried and undone; plans that ease. `pytest tests/training/test_warmup.py`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from job.data.samples import Tables
from job.errors import GpuError
from job.training.memory import MemoryPlan
from tests.tiny_model import make_base, make_recipe, make_table

pytestmark = pytest.mark.slow
BUDGET = 200


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def _trainer(
    base: Path,
    *,
    fits: Any = lambda num_tokens, recompute: True,
    quantization: str = "nf4",
) -> Any:
    """On a GPU that runs out of memory where `fits` says no: the model's own forward fails."""
    import torch

    from job.training.model import add_adapters, load_base
    from job.training.trainer import Trainer

    cpu = torch.device("cpu")
    recipe = make_recipe(lora_dropout=0.1, warmup_ratio=0.0, gradient_accumulation_steps=4)
    trainer = Trainer(
        add_adapters(load_base(str(base), None, cpu, quantization=quantization), recipe),
        recipe,
        device=cpu,
        token_budget=BUDGET,
    )

    def refuse(_: Any, arguments: Any, options: dict[str, Any]) -> None:
        if not fits(options["input_ids"].shape[1], trainer.recompute):
            raise torch.OutOfMemoryError("planted")

    trainer.model.get_base_model().base_model.register_forward_pre_hook(refuse, with_kwargs=True)
    return trainer


def _steps(trainer: Any, num_steps: int, state: Any = None) -> tuple[list[float], dict[str, Any]]:
    from job.training.model import adapter_state
    from job.training.state import TrainState

    state, table = state or TrainState(), make_table(40, seed=1)
    losses = [trainer.step(table, state).train_loss for _ in range(num_steps)]
    return losses, adapter_state(trainer.model)


def test_a_rehearsal_leaves_no_trace(base: Path) -> None:
    import torch

    from job.training.state import TrainState
    from job.training.warmup import warm_up

    plain = _trainer(base)
    _steps(plain, 2)
    expected, expected_adapter = _steps(plain, 3, TrainState(step=2))
    trainer = _trainer(base)
    _steps(trainer, 2)  # moments are there, too
    trainer.optimizer.param_groups[0]["lr"] = 0.1  # the rehearsed update is a large one
    random_before = torch.get_rng_state()
    assert warm_up(trainer, make_table(40, seed=1), MemoryPlan(BUDGET, warm_up=True)) is None
    assert torch.equal(torch.get_rng_state(), random_before)
    losses, adapter = _steps(trainer, 3, TrainState(step=2))
    assert losses == expected
    assert all(torch.equal(adapter[name], expected_adapter[name]) for name in adapter)
    assert (trainer.token_budget, trainer.recompute) == (BUDGET, "none")


def test_the_heaviest_micro_batch_is_rehearsed(base: Path) -> None:
    from job.training.warmup import warm_up

    seen: list[int] = []
    trainer = _trainer(base, fits=lambda n, _: seen.append(n) or True)
    table = make_table(40, seed=1)
    warm_up(trainer, table, MemoryPlan(BUDGET, warm_up=True))
    assert seen == [BUDGET, BUDGET], "no micro-batch of the budget is heavier"
    warm_up(trainer, table, MemoryPlan(BUDGET))
    assert len(seen) == 2, "no rehearsal was asked for"


@pytest.mark.parametrize("quantization", ["nf4", "none", "mixed:v_proj,down_proj"])
def test_a_plan_that_does_not_fit_recomputes_more_then_takes_fewer_tokens(
    base: Path, quantization: str
) -> None:
    from job.training.warmup import warm_up

    trainer = _trainer(base, fits=lambda n, mode: mode == "second", quantization=quantization)
    assert warm_up(trainer, make_table(40, 1), MemoryPlan(BUDGET, warm_up=True)) is None
    assert (trainer.token_budget, trainer.recompute) == (BUDGET, "second")
    trainer = _trainer(
        base, fits=lambda n, mode: mode == "all" and n <= 60, quantization=quantization
    )
    assert warm_up(trainer, make_table(40, 1), MemoryPlan(BUDGET, warm_up=True)) is None
    assert (trainer.token_budget, trainer.recompute) == (BUDGET // 4, "all")
    losses, _ = _steps(trainer, 2)
    assert len(losses) == 2


def test_a_sample_that_fits_in_no_plan_is_infeasible_with_the_reason(base: Path) -> None:
    from job.training.warmup import warm_up

    trainer = _trainer(base, fits=lambda n, mode: n < 10)
    reason = warm_up(trainer, make_table(40, 1), MemoryPlan(BUDGET, warm_up=True))
    assert reason == "the longest sample does not fit the GPU's memory: planted"


PLAN = MemoryPlan(BUDGET, warm_up=True, rivals=(MemoryPlan(120, "second"), MemoryPlan(60, "all")))


class FakeClock:
    """A clock that only forward passes move: by seconds for each, and seconds for each token."""

    def __init__(self, **seconds: tuple[float, float]) -> None:
        self.now = 0.0
        self._seconds = seconds

    def __call__(self) -> float:
        return self.now

    def forward(self, num_tokens: int, mode: str) -> bool:
        each, per_token = self._seconds[mode]
        self.now += each + num_tokens * per_token
        return True


SLOW_HOST = {"none": (1.0, 0.001), "second": (0.05, 0.001), "all": (0.5, 0.001)}
SLOW_CARD = {"none": (0.0, 0.1), "second": (0.0, 0.2), "all": (0.0, 0.3)}


@pytest.mark.parametrize(
    ("seconds", "fastest"),
    [(SLOW_HOST, (120, "second")), (SLOW_CARD, (BUDGET, "none"))],
    ids=["slow host", "slow card"],
)
def test_the_clock_decides_between_plans_that_fit(
    base: Path,
    seconds: dict[str, tuple[float, float]],
    fastest: tuple[int, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    import torch

    from job.training.warmup import warm_up

    clock = FakeClock(**seconds)
    trainer, plain = _trainer(base, fits=clock.forward), _trainer(base)
    random_before = torch.get_rng_state()
    with caplog.at_level("INFO", logger="job"):
        assert warm_up(trainer, make_table(40, 1), PLAN, clock=clock) is None
    assert (trainer.token_budget, trainer.recompute) == fastest
    said = [line for line in caplog.messages if line.startswith("speed: ")]
    rates = [float(line.split()[-2]) for line in said]
    assert len(rates) == 3
    assert rates == sorted(rates, reverse=True)
    assert said[0].startswith(f"speed: {fastest[0]} tokens a micro-batch")
    assert caplog.messages[-1].startswith(f"plan: {fastest[0]} tokens a micro-batch")
    assert torch.equal(torch.get_rng_state(), random_before)
    plain.set_plan(*fastest)
    losses, adapter = _steps(trainer, 2)
    expected, expected_adapter = _steps(plain, 2)
    assert losses == expected
    assert all(torch.equal(adapter[name], expected_adapter[name]) for name in adapter)


def test_rates_are_those_of_the_same_real_samples_after_one_micro_batch_that_is_not_timed(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from job.training.batching import samples_of_step
    from job.training.warmup import TIMED_STEPS, warm_up

    seen: list[tuple[str, int]] = []
    clock = FakeClock(**SLOW_CARD)

    def note(num_tokens: int, mode: str) -> bool:
        seen.append((mode, num_tokens))
        return clock.forward(num_tokens, mode)

    trainer, table = _trainer(base, fits=note), make_table(40, 1)
    with caplog.at_level("INFO", logger="job"):
        warm_up(trainer, table, PLAN, clock=clock)
    steps = [samples_of_step(trainer.recipe, 40, step) for step in range(TIMED_STEPS)]
    tokens = int(sum(table.lengths[indices].sum() for indices in steps))
    for mode in ("second", "all"):  # the plan that is taken meets the heaviest rows, too
        first, *timed = [n for m, n in seen if m == mode]
        assert sum(timed) == tokens
        assert timed[0] == first
    assert "speed: 200 tokens a micro-batch, no layer recomputed: 10 tokens/s" in caplog.messages


def test_a_plan_whose_rows_or_whose_heaviest_step_do_not_fit_gives_way_to_the_next_fastest(
    base: Path,
) -> None:
    from job.training.warmup import warm_up

    def plan_of(does_fit: Any) -> tuple[int, str]:
        clock = FakeClock(**SLOW_CARD)
        trainer = _trainer(base, fits=lambda n, m: clock.forward(n, m) and does_fit(n, m))
        assert warm_up(trainer, make_table(40, 1), PLAN, clock=clock) is None
        return trainer.token_budget, trainer.recompute

    assert plan_of(lambda n, mode: mode != "none") == (120, "second")
    heaviest = {"none": BUDGET, "second": 120, "all": 60}
    assert plan_of(lambda n, mode: mode == "all" or n < heaviest[mode]) == (60, "all")
    assert plan_of(lambda n, mode: mode == "all" and n < 60) == (50, "all"), "none fits: eased"


@pytest.mark.parametrize("where", ["a rival's rows", "the heaviest step"])
def test_an_operation_without_a_deterministic_kernel_has_all_plans_timed_again(
    base: Path, where: str
) -> None:
    import torch

    from job.training.device import NO_DETERMINISTIC_KERNEL
    from job.training.warmup import warm_up

    clock, failed = FakeClock(**SLOW_CARD), []

    def forward(num_tokens: int, mode: str) -> bool:
        is_there = mode == "second" if where == "a rival's rows" else num_tokens == BUDGET
        if is_there and torch.are_deterministic_algorithms_enabled():
            failed.append(mode)
            raise RuntimeError(f"cumsum_cuda_kernel {NO_DETERMINISTIC_KERNEL}")
        return clock.forward(num_tokens, mode)

    trainer = _trainer(base, fits=forward)
    torch.use_deterministic_algorithms(True)
    try:
        assert warm_up(trainer, make_table(40, 1), PLAN, clock=clock) is None
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(failed) == 1
    assert (trainer.token_budget, trainer.recompute) == (BUDGET, "none")


def test_a_plan_without_rivals_is_not_timed_and_a_warm_up_ends_when_told_to(base: Path) -> None:
    import torch

    from job.errors import PreemptedError
    from job.training.warmup import warm_up

    def never() -> float:
        raise AssertionError("nobody asked for the time")

    trainer, alone = _trainer(base), MemoryPlan(BUDGET, warm_up=True)
    assert warm_up(trainer, make_table(40, 1), alone, clock=never) is None
    before = trainer.snapshot().weights

    def stop() -> None:
        raise PreemptedError("told to end")

    with pytest.raises(PreemptedError):
        warm_up(trainer, make_table(40, 1), PLAN, should_stop=stop)
    after = trainer.snapshot().weights
    assert all(torch.equal(after[name], before[name]) for name in before)


def _fit_with(base: Path, folder: Path, failure: Exception) -> Any:
    """A trial whose forward passes all raise `failure`."""
    import torch

    from job.training.fit import FitInputs, fit
    from job.training.loop import Ending
    from job.training.model import load_base

    def refuse(_: Any, __: Any) -> None:
        raise failure

    class Nobody:
        resume_dir = None

        def report(self, **progress: Any) -> None:
            assert progress["step"] == 0

    cpu, table = torch.device("cpu"), make_table(12, seed=2)
    model = load_base(str(base), None, cpu)
    model.base_model.register_forward_pre_hook(refuse)
    inputs = FitInputs(
        base=model,
        tables=Tables(table, table),
        memory=MemoryPlan(BUDGET, warm_up=True),
        ending=Ending(),
        max_adapter_bytes=200_000_000,
    )
    return fit(
        make_recipe(),
        inputs,
        device=cpu,
        work_dir=folder,
        keeper=Nobody(),  # type: ignore[arg-type]
    )


def test_a_trial_that_does_not_fit_ends_infeasible_before_its_first_step(
    base: Path, tmp_path: Path
) -> None:
    import torch

    fitted = _fit_with(base, tmp_path, torch.OutOfMemoryError("planted"))
    assert (fitted.status, fitted.state.step, fitted.state.best) == ("infeasible", 0, None)
    assert fitted.reason.startswith("the longest sample does not fit the GPU's memory")


def test_a_fault_of_the_card_is_this_nodes_and_not_the_trials(base: Path, tmp_path: Path) -> None:
    with pytest.raises(GpuError, match="this node's GPU failed: CUDA error: unspecified"):
        _fit_with(base, tmp_path, RuntimeError("CUDA error: unspecified launch failure"))


@pytest.mark.parametrize("quantization", ["nf4", "none", "mixed:v_proj,down_proj"])
def test_recomputing_changes_no_loss_and_no_weight_by_a_bit(base: Path, quantization: str) -> None:
    import torch

    results = []
    for mode in ("none", "second", "all"):
        trainer = _trainer(base, quantization=quantization)
        trainer.set_plan(BUDGET, mode)
        results.append(_steps(trainer, 3))
    for losses, adapter in results[1:]:
        assert losses == results[0][0]
        assert all(torch.equal(adapter[name], results[0][1][name]) for name in adapter)


def test_a_checkpoint_keeps_budget_and_mode(base: Path, tmp_path: Path) -> None:
    trainer, other = _trainer(base), _trainer(base)
    trainer.set_plan(77, "second")
    _steps(trainer, 1)
    other.restore(tmp_path, trainer.save(tmp_path))
    assert (other.token_budget, other.recompute) == (77, "second")
    layers = [m for m in other.model.modules() if hasattr(m, "self_attn")]
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]


def test_memory_that_runs_out_while_moments_are_made_leaves_none_of_them_half_made(
    base: Path,
) -> None:
    import torch

    from job.training.loop import easing_on_oom
    from job.training.state import TrainState

    trainer, table, state = _trainer(base), make_table(40, seed=1), TrainState()
    left = [torch.OutOfMemoryError("planted")]

    def fail_half_way(optimizer: Any, *_: Any) -> None:
        if left:
            optimizer.state[trainer.parameters[0]] = {"step": torch.zeros(())}
            raise left.pop()

    trainer.optimizer.register_step_pre_hook(fail_half_way)
    report = easing_on_oom(trainer, lambda: trainer.step(table, state))
    assert (report.step, trainer.recompute) == (1, "second")
    assert {float(m["step"]) for m in trainer.optimizer.state.values()} == {1.0}


def test_the_loss_scale_and_its_growth_are_part_of_a_snapshot(base: Path) -> None:
    """The CPU has a loss scaler of its own to try it with."""
    import torch

    from job.training.snapshot import put_back, take_snapshot

    trainer = _trainer(base)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0, growth_interval=1000)
    scaler.scale(torch.ones(()))  # made on first use
    scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": 7})
    snapshot = take_snapshot(trainer.model, trainer.optimizer, scaler)
    other = torch.amp.GradScaler("cpu")
    other.scale(torch.ones(()))
    put_back(snapshot, trainer.model, trainer.optimizer, other)
    assert other.state_dict() == scaler.state_dict()
    assert other.get_scale() == 4096.0


def test_an_overflow_skips_the_step_and_halves_the_loss_scale(base: Path) -> None:
    import torch

    from job.training.state import TrainState

    trainer, table, state = _trainer(base), make_table(40, seed=1), TrainState()
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    before = trainer.snapshot().weights
    trainer.step(table, state)  # the scaled loss overflows fp32
    assert state.skipped_in_a_row == 1
    assert trainer.scaler.get_scale() == 2.0**126
    assert all(torch.equal(w, before[name]) for name, w in trainer.snapshot().weights.items())
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 256.0})
    trainer.step(table, state)
    assert state.skipped_in_a_row == 0
    assert any(not torch.equal(w, before[n]) for n, w in trainer.snapshot().weights.items())
