"""Forward passes of norms and gated feed-forwards that keep less for backward; equal in value."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm, silu

# Families whose norm is weight * x / rms(x). Gemma's is (1 + weight) * x / rms(x).
RMS_NORMS = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Granite")


def enable_lean_layers(model: Any) -> None:
    """Replace the forward pass of RMSNorms and of SiLU-gated feed-forwards; for training only.

    A norm of transformers is seven operations and keeps a copy of its input in fp32; here it is one
    kernel of PyTorch's. In a feed-forward, silu(gate) is not kept but computed again in backward:
    11 % of all that a 7B keeps.
    """
    for module in model.modules():
        kind = type(module).__name__
        if kind in [f"{family}RMSNorm" for family in RMS_NORMS]:
            module.forward = MethodType(_norm, module)
        elif kind == "Phi3MLP" and _is_silu(module.activation_fn):
            module.forward = MethodType(_fused_feed_forward, module)
        elif kind.endswith("MLP") and _is_silu(getattr(module, "act_fn", None)):
            module.forward = MethodType(_feed_forward, module)


def _is_silu(activation: Any) -> bool:
    return type(activation) is torch.nn.SiLU or type(activation).__name__ == "SiLUActivation"


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    # The kernel itself sums in fp32. With autocast, its result would be fp32 on CUDA.
    with torch.autocast(x.device.type, enabled=False):
        return rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


def _feed_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    inner = _GatedSilu.apply(module.gate_proj(x), module.up_proj(x))  # type: ignore[no-untyped-call]
    out: torch.Tensor = module.down_proj(inner)
    return out


def _fused_feed_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
    out: torch.Tensor = module.down_proj(_GatedSilu.apply(gate, up))  # type: ignore[no-untyped-call]
    return out


class _GatedSilu(torch.autograd.Function):
    """silu(gate) * up, both (1, tokens, inner)."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return of_gate, silu(gate).mul_(gradient)
