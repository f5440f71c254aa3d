"""The families of models, by `model_type`, whose rows can be packed. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Families whose attention goes through transformers' attention interface with all its keyword
# arguments, whose mask is causal (or a sliding window), and whose logits are head(backbone(x)),
# scaled as `LogitScale` says.
PACKED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "cohere", "cohere2")


@dataclass(frozen=True)
class LogitScale:
    """The scaling of a head's output: `cap * tanh(factor * logits / cap)`."""

    factor: float = 1.0
    cap: float | None = None


def is_packed(model_type: str | None) -> bool:
    """Whether samples of this family may share a row; else each goes alone, with the plain loss."""
    return model_type in PACKED_FAMILIES


def logit_scale(config: Any) -> LogitScale:
    """Read the scaling off a config, as transformers' modeling_{cohere,granite,gemma2}.py do."""
    factor = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return LogitScale(factor / divisor, getattr(config, "final_logit_softcapping", None))
