"""fp16: weights, autocast, loss scaling; on the CPU, and on a GPU if there is one.

`pytest tests/training/test_precision.py`. A CPU's fp16 rounds, overflows and is scaled as a GPU's
is; what differs is the order in which kernels sum.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from job.errors import SettingsError
from tests.tiny_model import make_base, make_table
from tests.training.tiny_training import half_trainer, on_every_device


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def bf16_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Unsloth publishes them: 4-bit, and everything else in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("bf16")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization, dtype=torch.bfloat16
    ).save_pretrained(folder)
    return folder


def _gradients(trainer: Any, table: Any) -> Any:
    """Of a step, unscaled, in one row; the weights stay."""
    import torch

    from job.training.batching import pack

    torch.manual_seed(0)
    batches = pack(table, range(len(table)), trainer.token_budget)
    trainer.accumulate(batches, table.num_target_tokens)
    trainer.scaler.unscale_(trainer.optimizer)
    return torch.cat([p.grad.flatten().cpu() for p in trainer.parameters])


def _plain_gradients(trainer: Any, table: Any) -> Any:
    """The same by PyTorch's own loss on whole logits."""
    import torch

    from job.training.batching import pack
    from job.training.precision import autocast

    causal_lm = trainer.model.get_base_model()
    for batch in pack(table, range(len(table)), trainer.token_budget):
        row = batch.to(trainer.device)
        with autocast(trainer.device, trainer.dtype):
            logits = causal_lm(
                input_ids=row.input_ids,
                position_ids=row.position_ids,
                use_cache=False,
                sample_lengths=list(row.sample_lengths),
            ).logits[0, row.target_positions]
            nll = torch.nn.functional.cross_entropy(logits.float(), row.targets, reduction="sum")
        trainer.scaler.scale(nll / table.num_target_tokens).backward()
    trainer.scaler.unscale_(trainer.optimizer)
    return torch.cat([p.grad.flatten().cpu() for p in trainer.parameters])


@pytest.mark.slow
@pytest.mark.parametrize("dtype_name", ["float32", "float16"])
def test_a_pre_quantised_bf16_checkpoint_is_normalised(bf16_base: Path, dtype_name: str) -> None:
    import torch

    from job.training.model import load_base

    dtype, cpu = getattr(torch, dtype_name), torch.device("cpu")
    model = load_base(str(bf16_base), None, cpu, dtype=dtype)
    num_layers = 0
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            num_layers += 1
            state = module.weight.quant_state
            assert module.compute_dtype == state.dtype == dtype
            assert state.nested
            scales = (
                state.absmax,
                state.state2.absmax,
                state.offset,
                state.code,
                state.state2.code,
            )
            assert state.state2.dtype == torch.float32
            assert [t.dtype for t in scales] == [torch.uint8, *[torch.float32] * 4]
    assert num_layers == 14
    assert {p.dtype for p in model.parameters()} == {dtype, torch.uint8}
    for part in (model.get_input_embeddings(), model.get_output_embeddings(), model.model.norm):
        assert part.weight.dtype == dtype
    assert not any(t.dtype == torch.bfloat16 for t in (*model.parameters(), *model.buffers()))


@pytest.mark.slow
def test_rotary_frequencies_stay_fp32(bf16_base: Path) -> None:
    import torch

    from job.training.model import load_base

    exact, half = (
        load_base(str(bf16_base), None, torch.device("cpu"), dtype=dtype).base_model.rotary_emb
        for dtype in (torch.float32, torch.float16)
    )
    assert half.inv_freq.dtype == torch.float32
    assert torch.equal(half.inv_freq, exact.inv_freq)


@pytest.mark.slow
def test_weights_that_fp16_cannot_hold_are_refused(base: Path) -> None:
    import torch

    from job.training.model import load_base
    from job.training.precision import normalise_dtype

    model = load_base(str(base), None, torch.device("cpu"))
    model.model.norm.weight.data[3] = 1e5
    with pytest.raises(SettingsError, match=r"model.norm.weight holds values that fp16 cannot"):
        normalise_dtype(model, torch.float16)


@on_every_device
@pytest.mark.parametrize("recompute", ["none", "all"])
def test_inside_a_lora_layer_everything_is_fp16_and_adapters_stay_fp32(
    bf16_base: Path, device: str, recompute: str
) -> None:
    import torch

    from job.training.state import TrainState

    trainer = half_trainer(bf16_base, device)
    trainer.set_plan(80, recompute)
    seen: dict[str, torch.dtype] = {}
    for name, module in trainer.model.named_modules():
        if name.endswith(("lora_A.default", "lora_B.default", "base_layer", "norm")):
            module.register_forward_hook(
                lambda _m, _i, output, name=name: seen.update({name: output.dtype})
            )
    trainer.step(make_table(8, seed=1), TrainState())
    assert set(seen.values()) == {torch.float16}
    assert {p.dtype for p in trainer.parameters} == {torch.float32}
    assert {p.grad.dtype for p in trainer.parameters} == {torch.float32}
    assert not any(t.dtype == torch.bfloat16 for t in trainer.model.parameters())


@on_every_device
def test_losses_are_near_those_of_fp32(base: Path, device: str) -> None:
    from job.training.state import TrainState

    held_out = make_table(12, seed=2)
    half, exact = (
        half_trainer(base, where, dtype).evaluate(held_out, TrainState())
        for where, dtype in ((device, "float16"), ("cpu", "float32"))
    )
    assert half == pytest.approx(exact, rel=2e-3)


@on_every_device
def test_gradients_are_as_near_to_fp32s_as_those_of_the_plain_loss(base: Path, device: str) -> None:
    """1 % in this model, whichever way: it is autocast's own rounding."""
    import torch

    table = make_table(12, seed=2)
    exact = _gradients(half_trainer(base, "cpu", "float32", lora_dropout=0.0), table)
    ours = _gradients(half_trainer(base, device, lora_dropout=0.0), table)
    plain = _plain_gradients(half_trainer(base, device, lora_dropout=0.0), table)
    size = torch.linalg.norm(exact)
    assert torch.linalg.norm(plain - exact) < 0.03 * size
    assert torch.linalg.norm(ours - exact) < 1.1 * torch.linalg.norm(plain - exact)
    assert torch.linalg.norm(ours - plain) < 2e-3 * size


@on_every_device
def test_small_gradients_survive_fp16(base: Path, device: str) -> None:
    """Of a mean over 10 million targets: unlifted, most of what leaves the head would be 0."""
    import torch

    from job.training.batching import pack

    table = make_table(4, seed=3)
    sums = []
    for where, dtype in ((device, "float16"), ("cpu", "float32")):
        trainer = half_trainer(base, where, dtype, lora_dropout=0.0)
        trainer.accumulate(pack(table, range(4), trainer.token_budget), 10_000_000)
        trainer.scaler.unscale_(trainer.optimizer)
        sums.append(torch.cat([p.grad.flatten().cpu() for p in trainer.parameters]))
    assert torch.linalg.norm(sums[0] - sums[1]) < 0.03 * torch.linalg.norm(sums[1])
