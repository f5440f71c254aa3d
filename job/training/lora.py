"""A forward pass of LoRA layers that keeps and moves less than PEFT's."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.layer import Linear
from torch.autograd.function import once_differentiable

ADAPTER = "default"  # the name of the only adapter


def enable_lean_lora(model: Any) -> None:
    """Give every LoRA layer, on 4 or 16 bits, the forward pass below; for training only.

    In PEFT every layer keeps dropout's result: 30 % of all that a 7B keeps for backward. Here it
    keeps dropout's mask (a byte an element) and its input, which its neighbours keep as well. And
    it passes once over the base's output, where PEFT passes four times. The values are PEFT's, but
    for the order of a sum. Merging and saving stay PEFT's.
    """
    for module in model.modules():
        if type(module) in (Linear4bit, Linear):
            module.forward = MethodType(_forward, module)


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute base(x) + scaling * B(A(dropout(x))), scaled where it is `r` numbers wide."""
    result: torch.Tensor = layer.base_layer(x)
    if layer.disable_adapters:
        return result
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else down.dtype
    dropout = layer.lora_dropout[ADAPTER]
    p = dropout.p if layer.training and isinstance(dropout, torch.nn.Dropout) else 0.0
    # Flattened to rows out here: a family may pass (rows, features), or write into the output, and
    # neither is possible with a view that the autograd function makes.
    out: torch.Tensor = _AddLowRank.apply(  # type: ignore[no-untyped-call]
        result.flatten(0, -2).to(dtype), x.flatten(0, -2).to(dtype), down, up,
        layer.scaling[ADAPTER], p,
    )  # fmt: skip
    return out.view(result.shape).to(result.dtype)


class _AddLowRank(torch.autograd.Function):
    """result + scaling * up(down(dropout(x))), keeping x and dropout's mask for backward."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        result: torch.Tensor,  # (tokens, outputs)
        x: torch.Tensor,  # (tokens, inputs)
        down: torch.Tensor,  # A: (r, inputs) fp32
        up: torch.Tensor,  # B: (outputs, r) fp32
        scaling: float,
        p: float,
    ) -> torch.Tensor:
        rows, mask = torch.native_dropout(x, p, True) if p > 0 else (x, None)
        low = (rows @ down.to(x.dtype).t()).mul_(scaling)
        ctx.save_for_backward(x, mask, low, down, up)
        ctx.scaling, ctx.keep_scale = scaling, 1 / (1 - p)
        return torch.addmm(result, low, up.to(x.dtype).t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, mask, low, down, up = ctx.saved_tensors
        of_low = (gradient @ up.to(x.dtype)).mul_(ctx.scaling)
        of_up = gradient.t() @ low
        of_x = None
        if ctx.needs_input_grad[1]:  # not in the first layer: nothing before it is trained
            of_x = _masked(of_low @ down.to(x.dtype), mask, ctx.keep_scale)
        of_down = of_low.t() @ _masked(x, mask, ctx.keep_scale)
        return gradient, of_x, of_down.to(down.dtype), of_up.to(up.dtype), None, None


def _masked(rows: torch.Tensor, mask: torch.Tensor | None, keep_scale: float) -> torch.Tensor:
    """Apply dropout with a mask that is given."""
    if mask is None:
        return rows
    dropped: torch.Tensor = torch.ops.aten.native_dropout_backward(rows, mask, keep_scale)
    return dropped
