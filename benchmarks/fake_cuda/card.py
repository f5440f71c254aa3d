"""The card: what PyTorch asks of CUDA, answered for one whose memory is counted, not there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention as real_attention

from benchmarks.fake_cuda.meter import Meter

T4_BYTES = int(14.6 * 2**30)
FAKE_STATE = torch.zeros(16, dtype=torch.uint8)


@contextlib.contextmanager
def fake_card(
    memory_bytes: int = T4_BYTES, *, name: str = "fake T4", capability: tuple[int, int] = (7, 5)
) -> Iterator[Meter]:
    """Within it `torch.device("cuda", 0)` is a fake card, and every tensor is a fake one."""
    meter = Meter(memory_bytes)
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.multiple(torch.cuda, **_answers(meter, name, capability)))
        stack.enter_context(patch("torch.nn.functional.scaled_dot_product_attention", _attention))
        stack.enter_context(patch("torch.nn.Module._apply", _apply))
        # Real CUDA tensors get PyTorch's foreach kernels; fake ones are of a type of their own.
        for module in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
            supported = [torch.Tensor, torch.nn.Parameter, FakeTensor]
            stack.enter_context(patch(f"{module}._foreach_supported_types", supported))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(meter)
        yield meter


def _answers(meter: Meter, name: str, capability: tuple[int, int]) -> dict[str, Any]:
    total = meter.limit_bytes

    def cap(fraction: float, *_: Any) -> None:
        meter.limit_bytes = int(fraction * total)

    def forget_peak(*_: Any) -> None:
        meter.peak_bytes = meter.held_bytes

    return {
        "is_available": lambda: True,
        "get_device_name": lambda *_: name,
        "get_device_capability": lambda *_: capability,
        "get_device_properties": lambda *_: SimpleNamespace(name=name, total_memory=total),
        "set_per_process_memory_fraction": cap,
        "mem_get_info": lambda *_: (meter.limit_bytes - meter.held_bytes, total),
        "memory_reserved": lambda *_: meter.held_bytes,
        "memory_allocated": lambda *_: meter.held_bytes,
        "max_memory_allocated": lambda *_: meter.peak_bytes,
        "reset_peak_memory_stats": forget_peak,
        "get_rng_state": lambda *_: FAKE_STATE,
        "set_rng_state": lambda *_: None,
        "empty_cache": lambda: None,
        "synchronize": lambda *_: None,
    }


def _attention(  # noqa: PLR0917
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What SDPA comes to on sm75: the memory-efficient kernel, or plain products where it may not.

    It may not with `enable_gqa` (`check_batch_size_and_num_heads_dense` in sdp_utils.cpp).
    """
    if query.device.type != "cuda":
        return real_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    if enable_gqa and query.shape[1] != key.shape[1]:
        return _plain_attention(query, key, value, scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # SDPA makes one of numbers of it
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], -1)
    wants_gradient = torch.is_grad_enabled() and query.requires_grad
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, wants_gradient, dropout_p, is_causal, scale=scale
    )[0]
    return out


def _plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    return torch.softmax(scores, -1) @ value


def _apply(module: torch.nn.Module, change: Callable[[Any], Any]) -> torch.nn.Module:
    """`Module._apply`; its own wants to swap fake tensors in place, which cannot be done."""
    for child in module.children():
        child._apply(change)
    for name, parameter in module._parameters.items():
        if parameter is not None and (new := change(parameter.detach())).device != parameter.device:
            module._parameters[name] = torch.nn.Parameter(new, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else change(buffer)
    return module
