"""Summed negative log-likelihood of target tokens, without ever holding a sample's full logits."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from job.training.batching import MicroBatch

# Families whose logits are exactly head(backbone(x)): no soft-capping, no scaling.
CHUNKED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
CHUNK_TARGETS = 512  # 512 x 32 k vocabulary x fp32 = 64 MiB a chunk


def target_nll(model: Any, batch: MicroBatch) -> torch.Tensor:
    """Sum over the micro-batch's targets of -ln p(target), a fp32 scalar that backpropagates.

    `model` is a `PeftModel` around a causal language model. Its logits would take 12 bytes a
    token and vocabulary entry; here the backbone's hidden states at the target positions go
    through the head in chunks that are recomputed in backward. Other families than
    `CHUNKED_MODEL_TYPES` take the plain way through the model's own logits.
    """
    causal_lm = model.get_base_model()
    inputs = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }
    if causal_lm.config.model_type not in CHUNKED_MODEL_TYPES:
        logits = causal_lm(**inputs).logits[0, batch.target_positions]
        return cross_entropy(logits.float(), batch.targets, reduction="sum")
    hidden = causal_lm.base_model(**inputs).last_hidden_state[0, batch.target_positions]
    head = causal_lm.get_output_embeddings()
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(batch.targets), CHUNK_TARGETS):
        part = slice(start, start + CHUNK_TARGETS)
        total = total + checkpoint(
            _chunk_nll, head, hidden[part], batch.targets[part], use_reentrant=False
        )
    return total


def _chunk_nll(head: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(head(hidden).float(), targets, reduction="sum")
