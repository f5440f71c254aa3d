"""Which samples a step sees, and how they are packed. `pytest tests/training/test_batching.py`"""

from __future__ import annotations

import numpy as np
import pytest

from tests.tiny_model import make_recipe, make_table

pytestmark = pytest.mark.slow


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
