"""The chunked loss against models' own logits, in numbers. `pytest tests/training/test_loss.py`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.data.samples import SampleTable
from tests.tiny_model import FAMILIES, make_base, make_recipe, make_table

pytestmark = pytest.mark.slow


def _relative(mine: Any, theirs: Any) -> float:
    return float((mine - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("factor", [1.0, 0.0625])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradient_in_float64(
    chunk: int, factor: float, cap: float | None, with_bias: bool
) -> None:
    import torch
    from torch.nn.functional import cross_entropy

    from job.training.families import LogitScale
    from job.training.loss import chunked_nll

    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    hidden, weight = random(20, 16), random(50, 16)
    bias = random(50) if with_bias else None
    targets = torch.randint(0, 50, (20,), generator=generator)
    mine, theirs = (hidden.clone().requires_grad_() for _ in range(2))
    chunked = chunked_nll(
        mine, weight, bias, targets, scale=LogitScale(factor, cap), chunk_targets=chunk
    )
    (chunked / 7 * 65536).backward()  # as a step does: divided by its targets, scaled
    logits = torch.nn.functional.linear(theirs, weight, bias) * factor
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    plain = cross_entropy(logits, targets, reduction="sum")
    (plain / 7 * 65536).backward()  # type: ignore[no-untyped-call]
    assert _relative(chunked.detach(), plain.detach()) <= 1e-9
    assert _relative(mine.grad, theirs.grad) <= 1e-9


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_as_its_own_logits_have_it_in_float64(
    tmp_path: Path, model_type: str, tied: bool
) -> None:
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    from job.training.attention import enable_packed_attention
    from job.training.batching import pack
    from job.training.families import logit_scale
    from job.training.loss import chunked_nll

    folder = make_base(tmp_path, model_type=model_type, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    enable_packed_attention(model)
    batch = next(pack(make_table(5, seed=5), range(5), 10_000))
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "sample_lengths": list(batch.sample_lengths),
    }
    mine = model.base_model(**inputs).last_hidden_state[0, batch.target_positions]
    mine = mine.detach().requires_grad_()
    head = model.get_output_embeddings()
    assert (head.weight is model.get_input_embeddings().weight) == tied
    scale = logit_scale(model.config)
    chunked = chunked_nll(mine, head.weight, head.bias, batch.targets, scale=scale, chunk_targets=7)
    chunked.backward()
    seen: list[torch.Tensor] = []

    def at_head(_: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        seen.append(arguments[0].detach().requires_grad_())
        return (seen[0],)

    head.register_forward_pre_hook(at_head)
    logits = model(**inputs).logits[0, batch.target_positions]
    plain = cross_entropy(logits, batch.targets, reduction="sum")
    plain.backward()
    assert seen[0].grad is not None
    assert _relative(chunked.detach(), plain.detach()) <= 1e-9
    assert _relative(mine.grad, seen[0].grad[0, batch.target_positions]) <= 1e-9


@pytest.mark.parametrize("model_type", [*FAMILIES, "gpt_neox"])  # the last takes the plain way
def test_each_sample_has_the_loss_that_it_has_alone(tmp_path: Path, model_type: str) -> None:
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    from job.training.attention import enable_packed_attention
    from job.training.batching import pack
    from job.training.loss import has_chunked_loss, sample_nll

    folder = make_base(tmp_path, model_type=model_type)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    made = make_table(7, seed=5)
    is_target = np.ones(len(made.input_ids), dtype=bool)
    is_target[made.offsets[:-1]] = False  # all but the first: the next sample begins right behind
    table = SampleTable(made.input_ids, is_target, made.offsets)
    alone = []
    with torch.no_grad():
        for one in pack(table, range(7), 1):
            logits = model(one.input_ids).logits[0, one.target_positions]
            alone.append(cross_entropy(logits, one.targets, reduction="sum"))
        if has_chunked_loss(model):
            enable_packed_attention(model)
        budget = 10_000 if has_chunked_loss(model) else 1
        mine = torch.cat([sample_nll(model, batch) for batch in pack(table, range(7), budget)])
    assert mine.dtype == torch.float64
    assert _relative(mine, torch.stack(alone)) <= 1e-6  # the head is computed in fp32 for both
    assert len({round(float(each), 3) for each in mine}) == 7, "no sum was spread evenly"


def test_logits_are_never_allocated(tmp_path: Path) -> None:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from job.training.batching import samples_of_step
    from job.training.footprint import loss_chunk_targets
    from job.training.model import add_adapters, load_base
    from job.training.state import TrainState
    from job.training.trainer import Trainer

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.untyped_storage().nbytes() // 4)
            return result

    vocabulary = 32_000
    folder = make_base(tmp_path, vocab_size=vocabulary)
    cpu, recipe = torch.device("cpu"), make_recipe(per_device_train_batch_size=16)
    model = add_adapters(load_base(str(folder), None, cpu), recipe)
    trainer = Trainer(model, recipe, device=cpu, token_budget=100_000)
    table = make_table(64, seed=1, longest=70)
    limit = loss_chunk_targets(vocabulary) * vocabulary
    lengths = [int(table.lengths[i]) for i in samples_of_step(recipe, len(table), 0)]
    assert sum(length // 2 for length in lengths) * vocabulary > limit, "the test needs more"
    with Largest() as step:
        trainer.step(table, TrainState())
    with Largest() as evaluation:
        trainer.evaluate(table, TrainState())
    assert vocabulary * 64 < step.numel <= limit  # more than the head: the hook sees the chunks
    assert vocabulary * 64 < evaluation.numel <= limit


def test_the_scaled_gradient_of_a_large_loss_scale_stays_finite_in_fp16() -> None:
    import torch

    from job.training.families import LogitScale
    from job.training.loss import chunked_nll

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=generator)
    weight = torch.randn(1000, 64, generator=generator) / 100
    targets = torch.randint(0, 1000, (300,), generator=generator)
    half, full = hidden.half().requires_grad_(), hidden.clone().requires_grad_()
    for leaf, head in ((half, weight.half()), (full, weight)):
        nll = chunked_nll(leaf, head, None, targets, scale=LogitScale())
        (nll / 4 * 2**20).backward()  # type: ignore[no-untyped-call]  # 2^18: beyond fp16 by itself
    assert half.grad is not None
    assert bool(half.grad.isfinite().all())
    assert _relative(half.grad.float(), full.grad) < 2e-2
