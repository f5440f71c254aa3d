"""A base and its adapters as they are loaded for training. `pytest tests/training/test_model.py`"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from job.errors import SettingsError
from tests.tiny_model import FAMILIES, make_base, make_recipe, make_table
from tests.training.tiny_training import make_model, make_trainer, never_stop

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
