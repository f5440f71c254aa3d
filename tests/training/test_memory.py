"""Predicted against traced memory, and what a plan picks. `pytest tests/training/test_memory.py`"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.data.samples import SampleTable
from job.training.footprint import FP16_CUDA, FP32_CPU, Recompute, Work, footprint
from job.training.memory import FILL, T4_USABLE_BYTES, Samples, list_plans, plan_memory, row_tokens
from job.training.shape import largest_rank, model_shape
from tests.tiny_model import make_base, make_recipe
from tests.training.memory_trace import most_held, peak_bytes, storage_bytes

MISTRAL_7B = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32768,
}  # fmt: skip
SAMPLES = Samples(longest=1024, mean=220.0, deviation=190.0, per_step=8)
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 700,
              "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2},
    "qwen2": {"vocab_size": 32_000, "hidden_size": 128, "intermediate_size": 384,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "tie_word_embeddings": True},
    "qwen3": {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 512, "head_dim": 48,
              "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4},
    "phi3": {"vocab_size": 1200, "hidden_size": 256, "intermediate_size": 768,
             "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8},
}  # fmt: skip
ROW = [256, 128, 300, 340]  # tokens of the samples of a row
MODES: tuple[Recompute, ...] = ("none", "second", "all")


def _table(lengths: list[int]) -> SampleTable:
    """Samples of which every token but the first is a target."""
    first = np.r_[0, np.cumsum(lengths)][:-1]
    is_target = np.ones(sum(lengths), dtype=bool)
    is_target[first] = False
    ids = np.random.default_rng(0).integers(3, 1000, sum(lengths)).astype(np.int32)
    return SampleTable(ids, is_target, np.r_[0, np.cumsum(lengths)])


PRECISIONS = [
    *((family, "nf4") for family in SHAPES),
    *((family, "none") for family in SHAPES),
    ("llama", "mixed:q_proj,k_proj,v_proj,o_proj"),
    ("llama", "mixed:down_proj"),
    ("qwen2", "mixed:gate_proj,up_proj,down_proj"),
    ("phi3", "mixed:down_proj"),
    ("phi3", "mixed:gate_up_proj"),
]


@pytest.fixture(scope="module", params=PRECISIONS, ids="-".join)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with adapters, dropout on, its config.json and its precision."""
    import torch

    from job.training.model import add_adapters, load_base

    family, quantization = request.param
    folder = make_base(
        tmp_path_factory.mktemp("base"),
        model_type=family,
        max_position_embeddings=2048,
        **SHAPES[family],
    )
    recipe = make_recipe(lora_dropout=0.05, lora_r=8)
    base = load_base(str(folder), None, torch.device("cpu"), quantization=quantization)
    model = add_adapters(base, recipe)
    return model, recipe, json.loads((folder / "config.json").read_text()), quantization


def test_a_trace_takes_off_nothing_that_was_there_before() -> None:
    assert most_held([(1, 100), (1, -100), (2, 60), (3, 50), (2, -60), (4, 40)]) == 110
    assert most_held([(9, -100), (1, 40), (1, -40), (9, 30)]) == 40


@pytest.mark.slow
def test_a_trace_sees_what_torch_takes_and_gives_back() -> None:
    import torch

    def work() -> None:
        first = torch.empty(1000)
        del first
        held.extend([torch.empty(2000), torch.empty(500)])

    held: list[Any] = []
    assert peak_bytes(work) == 4 * 2500


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths", "modes"),
    [(ROW, ("all", "none")), ([300, 212], ("second", "none"))],
    ids=["1024", "512"],
)
def test_the_predicted_peak_is_the_traced_one_within_5_percent(
    loaded: Any, lengths: list[int], modes: tuple[Recompute, ...]
) -> None:
    """A step of two equal micro-batches, fp32."""
    import torch

    from job.training.state import TrainState
    from job.training.trainer import Trainer

    model, recipe, config, quantization = loaded
    shape = model_shape(config, quantization)
    assert shape is not None
    trainer = Trainer(model, recipe, device=torch.device("cpu"), token_budget=sum(lengths))
    batch = trainer.heaviest(_table(lengths))
    assert batch.num_tokens == sum(lengths)
    for mode in modes:
        trainer.set_plan(sum(lengths), mode)
        trainer.take_step([batch], TrainState())  # gradients and moments are there
        standing = storage_bytes(model, trainer.optimizer)
        traced = standing + peak_bytes(lambda: trainer.take_step([batch, batch], TrainState()))
        work = Work(batch.num_tokens, len(batch.targets), recipe.lora_r, True, mode)
        predicted = footprint(shape, work, FP32_CPU)
        assert predicted.weights + predicted.adapter == pytest.approx(standing, rel=0.02), mode
        assert predicted.total == pytest.approx(traced, rel=0.05), mode


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "none", "mixed:down_proj,v_proj"])
def test_the_prediction_for_fp16_autocast_holds_within_5_percent(
    tmp_path: Path, quantization: str
) -> None:
    """What a GPU's dtypes do, on the CPU; but for dropout masks (bool there) and cuBLAS."""
    import torch

    from job.training.batching import pack
    from job.training.loss import target_nll
    from job.training.model import add_adapters, load_base, normalise_dtype, set_recompute

    folder = make_base(tmp_path, max_position_embeddings=2048, **SHAPES["llama"])
    base = load_base(str(folder), None, torch.device("cpu"), quantization=quantization)
    normalise_dtype(base, torch.float16)
    model = add_adapters(base, make_recipe(lora_dropout=0.05, lora_r=8)).train()
    shape = model_shape(json.loads((folder / "config.json").read_text()), quantization)
    assert shape is not None
    batch = next(pack(_table(ROW), range(4), 10_000))
    precision = replace(FP16_CUDA, masking=2, norm=4, workspace=0)

    def micro_batch() -> None:
        with torch.autocast("cpu", dtype=torch.float16):
            nll = target_nll(model, batch)
        (nll / len(batch.targets)).backward()

    for mode in MODES:
        set_recompute(model, mode)
        micro_batch()
        parts = footprint(shape, Work(1024, len(batch.targets), 8, True, mode), precision)
        standing = storage_bytes(model, None) + 8 * shape.adapter_weights(8)
        traced = standing + peak_bytes(micro_batch)
        assert parts.weights + parts.adapter == pytest.approx(standing, rel=0.02), mode
        assert parts.total == pytest.approx(traced, rel=0.05), mode


def test_only_what_is_in_4_bits_is_dequantised_in_backward() -> None:
    """With few tokens a matrix of 117 MB is most of what a 7B's backward takes."""
    work = Work(256, 256, 8, True, "all")
    four, down, whole = (
        footprint(shape, work, FP16_CUDA).total - footprint(shape, work, FP16_CUDA).weights
        for mode in ("nf4", "mixed:down_proj", "none")
        if (shape := model_shape(MISTRAL_7B, mode)) is not None
    )
    assert four - whole > 80e6
    assert whole < down <= four, "gate and up are still dequantised"


def _plan(config: dict[str, Any] = MISTRAL_7B, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "lora_r": 8,
        "lora_dropout": 0.05,
        "per_device_train_batch_size": 2,
        "usable_bytes": T4_USABLE_BYTES,
    }
    return plan_memory(config, changes.pop("samples", SAMPLES), **options | changes)


def test_the_cards_model_fits_a_t4_under_13_5_gb_without_recomputing() -> None:
    plan = _plan()
    assert (plan.token_budget, plan.recompute, plan.warm_up) == (1280, "none", True)
    assert plan.predicted.total < 13.5e9
    # 7.25 G weights, of which 0.27 G in embeddings and head; 21 M in the adapter.
    assert plan.predicted.weights == pytest.approx(6.98e9 * 0.516 + 0.27e9 * 2, rel=0.01)
    assert plan.predicted.adapter == 16 * 20_971_520
    assert str(plan).startswith(
        "1280 tokens a micro-batch, no layer recomputed; predicted peak 11."
    )


@pytest.mark.parametrize(
    ("usable_gib", "expected"),
    [(80, "none"), (13, "none"), (10, "second"), (7, "all")],
)
def test_less_memory_means_more_recomputing(usable_gib: float, expected: str) -> None:
    plan = _plan(usable_bytes=int(usable_gib * 2**30))
    assert plan.recompute == expected
    assert plan.token_budget >= SAMPLES.longest
    assert plan.predicted.total <= FILL * usable_gib * 2**30
    assert plan.predicted.total <= plan.usable_bytes


def test_the_plan_is_the_fastest_of_those_that_fit() -> None:
    shape, plan = model_shape(MISTRAL_7B), _plan()
    assert shape is not None
    plans = list_plans(shape, SAMPLES, lora_r=8, lora_dropout=0.05, usable_bytes=T4_USABLE_BYTES)
    totals = {(p.token_budget, p.recompute): p.predicted.total for p in plans if p.predicted}
    assert totals[2048, "all"] < totals[2048, "second"] < totals[2048, "none"]
    assert totals[1024, "none"] < totals[2048, "none"]
    fitting = [p for p in plans if p.predicted and p.predicted.total <= FILL * T4_USABLE_BYTES]
    assert plan.relative_cost == pytest.approx(min(p.relative_cost for p in fitting), abs=1e-3)


@pytest.mark.parametrize(("length", "per_step"), [(17, 8), (60, 4), (250, 4), (300, 1)])
def test_a_step_of_short_rows_is_one_micro_batch(length: int, per_step: int) -> None:
    """Each micro-batch dequantises all weights, and a step of short rows always has room."""
    samples = Samples(longest=length, mean=length, deviation=0, per_step=per_step)
    assert _plan(samples=samples).token_budget == length * per_step


def test_a_budget_is_judged_by_steps_light_and_heavy() -> None:
    """A budget of the mean step's tokens splits the half of the steps that are heavier."""
    even, uneven = replace(SAMPLES, deviation=0.0), SAMPLES
    assert row_tokens(2048, even) == 1760
    assert row_tokens(2048, uneven) < 1500
    assert row_tokens(8192, uneven) == 1760
    lengths = np.random.default_rng(1).lognormal(5.3, 0.8, 8000).clip(16, 1024).astype(int)
    samples = Samples.of(lengths, 8)
    for budget in (1024, 1536, 2048, 3072):
        steps = [greedy_rows(step, budget) for step in lengths.reshape(-1, 8)]
        assert row_tokens(budget, samples) == pytest.approx(lengths.sum() / sum(steps), rel=0.08), (
            budget
        )


def greedy_rows(lengths: Any, budget: int) -> int:
    """The micro-batches of a step whose samples are packed in their order."""
    rows, tokens = 1, 0
    for length in lengths:
        rows, tokens = (rows, tokens + length) if tokens + length <= budget else (rows + 1, length)
    return rows


def test_the_best_plan_of_each_other_mode_that_fits_is_a_rival() -> None:
    plan = _plan()
    assert [rival.recompute for rival in plan.rivals] == ["second", "all"]
    for rival in plan.rivals:
        assert rival.predicted.total <= FILL * T4_USABLE_BYTES
        assert rival.relative_cost >= plan.relative_cost
        assert rival.token_budget > plan.token_budget, "memory that is free takes longer rows"
    assert _plan(usable_bytes=7 * 2**30).rivals == ()
    assert _plan(usable_bytes=4 * 2**30).rivals == (), "nothing fits"
    assert _plan(usable_bytes=None).rivals == (), "a CPU times nothing"
    assert _plan({"model_type": "opt"}).rivals == ()


def test_where_nothing_fits_the_smallest_is_tried() -> None:
    plan = _plan(usable_bytes=4 * 2**30)
    assert (plan.token_budget, plan.recompute, plan.warm_up) == (1024, "all", True)


def test_a_family_without_prediction_takes_the_cards_batch_and_recomputes_all() -> None:
    for config in ({"model_type": "opt"}, {"model_type": "llama"}, {"model_type": "cohere"}):
        plan = _plan(config)
        assert (plan.token_budget, plan.recompute, plan.warm_up) == (2048, "all", True)
        assert plan.predicted is None
        assert str(plan) == "2048 tokens a micro-batch, all layers recomputed"


def test_a_cpu_recomputes_nothing_and_rehearses_nothing() -> None:
    plan = _plan(usable_bytes=None)
    assert (plan.recompute, plan.warm_up) == ("none", False)
    assert math.isnan(plan.relative_cost)


def test_largest_rank_is_the_last_whose_adapter_is_within_the_limit() -> None:
    shape = model_shape(MISTRAL_7B)
    assert shape is not None
    limit = 2 * shape.adapter_weights(16)  # bytes in fp16
    assert [largest_rank(MISTRAL_7B, limit + more) for more in (-1, 0, 1)] == [15, 16, 16]
    assert largest_rank(MISTRAL_7B, 200e6) == 38, "32 is 168 MB"
    assert largest_rank({"model_type": "gpt_neox"}, 200e6) is None
