"""The memory of a training step, predicted part by part from a model's shape. Imports no torch.

Every line of `_layer_bytes` is a tensor that autograd keeps, found by tracing. Attention is that of
`attention.py`: K and V expanded to all heads, no mask. The CUDA kernel behind it (memory-efficient
SDPA) keeps the same tensors as the CPU's flash kernel: q, k, v, output, log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from job.training.shape import ModelShape

# The layers whose activations are not kept for backward but computed again there.
Recompute = Literal["all", "second", "none"]
EVERY_N_LAYERS: dict[Recompute, int | None] = {"all": 1, "second": 2, "none": None}
# A weight has 4 bits, 64 weights share an 8-bit scale, and 256 scales share an fp32 one.
QUANTISED_WEIGHT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Precision:
    """How much memory tensors take on one kind of device."""

    compute: int  # bytes of an element of an activation or of a weight that is not quantised
    masking: int  # tensors that dropout's backward makes: the result; on a CPU a scaled mask, too
    norm: int  # bytes of an element of what a norm keeps: on CUDA its input, else a copy in fp32
    workspace: int  # bytes that cuBLAS takes for itself


# cuBLAS takes 32 MiB a thread, as its deterministic workspace says (`job/process/gpu.py`), and
# backward runs in a second thread.
FP16_CUDA = Precision(compute=2, masking=1, norm=2, workspace=2 * 32 * 2**20)
FP32_CPU = Precision(compute=4, masking=2, norm=4, workspace=0)


@dataclass(frozen=True)
class Work:
    """The largest micro-batch of a trial, and what is done with it."""

    num_tokens: int
    num_targets: int
    lora_r: int
    dropout: bool
    recompute: Recompute


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak of a step, by part; `total` is the peak."""

    weights: int  # 4-bit with their scales; embeddings, head, norms and matrices in 16 bits
    adapter: int  # adapter, gradients, AdamW's moments
    activations: int  # tensors kept from forward to backward
    loss: (
        int  # a chunk of logits and the gradients of the hidden states; 0 if the peak is elsewhere
    )
    workspace: int  # gradients in flight, a dequantised matrix, copies of the adapter; cuBLAS

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.activations + self.loss + self.workspace


def loss_chunk_targets(vocabulary: int) -> int:
    """The number of targets whose logits are held at once: 64 MiB of fp32.

    That is 512 for a vocabulary of 32 k, and never under 256, which keep a T4's tensor cores busy.
    """
    return max(256, 2**24 // vocabulary)


def footprint(shape: ModelShape, work: Work, precision: Precision) -> Footprint:
    """Predict the peak of a step, which is either in the loss or in a layer's backward."""
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


def _num_layers_kept(work: Work, shape: ModelShape) -> int:
    """The number of layers whose activations are kept from forward to backward."""
    every = EVERY_N_LAYERS[work.recompute]
    return shape.num_layers - (-(-shape.num_layers // every) if every else 0)


def _layer_bytes(shape: ModelShape, work: Work, precision: Precision) -> int:
    """The bytes that a layer keeps for its backward, for each token."""
    size = precision.compute
    norms = 2 * _norm_bytes(shape, precision)
    # Adapters keep their inputs (q, k and v share one, and so do gate and up), their dropout masks,
    # of a byte an element, and what is `lora_r` wide between their two matrices.
    adapters = (2 * shape.hidden + shape.query + shape.intermediate) * size
    adapters += sum(inputs for inputs, _ in shape.matrices.values()) if work.dropout else 0
    adapters += len(shape.matrices) * work.lora_r * size
    attention = 4 * shape.query * size + 4 * shape.num_heads  # q, k, v, output; log-sum-exp
    if shape.fused and shape.query == shape.key_value:
        attention += 2 * shape.key_value * size  # v is a view, which keeps q and k beside it alive
    if shape.normed_heads:
        heads = shape.query + shape.key_value
        attention += precision.norm * heads + 4 * heads // shape.head_dim
    feed_forward = 2 * shape.intermediate * size  # gate, up
    return norms + adapters + attention + feed_forward


def _norm_bytes(shape: ModelShape, precision: Precision) -> int:
    """The bytes that a norm keeps for each token: its input and 1/rms."""
    return precision.norm * shape.hidden + 4


def _kept_bytes(shape: ModelShape, work: Work, precision: Precision) -> int:
    """The bytes that all layers and the final norm keep from forward to backward."""
    layer, norm = _layer_bytes(shape, work, precision), _norm_bytes(shape, precision)
    whole = _num_layers_kept(work, shape)
    boundaries = (shape.num_layers - whole) * shape.hidden * precision.compute
    rotary = 2 * shape.head_dim * precision.compute
    # Embeddings are frozen: nothing before the first layer's adapters needs a gradient.
    first = norm if whole == shape.num_layers else 0
    return work.num_tokens * (whole * layer + boundaries + rotary - first + norm)


def _loss_bytes(shape: ModelShape, work: Work, precision: Precision) -> int:
    """The bytes of the loss: hidden states of all tokens and of targets, a gradient, one chunk."""
    size = precision.compute
    rows = min(work.num_targets, loss_chunk_targets(shape.vocabulary))
    in_fp32 = 4 * rows * shape.vocabulary
    in_fp16 = size * rows * shape.vocabulary if size != 4 else 0
    hidden = (work.num_tokens + 2 * work.num_targets) * shape.hidden * size
    return in_fp32 + in_fp16 + hidden


def _in_layer_backward(shape: ModelShape, work: Work, precision: Precision) -> int:
    """The bytes that a layer's backward takes beside all that is kept, at its highest.

    They are a recomputed layer, gradients in flight and a dequantised matrix, if it is in 4 bits.
    The highest point is always in the feed-forward, where a layer's backward begins.
    """
    size, tokens, hidden = precision.compute, work.num_tokens, shape.hidden * precision.compute
    inner = shape.intermediate * size
    matrix = shape.intermediate * hidden
    freed = inner + (shape.intermediate if work.dropout else 0)  # the last adapter's input and mask
    down = matrix if shape.is_dequantised("down_proj") else 0
    backward = max(
        # The last adapter: its input's gradient, and that masked.
        tokens * ((1 + precision.masking) * inner + hidden),
        # The matrix beside that adapter, dequantised.
        tokens * (2 * inner - freed + hidden) + down,
        # The gradients of both, and their sum.
        tokens * (3 * inner - freed + hidden),
    )
    if shape.is_dequantised("gate_up_proj"):  # gate and up are one matrix, twice as large
        backward = max(backward, tokens * (3 * hidden - freed) + 2 * matrix)
    if shape.is_dequantised("up_proj"):
        backward = max(backward, tokens * (3 * hidden - freed) + matrix)
    recomputed_last = work.recompute == "all" or (
        work.recompute == "second" and shape.num_layers % 2 == 1
    )
    if not recomputed_last:
        return backward
    again = _layer_bytes(shape, work, precision)
    again -= hidden if precision.norm == size else 0  # the first norm's input is the boundary
    return tokens * again + backward
