"""What a training step holds, part by part, from a model's shape alone. Imports no torch.

Every line of `_layer_bytes` is a tensor that autograd keeps, found by tracing. Attention is ours
(`attention.py`): K and V expanded to all heads, no mask. The CUDA kernels behind it (memory-
efficient SDPA) keep the same tensors as the CPU's flash kernel: q, k, v, output, log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from job.training.shape import ModelShape

# Whose activations are computed again in backward: of all layers, of every second one, of none.
Recompute = Literal["all", "second", "none"]
EVERY_N_LAYERS: dict[Recompute, int | None] = {"all": 1, "second": 2, "none": None}
# 4 bits, an 8-bit scale for 64 weights, an fp32 one for 256 of those.
QUANTISED_WEIGHT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Precision:
    """Bytes of an element on a kind of device."""

    compute: int  # weights that are not quantised, activations
    masking: int  # tensors that dropout's backward makes: its result; on a CPU the scaled mask, too
    norm: int  # what a norm keeps of its input: on CUDA that itself, else a copy in fp32
    workspace: int  # cuBLAS's own, in all


# On sm75 8.125 MiB for a thread's handle, and backward runs in a thread of its own; 32 on sm90.
FP16_CUDA = Precision(compute=2, masking=1, norm=2, workspace=2 * 8 * 2**20 + 2**18)
FP32_CPU = Precision(compute=4, masking=2, norm=4, workspace=0)


@dataclass(frozen=True)
class Work:
    """What one micro-batch is at most."""

    num_tokens: int
    num_targets: int
    lora_r: int
    dropout: bool
    recompute: Recompute


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak of a step, by part; `total` is the peak."""

    weights: int  # 4-bit with their scales; embeddings, head and norms
    adapter: int  # adapter, gradients, AdamW's moments
    activations: int  # what waits for backward
    loss: int  # a chunk of logits and the gradients of the hidden states; 0 at another peak
    workspace: int  # gradients in flight, a dequantised matrix, copies of the adapter; cuBLAS

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.activations + self.loss + self.workspace


def loss_chunk_targets(vocabulary: int) -> int:
    """Targets whose logits are held at once: 64 MiB of fp32, but rows enough for a matrix product.

    512 for a vocabulary of 32 k; never under 256, which a T4's tensor cores still fill.
    """
    return max(256, 2**24 // vocabulary)


def footprint(shape: ModelShape, work: Work, precision: Precision) -> Footprint:
    """The step's peak is the higher of two: in the loss, or in a layer's backward."""
    adapter_weights = shape.adapter_weights(work.lora_r)
    weights = int(
        shape.quantised_weights * QUANTISED_WEIGHT_BYTES + shape.plain_weights * precision.compute
    )
    adapter = 16 * adapter_weights
    kept = _kept_bytes(shape, work, precision)
    in_loss = Footprint(
        weights, adapter, kept, _loss_bytes(shape, work, precision), precision.workspace
    )
    in_layer = _in_layer_backward(shape, work, precision)
    in_backward = Footprint(
        weights,
        adapter,
        kept - work.num_tokens * _norm_bytes(shape, precision),
        0,
        in_layer + precision.workspace,
    )
    return max(in_loss, in_backward, key=lambda part: part.total)


def _share_kept(work: Work, shape: ModelShape) -> int:
    """Layers whose insides are kept from forward to backward."""
    every = EVERY_N_LAYERS[work.recompute]
    return shape.num_layers - (-(-shape.num_layers // every) if every else 0)


def _layer_bytes(shape: ModelShape, work: Work, precision: Precision) -> int:
    """What a layer keeps for its backward, per token."""
    size = precision.compute
    norms = 2 * _norm_bytes(shape, precision)
    # Inputs of adapters, of which q, k and v share one, and gate and up; a byte of each one's mask.
    adapters = (2 * shape.hidden + shape.query + shape.intermediate) * size
    adapters += sum(inputs for inputs, _ in shape.matrices) if work.dropout else 0
    adapters += len(shape.matrices) * work.lora_r * size
    attention = 4 * shape.query * size + 4 * shape.num_heads  # q, k, v, output; log-sum-exp
    if shape.fused and shape.query == shape.key_value:
        attention += 2 * shape.key_value * size  # v is a view: it keeps its neighbours q and k
    if shape.normed_heads:
        heads = shape.query + shape.key_value
        attention += precision.norm * heads + 4 * heads // shape.head_dim
    feed_forward = 2 * shape.intermediate * size  # gate, up
    return norms + adapters + attention + feed_forward


def _norm_bytes(shape: ModelShape, precision: Precision) -> int:
    """A norm's input and 1/rms, per token."""
    return precision.norm * shape.hidden + 4


def _kept_bytes(shape: ModelShape, work: Work, precision: Precision) -> int:
    """What all layers keep until backward, the final norm included."""
    layer, norm = _layer_bytes(shape, work, precision), _norm_bytes(shape, precision)
    whole = _share_kept(work, shape)
    boundaries = (shape.num_layers - whole) * shape.hidden * precision.compute
    rotary = 2 * shape.head_dim * precision.compute
    # Embeddings are frozen: nothing before the first layer's adapters needs a gradient.
    first = norm if whole == shape.num_layers else 0
    return work.num_tokens * (whole * layer + boundaries + rotary - first + norm)


def _loss_bytes(shape: ModelShape, work: Work, precision: Precision) -> int:
    """Hidden states of the row and of its targets, their gradient, a chunk of logits."""
    size = precision.compute
    rows = min(work.num_targets, loss_chunk_targets(shape.vocabulary))
    in_fp32 = 4 * rows * shape.vocabulary
    in_fp16 = size * rows * shape.vocabulary if size != 4 else 0
    hidden = (work.num_tokens + 2 * work.num_targets) * shape.hidden * size
    return in_fp32 + in_fp16 + hidden


def _in_layer_backward(shape: ModelShape, work: Work, precision: Precision) -> int:
    """Beyond what is kept: a recomputed layer, gradients in flight, a dequantised matrix.

    All maxima lie in the feed-forward, where a layer's backward begins.
    """
    size, tokens, hidden = precision.compute, work.num_tokens, shape.hidden * precision.compute
    inner = shape.intermediate * size
    matrix = shape.intermediate * hidden
    freed = inner + (shape.intermediate if work.dropout else 0)  # the last adapter's input and mask
    backward = max(
        tokens
        * (
            (1 + precision.masking) * inner + hidden
        ),  # the last adapter's turn: its input's gradient, masked
        tokens * (2 * inner - freed + hidden) + matrix,  # its base matrix's turn
        tokens * (3 * inner - freed + hidden),  # both gradients and their sum
    )
    if shape.fused:  # gate and up, which are one matrix
        backward = max(backward, tokens * (3 * hidden - freed) + 2 * matrix)
    recomputed_last = work.recompute == "all" or (
        work.recompute == "second" and shape.num_layers % 2 == 1
    )
    if not recomputed_last:
        return backward
    again = _layer_bytes(shape, work, precision)
    again -= hidden if precision.norm == size else 0  # the first norm's input is the boundary
    return tokens * again + backward
