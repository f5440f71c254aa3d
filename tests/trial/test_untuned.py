"""The untuned base in 16 bits beside a trial: what is measured, and that no trial ends by it.

`pytest tests/trial/test_untuned.py`
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.errors import GpuError, PreemptedError
from tests.tiny_model import make_base, make_table

pytestmark = pytest.mark.slow


def _attempt(base: Path, *, startless: int = 0, hours: float = 3.0, **changes: Any) -> Any:
    import torch

    def nothing() -> None:
        """Never stop."""

    return SimpleNamespace(
        settings=SimpleNamespace(gpu_memory_gb=None, trial_budget_hours=hours),
        loaded=SimpleNamespace(
            base=SimpleNamespace(location=str(base), hub_revision=None, config={}),
            device=torch.device("cpu"),
        ),
        lease=SimpleNamespace(record=SimpleNamespace(startless=startless)),
        clock=SimpleNamespace(untuned_seconds=0.0),
        watchdog=SimpleNamespace(phase=lambda _: contextlib.nullcontext()),
        **{"should_stop": nothing} | changes,
    )


def _measure(attempt: Any) -> float | None:
    from job.trial.untuned import untuned_in_16_bits

    return untuned_in_16_bits(attempt, make_table(9, seed=1))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", num_hidden_layers=3)


@pytest.mark.parametrize("memory_bytes", [10**12, 0], ids=["whole", "layer by layer"])
def test_it_is_the_loss_of_the_base_in_16_bits(
    base: Path, monkeypatch: pytest.MonkeyPatch, memory_bytes: int
) -> None:
    import torch

    from job.training import device
    from job.training.model import add_adapters, load_base
    from job.training.state import TrainState
    from job.training.trainer import Trainer
    from tests.tiny_model import make_recipe

    monkeypatch.setattr(device, "weight_memory_bytes", lambda *_, **__: memory_bytes)
    attempt, recipe, cpu = _attempt(base), make_recipe(), torch.device("cpu")
    model = add_adapters(load_base(str(base), None, cpu, quantization="none"), recipe)
    trainer = Trainer(model, recipe, device=cpu, token_budget=64)
    expected = trainer.evaluate(make_table(9, seed=1), TrainState())
    assert _measure(attempt) == pytest.approx(expected, abs=2e-4), "but for rounding to fp16"
    assert attempt.clock.untuned_seconds > 0


def _stop_at(call: int) -> Callable[[], None]:
    calls = 0

    def should_stop() -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise PreemptedError("told to end")

    return should_stop


@pytest.mark.parametrize("call", [1, 10, 25])
def test_it_is_ended_between_two_layers_when_the_process_is_to_end(base: Path, call: int) -> None:
    with pytest.raises(PreemptedError):
        _measure(_attempt(base, should_stop=_stop_at(call)))


def test_what_takes_more_than_its_share_of_the_budget_is_left_out(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert _measure(_attempt(base, hours=1e-9)) is None
    assert "left out, it would take" in caplog.text
    assert "more than 5% of JOB_TRIAL_BUDGET_HOURS" in caplog.text


def test_time_is_judged_by_the_share_that_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    from job.trial import untuned

    clock = iter([0.0, 4.0, 30.0, 30.0, 99.0, 101.0])
    monkeypatch.setattr(untuned.time, "monotonic", lambda: next(clock))
    pace = untuned._pace(lambda: None, 100.0)
    pace(0.001)  # too early to judge
    pace(0.5)
    with pytest.raises(untuned._TooLongError, match="it would take 150 s"):
        pace(0.2)
    pace(1.0)
    with pytest.raises(untuned._TooLongError):
        pace(1.0)


@pytest.mark.parametrize("kind", ["out of memory", "a card that fails", "a family's own", "a file"])
def test_what_goes_wrong_is_a_warning(
    base: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    from job.training import measuring

    errors: dict[str, Exception] = {
        "out of memory": torch.OutOfMemoryError("CUDA out of memory"),
        "a card that fails": GpuError("this node's GPU failed"),
        "a family's own": AttributeError("no rotary_emb"),
    }

    def fail(*_: Any, **__: Any) -> float:
        raise errors[kind]

    if kind == "a file":
        (base / "model.safetensors").write_bytes(b"half")
    else:
        monkeypatch.setattr(measuring, "sample_nll", fail)
    assert _measure(_attempt(base)) is None
    assert "untuned in 16 bits: not measured: " in caplog.text


def test_what_may_have_killed_attempts_before_is_left_out(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert _measure(_attempt(base, startless=1)) is not None
    assert _measure(_attempt(base, startless=2)) is None
    assert "earlier attempts did not come to a step" in caplog.text


def test_a_checkpoint_in_4_bits_has_no_other_weights(base: Path) -> None:
    attempt = _attempt(base)
    attempt.loaded.base.config = {"quantization_config": {"load_in_4bit": True}}
    assert _measure(attempt) is None


@pytest.mark.gpu
def test_a_gpu_measures_what_a_cpu_does_and_gets_its_memory_back(base: Path) -> None:
    import torch

    on_gpu, expected = _attempt(base), _measure(_attempt(base))
    on_gpu.loaded.device = torch.device("cuda", 0)
    before = torch.cuda.memory_allocated()
    assert _measure(on_gpu) == pytest.approx(expected, rel=2e-3)
    assert torch.cuda.memory_allocated() == torch.cuda.max_memory_allocated() == before
