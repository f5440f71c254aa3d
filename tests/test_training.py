"""QLoRA training on the CPU, piece by piece. `pytest tests/test_training.py`"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.data.samples import SampleTable
from job.errors import SettingsError
from tests.tiny_model import FAMILIES, make_base, make_recipe, make_table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def _model(base: Path, recipe: Any) -> Any:
    import torch

    from job.training.model import add_adapters, load_base

    return add_adapters(load_base(str(base), None, torch.device("cpu")), recipe)


def _trainer(base: Path, recipe: Any, token_budget: int = 80) -> Any:
    import torch

    from job.training.trainer import Trainer

    model = _model(base, recipe)
    return Trainer(model, recipe, device=torch.device("cpu"), token_budget=token_budget)


def _go() -> None:
    """A `should_stop` that never stops."""


def _train(trainer: Any, **changes: Any) -> Any:
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
        "should_stop": _go,
    }
    return train(trainer, make_table(40, seed=1), make_table(12, seed=2), **options | changes)


class Kept:
    """A `Keeper` that leaves everything on this disk."""

    resume_dir: Path | None = None
    best: Path | None = None

    def is_due(self) -> bool:
        return False

    def put_best(self, folder: Path) -> Any:
        from job.checkpoint import seal_folder

        self.best = folder
        return seal_folder("adapter", folder)

    def put_checkpoint(self, folder: Path, step: int, best: str | None) -> None:
        raise AssertionError("none was due")

    def report(self, **progress: Any) -> None:
        pass


def test_order_of_samples_is_a_permutation_an_epoch_and_crosses_its_end() -> None:
    from job.training.batching import samples_of_step

    recipe = make_recipe()
    stream = [i for step in range(15) for i in samples_of_step(recipe, 10, step)]
    for epoch in range(6):
        assert sorted(stream[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert stream[:10] != stream[10:20]
    assert samples_of_step(recipe, 10, 7) == stream[28:32]
    assert samples_of_step(make_recipe(seed=18), 10, 0) != stream[:4]


def test_packing_keeps_order_and_fills_the_budget() -> None:
    from job.training.batching import pack

    table = make_table(9, seed=3)
    batches = list(pack(table, range(9), 60))
    assert np.concatenate([b.input_ids[0] for b in batches]).tolist() == table.input_ids.tolist()
    assert all(b.num_tokens <= 60 for b in batches)
    sizes = [b.num_tokens for b in batches]
    starts = [[*(b.position_ids[0] == 0).nonzero()[:, 0].tolist(), b.num_tokens] for b in batches]
    firsts = [start[1] for start in starts[1:]]  # tokens of each next micro-batch's first sample
    full = all(size + first > 60 for size, first in zip(sizes[:-1], firsts, strict=True))
    assert full, "as few micro-batches as the budget allows"
    assert sum(len(b.targets) for b in batches) == table.num_target_tokens
    assert [b.num_tokens for b in pack(table, [0, 1], 1)] == table.lengths[:2].tolist()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_4_bit_with_fp32_adapters_on_all_layers_but_the_head(
    tmp_path: Path, model_type: str
) -> None:
    import bitsandbytes as bnb
    import torch

    model = _model(make_base(tmp_path, model_type=model_type), make_recipe())
    linear = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    adapted = {n.rpartition(".lora_A")[0] for n, _ in model.named_parameters() if "lora_A" in n}
    assert len(adapted) == len(linear) > 0
    assert not any("lm_head" in name for name in adapted)
    assert all(m.weight.quant_type == "nf4" for m in linear)
    assert all(m.weight.quant_state.nested for m in linear), "double quantisation"
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert parameter.dtype in (torch.float32, torch.uint8), name


def test_gradients_reach_the_whole_depth_after_an_evaluation(base: Path) -> None:
    """The bitsandbytes CPU trap: an evaluation first, and later gradients are lost."""
    import bitsandbytes as bnb

    from job.training.state import TrainState

    trainer, state = _trainer(base, make_recipe(warmup_ratio=0.0)), TrainState()
    layers = [m for m in trainer.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert layers
    # The gradients below only show it on a CPU that has AVX512-BF16; this shows it on every one.
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    table = make_table(8, seed=6)
    trainer.evaluate(table, state, _go)
    trainer.step(table, state)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0, name


def test_training_lowers_eval_loss_and_keeps_the_best(base: Path) -> None:
    seen: list[tuple[int, float, bool]] = []
    outcome = _train(
        _trainer(base, make_recipe(learning_rate=0.03)),
        on_eval=lambda s, loss, best: seen.append((s, loss, best)),
    )
    state = outcome.state
    assert (outcome.status, state.step) == ("completed", 20)
    assert [step for step, _ in state.curve] == [0, 5, 10, 15, 20]
    assert state.best_loss == min(loss for step, loss in state.curve if step > 0)
    assert state.best_loss < 0.99 * state.curve[0][1]
    assert [best for _, _, best in seen][:2] == [False, True]


def test_two_runs_with_one_seed_are_bitwise_equal_with_dropout_on(base: Path) -> None:
    import torch

    recipe = make_recipe(lora_dropout=0.1)
    first, second = (_train(_trainer(base, recipe)).state for _ in range(2))
    assert first.curve == second.curve
    assert first.best is not None
    assert second.best is not None
    for name, tensor in first.best["adapter"].items():
        assert torch.equal(tensor, second.best["adapter"][name]), name
    other = _train(_trainer(base, make_recipe(lora_dropout=0.1, seed=18))).state
    assert other.curve != first.curve


def test_eval_loss_does_not_depend_on_the_token_budget(base: Path) -> None:
    from job.training.state import TrainState

    table = make_table(20, seed=7)
    losses = [
        _trainer(base, make_recipe(), token_budget=budget).evaluate(table, TrainState(), _go)
        for budget in (1, 50, 333, 100_000)
    ]
    assert max(losses) - min(losses) < 1e-6 * losses[0]


def test_patience_ends_the_trial_with_the_best_adapter(base: Path) -> None:
    import torch

    from job.training.state import TrainState

    # A learning rate that only does harm after the first steps.
    recipe = make_recipe(learning_rate=3.0, lr_scheduler="constant", patience=2, planned_steps=80,
                         eval_steps=tuple(range(1, 81)))  # fmt: skip
    trainer = _trainer(base, recipe)
    outcome = _train(trainer)
    state = outcome.state
    assert outcome.status == "completed"
    assert "no better eval/loss in 2 evaluations" in outcome.reason
    assert state.step < 80
    assert state.best_step == state.step - 2
    from job.training.model import load_adapter_state

    assert state.best is not None
    load_adapter_state(trainer.model, state.best["adapter"])
    again = trainer.evaluate(make_table(12, seed=2), TrainState(), _go)
    assert math.isclose(again, state.best_loss, rel_tol=1e-6)
    assert not any(torch.isnan(t).any() for t in state.best["adapter"].values())


def test_the_budget_truncates_after_a_last_evaluation(base: Path) -> None:
    outcome = _train(_trainer(base, make_recipe()), out_of_time=lambda state: "the budget is spent")
    assert (outcome.status, outcome.state.step) == ("truncated", 1)
    assert outcome.state.best_step == 1


def test_a_nan_diverges_and_keeps_no_bad_adapter(base: Path) -> None:
    trainer = _trainer(base, make_recipe())
    nll = trainer._nll
    trainer._nll = lambda batch: nll(batch) * (math.nan if trainer.model.training else 1)
    outcome = _train(trainer)
    assert (outcome.status, outcome.state.step) == ("diverged", 1)
    assert outcome.state.best is None


def test_twenty_skipped_steps_in_a_row_diverge(base: Path) -> None:
    from job.training.trainer import MAX_SKIPPED_STEPS

    trainer = _trainer(base, make_recipe(planned_steps=40))
    nll = trainer._nll

    def overflowing(batch: Any) -> Any:  # a finite loss whose gradients are not
        loss = nll(batch)
        if loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    trainer._nll = overflowing
    outcome = _train(trainer)
    assert (outcome.status, outcome.state.step) == ("diverged", MAX_SKIPPED_STEPS)


def test_a_hopeless_trial_is_stopped_after_an_evaluation(base: Path) -> None:
    outcome = _train(
        _trainer(base, make_recipe()),
        stop_early=lambda state: "worse than others" if len(state.curve) == 3 else None,
    )
    assert (outcome.status, outcome.state.step) == ("stopped", 10)
    assert outcome.state.best is not None


def test_out_of_memory_recomputes_then_halves_the_budget_and_changes_no_loss(base: Path) -> None:
    import torch

    recipe = make_recipe(lora_dropout=0.0)
    calm = _train(_trainer(base, recipe, token_budget=256)).state
    trainer = _trainer(base, recipe, token_budget=256)
    nll = trainer._nll

    def tight(batch: Any) -> torch.Tensor:
        if batch.num_tokens > 100:
            raise torch.OutOfMemoryError("planted")
        return nll(batch)

    trainer._nll = tight
    outcome = _train(trainer)
    assert (trainer.recompute, trainer.token_budget) == ("all", 64)
    assert outcome.status == "completed"
    for (_, mine), (_, theirs) in zip(outcome.state.curve, calm.curve, strict=True):
        assert math.isclose(mine, theirs, rel_tol=1e-5)


def test_a_sample_that_never_fits_is_infeasible(base: Path) -> None:
    import torch

    def full(batch: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("planted")

    trainer = _trainer(base, make_recipe())
    trainer._nll = full
    outcome = _train(trainer)
    assert (outcome.status, outcome.state.step) == ("infeasible", 0)


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
        _train(_trainer(base, make_recipe()), should_stop=stop)


@pytest.mark.parametrize(
    "broken", ["no weights", "junk weights", "not a language model", "a missing weight", "cut off"]
)
def test_a_model_folder_that_is_no_model_names_the_setting(
    base: Path, tmp_path: Path, broken: str
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from job.base_model import resolve_base_model
    from job.training.model import load_base

    config = json.loads((base / "config.json").read_text())
    if broken == "not a language model":
        config["model_type"] = "vit"
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(base / "model.safetensors")
    if broken == "a missing weight":
        del weights["model.embed_tokens.weight"]
    if broken != "no weights":
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if broken == "cut off":
        os.truncate(tmp_path / "model.safetensors", 50_000)
    if broken == "junk weights":
        (tmp_path / "model.safetensors").write_bytes(b"junk" * 100)
    with pytest.raises(SettingsError, match="JOB_BASE_MODEL"):
        load_base(resolve_base_model(str(tmp_path), "main").location, None, torch.device("cpu"))


RELOAD = """
import sys
import numpy as np, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
base, adapter, rows = sys.argv[1:]
quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization,
    dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
table = np.load(rows)
nll = count = 0
for start, end in zip(table["offsets"][:-1], table["offsets"][1:]):
    ids = torch.from_numpy(table["input_ids"][start:end].astype("int64"))[None]
    target = torch.from_numpy(table["is_target"][start:end])
    with torch.no_grad():
        logp = model(input_ids=ids).logits[0].log_softmax(-1)
    where = target.nonzero()[:, 0]
    nll -= float(logp[where - 1, ids[0, where]].sum())
    count += len(where)
print(nll / count)
"""


def test_plain_peft_in_another_process_gives_the_same_eval_loss(base: Path, tmp_path: Path) -> None:
    import torch

    from job.training.fit import FitInputs, fit
    from job.training.memory import MemoryPlan
    from job.training.model import load_base

    held_out: SampleTable = make_table(12, seed=2)
    inputs = FitInputs(
        base=load_base(str(base), None, torch.device("cpu")),
        train_table=make_table(40, seed=1),
        eval_table=held_out,
        memory=MemoryPlan(80),
        out_of_time=lambda state: None,
        stop_early=lambda state: None,
        measure_step_0=True,
        max_adapter_bytes=200_000_000,
    )
    kept = Kept()
    fitted = fit(
        make_recipe(),
        inputs,
        device=torch.device("cpu"),
        work_dir=tmp_path,
        keeper=kept,
        should_stop=_go,
    )
    np.savez(
        tmp_path / "rows.npz",
        input_ids=held_out.input_ids,
        is_target=held_out.is_target,
        offsets=held_out.offsets,
    )
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, base, kept.best, tmp_path / "rows.npz"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert math.isclose(float(done.stdout), fitted.state.best_loss, abs_tol=1e-3)
    history = [json.loads(line) for line in fitted.history_path.read_text().splitlines()]
    assert [h["step"] for h in history if "train/loss" in h] == list(range(1, 21))


def test_an_adapter_over_the_limit_is_infeasible_before_training(
    base: Path, tmp_path: Path
) -> None:
    import torch

    from job.training.fit import FitInputs, fit
    from job.training.memory import MemoryPlan, adapter_parameters
    from job.training.model import load_base

    table = make_table(12, seed=2)
    inputs = FitInputs(
        base=load_base(str(base), None, torch.device("cpu")),
        train_table=table,
        eval_table=table,
        memory=MemoryPlan(80),
        out_of_time=lambda state: None,
        stop_early=lambda state: None,
        measure_step_0=True,
        max_adapter_bytes=20_000,
    )
    recipe = make_recipe(lora_r=16)
    fitted = fit(
        recipe,
        inputs,
        device=torch.device("cpu"),
        work_dir=tmp_path,
        keeper=Kept(),
        should_stop=_go,
    )
    assert (fitted.status, fitted.state.step, fitted.state.best) == ("infeasible", 0, None)
    config = json.loads((base / "config.json").read_text())
    predicted = adapter_parameters(config, 16)
    assert predicted is not None
    assert f"adapter would be {2 * predicted / 1e6:.0f} MB" in fitted.reason
