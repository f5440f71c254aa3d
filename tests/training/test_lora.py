"""Our forward pass of a LoRA layer against PEFT's own. `pytest tests/training/test_lora.py`"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_model import make_base, make_recipe, make_table
from tests.training.tiny_training import make_trainer

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("quantization", ["nf4", "none", "mixed:down_proj,k_proj"])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
def test_output_and_gradients_are_pefts(
    tmp_path: Path, lora_dropout: float, quantization: str
) -> None:
    import torch
    from peft.tuners.lora.bnb import Linear4bit
    from peft.tuners.lora.layer import Linear

    from job.training.model import add_adapters, load_base

    folder, cpu = str(make_base(tmp_path)), torch.device("cpu")
    base = load_base(folder, None, cpu, quantization=quantization)
    recipe = make_recipe(lora_dropout=lora_dropout, lora_alpha=24)
    kinds = (Linear, Linear4bit)
    layers = [m for m in add_adapters(base, recipe).train().modules() if type(m) in kinds]
    assert len(layers) == 14
    in_16_bits = {"nf4": 0, "none": 14}.get(quantization, 4)
    assert sum(type(layer) is Linear for layer in layers) == in_16_bits
    for layer in layers:
        assert layer.forward.__func__.__module__ == "job.training.lora"
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        results = []
        for forward in (layer.forward, lambda x, layer=layer: type(layer).forward(layer, x)):
            x = torch.ones(1, 9, layer.in_features).cumsum(1).requires_grad_()
            torch.manual_seed(3)
            output = forward(x)
            results.append(
                (output.detach(), *torch.autograd.grad(output.square().sum(), [x, *weights]))
            )
        for mine, theirs in zip(*results, strict=True):
            assert float((mine - theirs).norm()) <= 1e-6 * float(theirs.norm())
    with torch.no_grad():
        expected = layers[0].base_layer(x := torch.ones(1, 2, layers[0].in_features))
        layers[0].enable_adapters(False)
        assert torch.equal(layers[0](x), expected)


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),  # gives its layers (rows, features)
        ("olmo", {"clip_qkv": 8.0}),  # writes into what they return
    ],
)
def test_families_with_habits_of_their_own_train(
    tmp_path: Path, family: str, shape: dict[str, object]
) -> None:
    import torch

    from job.training.state import TrainState

    base = make_base(tmp_path, model_type=family, **shape)
    trainer, state = make_trainer(base, make_recipe(lora_dropout=0.1)), TrainState()
    table = make_table(12, seed=2)
    before = trainer.evaluate(table, state)
    for _ in range(8):
        trainer.step(table, state)
    assert trainer.evaluate(table, state) < before
    assert all(torch.isfinite(p).all() for p in trainer.parameters)
