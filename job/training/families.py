"""Which bases this job can train, and which families' rows can be packed. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from job.errors import SettingsError
from job.training.quantization import is_in_4_bits

# Families whose attention goes through transformers' attention interface with all its keyword
# arguments, whose mask is causal (or a sliding window), and whose logits are head(backbone(x)),
# scaled as `LogitScale` says.
PACKED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "cohere", "cohere2")


# Of a base's linear weights, the least share that has to get adapters and, if JOB_QUANTIZATION is
# nf4, to be in 4 bits: "4-bit NF4, LoRA on all linear layers" is what such a sweep promises.
# Mixtral's fused experts leave 3 %.
LEAST_SHARE = 0.9


class UntrainableError(ValueError):
    """A base that this job cannot train as it promises; the message says why, after its name."""


@dataclass(frozen=True)
class Coverage:
    """The shares of a base's linear weights, its head apart, that are in 4 bits and adapted."""

    quantised: float
    adapted: float

    def __str__(self) -> str:
        return f"{self.quantised:.0%} of its linear weights in 4 bits, {self.adapted:.0%} adapted"


def check_base(name: str, config: Mapping[str, Any], quantization: str = "nf4") -> Coverage:
    """Compute the shares from a config.json. Raises `SettingsError` for a base that cannot train.

    Imports torch but for the families that are known to be covered in full.
    """
    family = config["model_type"]
    if is_in_4_bits(config) and quantization not in ("nf4", "mixed"):
        raise SettingsError(
            f"JOB_QUANTIZATION: {quantization} needs 16-bit weights, and {name} holds them in 4"
            " bits already: name the model that it was made of in JOB_BASE_MODEL, or take nf4"
        )
    if is_packed(family) and not is_in_4_bits(config) and quantization in ("nf4", "none"):
        return Coverage(1.0 if quantization == "nf4" else 0.0, 1.0)
    from job.training.coverage import coverage

    try:
        return coverage(config, quantization)
    except UntrainableError as error:
        raise SettingsError(
            f"JOB_BASE_MODEL: {name} ({family}) cannot be trained: {error}; take another base, such"
            " as a Mistral, Llama, Qwen or Phi model"
        ) from error


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
