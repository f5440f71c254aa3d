"""A base and its adapters as they are loaded for training. `pytest tests/test_model.py`"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from job.errors import SettingsError
from tests.tiny_model import FAMILIES, make_base, make_recipe, make_table
from tests.tiny_training import make_model, make_trainer, never_stop

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_4_bit_with_fp32_adapters_on_all_layers_but_the_head(
    tmp_path: Path, model_type: str
) -> None:
    import bitsandbytes as bnb
    import torch

    model = make_model(make_base(tmp_path, model_type=model_type), make_recipe())
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

    trainer, state = make_trainer(base, make_recipe(warmup_ratio=0.0)), TrainState()
    layers = [m for m in trainer.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert layers
    # The gradients below only show it on a CPU that has AVX512-BF16; this shows it on every one.
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    table = make_table(8, seed=6)
    trainer.evaluate(table, state, never_stop)
    trainer.step(table, state)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0, name


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


@pytest.mark.parametrize("dtype_name", ["float32", "float16"])
def test_a_pre_quantised_bf16_checkpoint_is_normalised(bf16_base: Path, dtype_name: str) -> None:
    import torch

    from job.training.model import load_base, normalise_dtype

    dtype = getattr(torch, dtype_name)
    model = load_base(str(bf16_base), None, torch.device("cpu"))
    frequencies = model.base_model.rotary_emb.inv_freq.clone()
    normalise_dtype(model, dtype)  # fp16 is what load_base() does on a GPU
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
    assert torch.equal(model.base_model.rotary_emb.inv_freq, frequencies)
    assert frequencies.dtype == torch.float32
    assert not any(t.dtype == torch.bfloat16 for t in (*model.parameters(), *model.buffers()))


def test_weights_that_fp16_cannot_hold_are_refused(base: Path) -> None:
    import torch

    from job.training.model import load_base, normalise_dtype

    model = load_base(str(base), None, torch.device("cpu"))
    model.model.norm.weight.data[3] = 1e5
    with pytest.raises(SettingsError, match=r"model.norm.weight holds values that fp16 cannot"):
        normalise_dtype(model, torch.float16)


def test_a_step_in_fp16_autocast_computes_in_fp16_and_keeps_fp32_adapters(bf16_base: Path) -> None:
    """A CPU in place of a GPU: what autocast, packing and loss do with dtypes is the same."""
    import torch

    from job.training.batching import pack
    from job.training.loss import target_nll
    from job.training.model import (
        add_adapters,
        load_base,
        normalise_dtype,
        set_recompute,
    )

    batch = next(pack(make_table(4, seed=3), range(4), 10_000))
    losses = []
    for dtype in (torch.float32, torch.float16):
        base = load_base(str(bf16_base), None, torch.device("cpu"))
        normalise_dtype(base, dtype)
        model = add_adapters(base, make_recipe())
        set_recompute(model, "all")
        seen: dict[str, torch.dtype] = {}
        for name, module in model.named_modules():
            if name.endswith(("lora_A.default", "lora_B.default", "base_layer", "norm")):
                module.register_forward_hook(
                    lambda _m, _i, output, name=name, to=seen: to.update({name: output.dtype})
                )
        with torch.autocast("cpu", dtype=torch.float16, enabled=dtype == torch.float16):
            nll = target_nll(model, batch)
        (nll / len(batch.targets) * 1024).backward()
        losses.append(float(nll.detach()))
        assert set(seen.values()) == {dtype}
        assert nll.dtype == torch.float32
        gradients = {p.grad.dtype for p in model.parameters() if p.grad is not None}
        assert gradients == {torch.float32}
    assert math.isclose(losses[0], losses[1], rel_tol=2e-3)


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
