"""Our norms and feed-forwards against transformers'. `pytest tests/training/test_layers.py`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny_model import FAMILIES, make_base, make_recipe

pytestmark = pytest.mark.slow
# Of a two-layer model: two norms a layer and the last, heads' norms, a feed-forward a layer.
REPLACED = {"cohere": 2, "cohere2": 2, "qwen3": 11}


def _lean_modules(folder: Path, family: str) -> list[Any]:
    import torch

    from job.training.model import add_adapters, load_base

    base = load_base(str(make_base(folder, model_type=family)), None, torch.device("cpu"))
    add_adapters(base, make_recipe())
    return [m for m in base.modules() if "forward" in vars(m) and "lora" not in type(m).__module__]


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_transformers(tmp_path: Path, family: str) -> None:
    import torch

    modules = _lean_modules(tmp_path, family)
    assert len(modules) == REPLACED.get(family, 7)
    for module in modules:
        is_norm = hasattr(module, "variance_epsilon")
        width = module.weight.shape[0] if is_norm else module.config.hidden_size
        if is_norm:
            torch.nn.init.normal_(module.weight)
        results = []
        for forward in (module.forward, lambda x, module=module: type(module).forward(module, x)):
            x = torch.linspace(-2, 2, 9 * width).view(1, 9, width).requires_grad_()
            output = forward(x)
            results.append((output.detach(), *torch.autograd.grad(output.square().sum(), [x])))
        for mine, theirs in zip(*results, strict=True):
            assert float((mine - theirs).norm()) <= 2e-6 * float(theirs.norm()), type(module)


def test_a_norm_of_fp16_under_autocast_stays_fp16_and_keeps_its_small_numbers() -> None:
    import torch
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from job.training.layers import enable_lean_layers

    norm = LlamaRMSNorm(64, eps=1e-6).half()
    enable_lean_layers(norm)
    x = torch.full((1, 3, 64), 300.0, dtype=torch.float16)  # squared it is over fp16's 65504
    with torch.autocast("cpu", dtype=torch.float16):
        output = norm(x)
    assert output.dtype == torch.float16
    assert torch.equal(output, torch.ones_like(x))


def test_a_gate_that_is_not_silu_stays_as_it_is(tmp_path: Path) -> None:
    import torch

    from job.training.layers import enable_lean_layers
    from job.training.model import load_base

    folder = make_base(tmp_path, hidden_act="gelu")
    base = load_base(str(folder), None, torch.device("cpu"))
    enable_lean_layers(base)
    assert not any("forward" in vars(m) for m in base.modules() if type(m).__name__ == "LlamaMLP")
