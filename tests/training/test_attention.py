"""Packed rows against samples alone and against padded batches.

`pytest tests/training/test_attention.py`
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.data.samples import SampleTable
from tests.tiny_model import FAMILIES, make_base, make_recipe, make_table

pytestmark = pytest.mark.slow


def _model(base: Path, recipe: Any) -> Any:
    import torch

    from job.training.model import add_adapters, load_base

    return add_adapters(load_base(str(base), None, torch.device("cpu")), recipe)


def _hidden(model: Any, batch: Any) -> Any:
    return model.get_base_model().base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        sample_lengths=list(batch.sample_lengths),
        use_cache=False,
    )[0][0]


@pytest.mark.parametrize(
    ("model_type", "sliding_window"),
    [*((family, None) for family in FAMILIES), ("mistral", 8), ("phi3", 8), ("cohere2", 8)],
)
def test_a_packed_sample_is_as_transformers_has_it_alone(
    tmp_path: Path, model_type: str, sliding_window: int | None
) -> None:
    import torch

    from job.training.batching import pack

    changes = {"sliding_window": sliding_window} if sliding_window else {}
    folder = make_base(tmp_path, model_type=model_type, **changes)
    model, table = _model(folder, make_recipe()).eval(), make_table(6, seed=4)
    with torch.no_grad():
        packed = _hidden(model, next(pack(table, range(6), 10_000)))
        model.get_base_model().set_attn_implementation("sdpa")
        alone = [_hidden(model, next(pack(table, [i], 1))) for i in range(6)]
    assert float((packed - torch.cat(alone)).abs().max()) <= 1e-6 * float(packed.abs().max())


def test_what_stands_in_one_sample_changes_no_bit_of_another(tmp_path: Path) -> None:
    import torch

    from job.training.batching import pack

    model, table = _model(make_base(tmp_path), make_recipe()).eval(), make_table(6, seed=4)
    other_ids = table.input_ids.copy()
    mine = slice(int(table.offsets[3]), int(table.offsets[4]))
    other_ids[: mine.start] = 5
    other_ids[mine.stop :] = 7
    other = SampleTable(other_ids, table.is_target, table.offsets)
    with torch.no_grad():
        before, after = (_hidden(model, next(pack(t, range(6), 10_000))) for t in (table, other))
    assert torch.equal(before[mine], after[mine])
    assert not torch.equal(before[: mine.start], after[: mine.start])


def test_a_row_without_its_lengths_is_refused(tmp_path: Path) -> None:
    import torch

    from job.training.batching import pack

    model, batch = _model(make_base(tmp_path), make_recipe()), next(pack(make_table(3, 1), [0], 9))
    with pytest.raises(AssertionError, match="sample_lengths"):
        model(input_ids=batch.input_ids)
    with pytest.raises(AssertionError, match="not this row's"), torch.no_grad():
        _hidden(model, replace(batch, sample_lengths=(1, 2)))


@pytest.mark.parametrize("model_type", ["mistral", "qwen3"])
def test_the_gradient_of_a_step_is_that_of_padded_batches_of_two(
    tmp_path: Path, model_type: str
) -> None:
    """Batch 2 x accumulation 4, padded, divided by the step's targets: equal to 1e-6 relative."""
    import torch
    from torch.nn.functional import cross_entropy

    from job.training.batching import samples_of_step
    from job.training.state import TrainState
    from job.training.trainer import Trainer

    recipe = make_recipe(gradient_accumulation_steps=4, max_grad_norm=1e9)
    base, table = make_base(tmp_path, model_type=model_type), make_table(20, seed=8)
    model = _model(base, recipe)
    for name, parameter in model.named_parameters():  # B starts at zero: A would get no gradient
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    trainer = Trainer(model, recipe, device=torch.device("cpu"), token_budget=70)
    trainer.step(table, TrainState())
    ours = torch.cat([p.grad.flatten() for p in trainer.parameters])  # lr is 0 in step 0
    model.zero_grad()
    model.get_base_model().set_attn_implementation("sdpa")
    indices = samples_of_step(recipe, len(table), 0)
    num_targets = sum(int(_sample(table, i)[1].sum()) for i in indices)
    for pair in np.array(indices).reshape(-1, 2):
        samples = [_sample(table, int(i)) for i in pair]
        longest = max(len(ids) for ids, _ in samples)
        ids, targets, mask = (np.zeros((2, longest), dtype=np.int64) for _ in range(3))
        for row, (sample, is_target) in enumerate(samples):
            ids[row, : len(sample)], mask[row, : len(sample)] = sample, 1
            targets[row, : len(sample)] = is_target
        logits = model(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)
        ).logits
        labels = torch.from_numpy(np.where(targets, ids, -100))
        nll = cross_entropy(logits[:, :-1].reshape(-1, 128), labels[:, 1:].reshape(-1),
                            reduction="sum")  # fmt: skip
        (nll / num_targets).backward()
    theirs = torch.cat([p.grad.flatten() for p in trainer.parameters])
    assert float((ours - theirs).norm() / theirs.norm()) <= 1e-6


def _sample(table: SampleTable, index: int) -> tuple[Any, Any]:
    part = slice(table.offsets[index], table.offsets[index + 1])
    return table.input_ids[part], table.is_target[part]
