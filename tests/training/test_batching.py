"""Which samples a step sees, and how they are packed. `pytest tests/training/test_batching.py`"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from job.data.samples import SampleTable
from job.training.footprint import FP16_CUDA, Work, footprint
from job.training.shape import model_shape
from tests.tiny_model import make_recipe, make_table

pytestmark = pytest.mark.slow
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
}  # fmt: skip


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


def _random_table(rng: np.random.Generator) -> SampleTable:
    """Up to 40 samples whose lengths and shares of targets differ widely."""
    lengths = np.clip(rng.lognormal(3, rng.uniform(0.1, 1.5), rng.integers(1, 41)), 2, 400)
    share = rng.uniform(0.02, 1, len(lengths))
    flags = [rng.random(int(n)) < p for n, p in zip(lengths, share, strict=True)]
    for flag in flags:
        flag[0], flag[-1] = False, True
    return SampleTable.concatenate([np.full(len(f), 7, dtype=np.int32) for f in flags], flags)


@pytest.mark.parametrize("seed", range(150))
def test_no_micro_batch_of_any_step_is_heavier_than_the_heaviest(seed: int) -> None:
    """Of random tables, over several epochs, in tokens, in targets and in predicted memory."""
    from job.training.batching import heaviest, pack, samples_of_step

    rng = np.random.default_rng(seed)
    table, budget = _random_table(rng), int(rng.integers(1, 1500))
    recipe = make_recipe(
        seed=seed,
        gradient_accumulation_steps=int(rng.integers(1, 5)),
        per_device_train_batch_size=int(rng.integers(1, 4)),
    )
    shape = model_shape(LLAMA)
    assert shape is not None

    def predicted(batch: Any, mode: Any) -> int:
        work = Work(batch.num_tokens, len(batch.targets), 8, True, mode)
        return footprint(shape, work, FP16_CUDA).total

    most = heaviest(table, recipe.samples_per_step, budget)
    assert most.num_tokens == sum(most.sample_lengths) <= max(budget, int(table.lengths.max()))
    for step in range(60):
        for batch in pack(table, samples_of_step(recipe, len(table), step), budget):
            assert batch.num_tokens <= most.num_tokens
            assert len(batch.targets) <= len(most.targets)
            assert max(batch.sample_lengths) <= max(most.sample_lengths)
            assert all(predicted(batch, m) <= predicted(most, m) for m in ("none", "all"))


def test_the_heaviest_micro_batch_fills_the_budget_and_keeps_positions_and_targets_in_range() -> (
    None
):
    from job.training.batching import heaviest

    table = make_table(40, seed=1)
    most = heaviest(table, 8, 200)
    assert most.num_tokens == 200
    assert max(most.sample_lengths) == table.lengths.max()
    assert most.position_ids[0].tolist() == [p for n in most.sample_lengths for p in range(n)]
    assert int(most.target_positions.min()) >= 0
    assert int(most.target_positions.max()) < most.num_tokens - 1
    few = heaviest(table, 2, 200)  # a step of two samples cannot fill it
    assert few.num_tokens == 2 * table.lengths.max() < 200  # where an epoch ends, the same twice
