"""What fake tensors hold at once, and what each operation on them computes and moves."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
ROUNDED_TO = 512  # bytes; what CUDA's allocator rounds a tensor up to
CAUSAL_ARGUMENT = {  # position of `is_causal`: the kernel skips half of a square's blocks
    aten._scaled_dot_product_efficient_attention.default: 6,
    aten._scaled_dot_product_efficient_attention_backward.default: 11,
}


@dataclass
class Cost:
    """The cost of all calls of one operation."""

    calls: int = 0
    flops: float = 0.0
    moved_bytes: int = 0


class Meter(TorchDispatchMode):
    """Counts what lies on fake CUDA; more than `limit_bytes` is a `torch.OutOfMemoryError`.

    A number that is asked for has no value: a bool reads as `truth`, a number on the card as 0, one
    on the CPU (AdamW's step) as 1.
    """

    def __init__(self, limit_bytes: int) -> None:
        super().__init__()
        self.limit_bytes = limit_bytes
        self.truth = True
        self.held_bytes = 0
        self.costs: dict[str, Cost] = {}
        self._known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.reset()

    def reset(self) -> None:
        """Count peak and costs from now on."""
        self.peak_bytes, self.largest_bytes = self.held_bytes, 0
        self.costs.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self._value(args[0])
        if func is torch.ops.bitsandbytes.gemm_4bit.default:
            # Its CUDA kernel for more than 512 tokens: dequantises, then multiplies.
            with self:
                return _gemm_4bit_default_impl(*args, **kwargs)
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if _on_card(tensor):
                self._hold(tensor)
        self._charge(func, args, kwargs, out)
        return out

    def _value(self, tensor: torch.Tensor) -> bool | float:
        if tensor.dtype == torch.bool:
            return self.truth
        return 0.0 if tensor.device.type == "cuda" else 1.0

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        size = -(-storage.nbytes() // ROUNDED_TO) * ROUNDED_TO
        if self.held_bytes + size > self.limit_bytes:
            raise torch.OutOfMemoryError(
                f"fake CUDA out of memory: {self.held_bytes} + {size} bytes of {self.limit_bytes}"
            )
        self._known[storage._cdata] = storage
        weakref.finalize(storage, self._release, size)
        self.held_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        self.largest_bytes = max(self.largest_bytes, size)

    def _release(self, size: int) -> None:
        self.held_bytes -= size

    def _charge(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Every input is read once, every output written once; views and empty tensors are free."""
        given = [t for t in tree_leaves((args, kwargs)) if _on_card(t)]
        made = [t for t in tree_leaves(out) if _on_card(t)]
        sources = {t.untyped_storage()._cdata for t in given}
        is_view = all(t.untyped_storage()._cdata in sources for t in made)
        is_free = not given or "empty" in func.name() or (is_view and not func._schema.is_mutable)
        if is_free:
            return
        cost = self.costs.setdefault(func.name(), Cost())
        cost.calls += 1
        cost.flops += _flops(func, args, kwargs, out)
        cost.moved_bytes += _moved(func, args, given, made)


def _on_card(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


def _bytes(tensor: torch.Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _moved(
    func: Any, args: Sequence[Any], given: Sequence[torch.Tensor], made: Sequence[torch.Tensor]
) -> int:
    if func in (aten.gather.default, aten.embedding.default):  # reads what it picks
        return 2 * _bytes(made[0])
    if func is aten.scatter_add_.default:
        return 3 * _bytes(args[3])
    return sum(_bytes(tensor) for tensor in [*given, *made])


def _flops(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> float:
    """FLOP of matrix products and attention: 2 for a multiplication and an addition."""
    if func is aten.linear.default:
        return 2.0 * out.numel() * args[0].shape[-1]
    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return 0.0
    flops = float(formula(*args, **kwargs, out_val=out))
    causal = CAUSAL_ARGUMENT.get(func)
    is_causal = causal is not None and len(args) > causal and args[causal]
    return flops / 2 if is_causal else flops


def _register_kernels() -> torch.library.Library:
    """What is one kernel on CUDA and which a CPU build lacks: it would take several others."""
    library = torch.library.Library("aten", "IMPL")

    def silu_backward(gradient: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(gradient)

    def rms_norm(
        x: torch.Tensor, shape: list[int], _: torch.Tensor | None, __: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = (*x.shape[: -len(shape)], *[1] * len(shape))
        return torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)

    library.impl("silu_backward", silu_backward, "CUDA")
    library.impl("_fused_rms_norm", rms_norm, "CUDA")
    return library


KERNELS = _register_kernels()  # live as long as this is held
