"""What this room knows about a family of models, by its `model_type`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Their attention goes through transformers' attention interface with all keyword arguments, their
# mask is causal (or a sliding window), and their logits are head(backbone(x)), scaled as below.
PACKED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "cohere", "cohere2")


@dataclass(frozen=True)
class LogitScale:
    """What a family does to its head's output: `cap * tanh(factor * logits / cap)`."""

    factor: float = 1.0
    cap: float | None = None


def is_packed(model_type: str | None) -> bool:
    """Samples may share a row, and the loss is taken in chunks; else one sample goes at a time."""
    return model_type in PACKED_FAMILIES


def logit_scale(config: Any) -> LogitScale:
    """From the config's own attributes (modeling_cohere.py, _granite.py, _gemma2.py)."""
    factor = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return LogitScale(factor / divisor, getattr(config, "final_logit_softcapping", None))
