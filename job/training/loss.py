"""The summed negative log-likelihood of target tokens, without ever holding all their logits."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear

from job.training.batching import MicroBatch
from job.training.families import LogitScale, is_packed, logit_scale
from job.training.footprint import loss_chunk_targets

# Gradients are kept in fp16 until the factor they are multiplied with, loss scale / targets of the
# step, is known. Lifted by 2^8, values from 2^-32 to 2^7 survive; a power of two costs no digit.
LIFT = 256.0


def target_nll(model: Any, batch: MicroBatch) -> torch.Tensor:
    """Sum -ln p(target) over the micro-batch's targets: a fp32 scalar that backpropagates.

    `model` is a `PeftModel` around a causal language model. Its logits would take 12 bytes for each
    token and vocabulary entry; instead, the backbone's hidden states at the target positions go
    through the head in chunks. Families that are not in `PACKED_FAMILIES` take the plain way,
    through the model's own logits.
    """
    causal_lm = model.get_base_model()
    if not has_chunked_loss(causal_lm):
        return cross_entropy(_plain_logits(causal_lm, batch), batch.targets, reduction="sum")
    head, scale = causal_lm.get_output_embeddings(), logit_scale(causal_lm.config)
    hidden = _hidden_states(causal_lm, batch)
    return chunked_nll(hidden, head.weight, head.bias, batch.targets, scale=scale)


def sample_nll(causal_lm: Any, batch: MicroBatch) -> torch.Tensor:
    """Sum -ln p(target) over each sample's targets: (samples,) float64, without gradients.

    `causal_lm` is a causal language model, the one inside a `PeftModel` as well. It computes what
    `target_nll` computes, in as little memory.
    """
    if not has_chunked_loss(causal_lm):
        logits = _plain_logits(causal_lm, batch)
        each = cross_entropy(logits, batch.targets, reduction="none")
    else:
        head, scale = causal_lm.get_output_embeddings(), logit_scale(causal_lm.config)
        hidden = _hidden_states(causal_lm, batch)
        chunk = loss_chunk_targets(head.weight.shape[0])
        parts = zip(torch.split(hidden, chunk), torch.split(batch.targets, chunk), strict=True)
        each = torch.cat([
            _chunk_nll(linear(rows, head.weight, head.bias), targets, scale, False)[0]
            for rows, targets in parts
        ])  # fmt: skip
    ends = torch.tensor(batch.sample_lengths, device=each.device).cumsum(0)
    sample = torch.bucketize(batch.target_positions, ends, right=True)
    sums = torch.zeros(len(ends), dtype=torch.float64, device=each.device)
    return sums.index_add_(0, sample, each.double())


def _inputs(batch: MicroBatch) -> dict[str, Any]:
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }


def _plain_logits(causal_lm: Any, batch: MicroBatch) -> torch.Tensor:
    """Compute the logits at the targets, (targets, vocabulary), through the model's own head."""
    return _at_least_fp32(causal_lm(**_inputs(batch)).logits[0, batch.target_positions])


def _hidden_states(causal_lm: Any, batch: MicroBatch) -> torch.Tensor:
    """Compute what the head is given at the targets, (targets, hidden), by a packed family."""
    outputs = causal_lm.base_model(**_inputs(batch), sample_lengths=list(batch.sample_lengths))
    hidden: torch.Tensor = outputs.last_hidden_state[0, batch.target_positions]
    return hidden


def has_chunked_loss(causal_lm: Any) -> bool:
    """Whether the head is a plain matrix, and the family one whose logits we can compute."""
    return is_packed(causal_lm.config.model_type) and (
        type(causal_lm.get_output_embeddings()) is torch.nn.Linear  # not a quantised one
    )


def chunked_nll(
    hidden: torch.Tensor,  # (targets, hidden)
    weight: torch.Tensor,  # (vocabulary, hidden), frozen; may be the embeddings' own
    bias: torch.Tensor | None,  # (vocabulary,), frozen
    targets: torch.Tensor,  # (targets,) int64
    *,
    scale: LogitScale,
    chunk_targets: int | None = None,
) -> torch.Tensor:
    """Sum -ln softmax(logits)[target]: fp32 (fp64 if `hidden` is), differentiable in `hidden`.

    Only `chunk_targets` targets' logits are held at a time. As the head is frozen, the gradient is
    computed in the forward pass, where the logits are at hand, and only multiplied in backward. So
    the product with the head is computed once, where torch's `checkpoint` would compute it twice
    (an idea of Liger Kernel's fused linear cross-entropy, https://github.com/linkedin/Liger-Kernel;
    for Qwen2.5-1.5B the head is 15 % of all weights).
    """
    chunk = chunk_targets or loss_chunk_targets(weight.shape[0])
    total: torch.Tensor = _ChunkedNll.apply(hidden, weight, bias, targets, scale, chunk)  # type: ignore[no-untyped-call]
    return total


class _ChunkedNll(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        scale: LogitScale,
        chunk: int,
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = hidden.new_zeros((), dtype=_at_least_fp32(hidden[:0]).dtype)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            nll, logit_gradient = _chunk_nll(
                linear(hidden[part], weight, bias), targets[part], scale, gradient is not None
            )
            total += nll.sum()
            if gradient is not None and logit_gradient is not None:
                gradient[part] = logit_gradient.mul_(LIFT).to(weight.dtype) @ weight
            del logit_gradient  # else two chunks would be held at once
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Multiply the gradient by `factor`, loss scale / targets of the step, in fp32; then cast.

        In fp16, a loss scale of 65,536 would overflow before it is divided.
        """
        (gradient,) = ctx.saved_tensors
        scaled = gradient.to(factor.dtype).mul_(factor / LIFT).to(gradient.dtype)
        return scaled, None, None, None, None, None


def _chunk_nll(
    raw: torch.Tensor,  # (targets, vocabulary): what the head gave
    targets: torch.Tensor,
    scale: LogitScale,
    wants_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute each target's NLL, (targets,), and the gradient of their sum by `raw`.

    `raw` may be overwritten. Works in place: one (targets, vocabulary) tensor in fp32, and one more
    if logits are capped.
    """
    logits = _at_least_fp32(raw)
    del raw
    slope = None
    if scale.factor != 1.0:
        logits = logits.mul_(scale.factor)
    if scale.cap is not None:
        logits = logits.div_(scale.cap).tanh_()
        slope = 1 - logits.square() if wants_gradient else None  # the derivative of tanh
        logits = logits.mul_(scale.cap)
    at_target = logits.gather(1, targets[:, None])
    highest = logits.amax(1, keepdim=True)
    exponentials = logits.sub_(highest).exp_()
    sums = exponentials.sum(1, keepdim=True)
    nll = (sums.log() + highest - at_target)[:, 0]
    if not wants_gradient:
        return nll, None
    gradient = exponentials.div_(sums)
    gradient.scatter_add_(1, targets[:, None], gradient.new_full((len(targets), 1), -1.0))
    if slope is not None:
        gradient = gradient.mul_(slope)
    return nll, gradient.mul_(scale.factor) if scale.factor != 1.0 else gradient


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
