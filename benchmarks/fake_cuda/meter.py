"""What fake tensors hold at once."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
ROUNDED_TO = 512  # bytes; what CUDA's allocator rounds a tensor up to


class Meter(TorchDispatchMode):
    """Counts what lies on fake CUDA; more than `limit_bytes` is a `torch.OutOfMemoryError`.

    A number that is asked for has no value: a bool reads as True, a number on the card as 0, one
    on the CPU (AdamW's step) as 1.
    """

    def __init__(self, limit_bytes: int) -> None:
        super().__init__()
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.reset()

    def reset(self) -> None:
        """Count the peak from now on."""
        self.peak_bytes, self.largest_bytes = self.held_bytes, 0

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
        return out

    def _value(self, tensor: torch.Tensor) -> bool | float:
        if tensor.dtype == torch.bool:
            return True
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


def _on_card(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


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
