"""Causal attention within each sample of a packed row, without a mask and without FlashAttention.

For a packed row transformers makes a (tokens x tokens) mask, and SDPA then computes every pair of
tokens, also of different samples: with 8 samples in a row 16 times as much as needed. Here each
sample is a call of its own, which computes only pairs of a token and those before it. That samples
cannot see each other does not depend on a mask.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any

import torch
from transformers import AttentionInterface

PACKED_ATTENTION = "packed_samples"


def enable_packed_attention(model: Any) -> None:
    """Make every later forward of `model` take `sample_lengths` (a list of int) beside its row.

    No mask function is registered under this name, so transformers builds no mask. Nor does it look
    for restarts in the position ids, which would wait for the GPU in every micro-batch.
    """
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    model.set_attn_implementation(PACKED_ATTENTION)
    enable_rope_by_sample(model)


def enable_rope_by_sample(model: Any) -> None:
    """Have rotary embeddings that depend on the length see one sample at a time, not the row.

    "longrope" takes other frequencies for a sequence over the original length, "dynamic" for each
    longer one, and it remembers the longest. In a row, a short sample would get those of its
    longest neighbour (eval/loss 6.020 became 5.974), and of those before it.
    """
    ropes = [m for m in model.modules() if _depends_on_length(getattr(m, "rope_type", None))]
    lengths: list[int] = []

    def note(_module: Any, _arguments: Any, options: dict[str, Any]) -> None:
        lengths[:] = options["sample_lengths"]

    if ropes:
        model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    for rope in ropes:
        rope.forward = partial(_rope_by_sample, rope, lengths)


def _depends_on_length(rope_type: Any) -> bool:
    """Whether transformers computes such frequencies anew in forward; a type for each kind of layer
    may be given.
    """
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any(kind == "longrope" or "dynamic" in str(kind) for kind in kinds)


def _rope_by_sample(
    rope: Any, lengths: list[int], x: torch.Tensor, position_ids: torch.Tensor, *more: Any
) -> tuple[torch.Tensor, ...]:
    """Compute cos and sin, (1, tokens, head_dim) each, sample by sample."""
    parts = []
    for positions in torch.split(position_ids, lengths, dim=1):
        if hasattr(rope, "max_seq_len_cached"):  # else it would remember the longest sample
            rope.max_seq_len_cached = rope.original_max_seq_len
            rope.inv_freq = rope.original_inv_freq.to(x.device)
        parts.append(type(rope).forward(rope, x, positions, *more))
    return tuple(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))


def packed_attention(
    _module: Any,
    query: torch.Tensor,  # (1, heads, tokens, head_dim)
    key: torch.Tensor,  # (1, key_value_heads, tokens, head_dim)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    sample_lengths: list[int] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute (1, tokens, heads, head_dim), the output that transformers' interface asks for."""
    assert attention_mask is None, "packed rows have no mask"
    assert sample_lengths is not None, "packed attention needs sample_lengths"
    assert sum(sample_lengths) == query.shape[2], "sample_lengths are not this row's"
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        # Not enable_gqa: the memory-efficient kernel, the only fused one on sm75, refuses it
        # (check_batch_size_and_num_heads_dense<false> in torch's sdp_utils.cpp) and SDPA falls back
        # to plain products that hold (heads, tokens, tokens); so does the CPU's.
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    row = (torch.split(tensor, sample_lengths, dim=2) for tensor in (query, key, value))
    longest, parts = max(sample_lengths), []
    for q, k, v in zip(*row, strict=True):
        mask, length = None, q.shape[2]
        if sliding_window is not None and length > sliding_window:
            mask = _window_mask(longest, sliding_window, q.dtype, q.device)[:length, :length]
        part = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
        )
        parts.append(part.transpose(1, 2))
    return (parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=1)), None


@lru_cache(maxsize=1)  # all layers and samples of a row ask for the same one, and share its memory
def _window_mask(
    length: int, window: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Make the mask of a sample longer than the window: (length, length), 0 if seen, else -inf.

    It holds numbers, not bools, and its rows lie multiples of 8 apart: of any other mask SDPA would
    make such a copy in each layer, and keep it for backward.
    """
    position = torch.arange(length, dtype=torch.int32, device=device)
    distance = position[:, None] - position[None, :]
    hidden = (distance < 0) | (distance >= window)
    mask = torch.zeros(length, -(-length // 8) * 8, dtype=dtype, device=device)[:, :length]
    return mask.masked_fill_(hidden, -math.inf)
