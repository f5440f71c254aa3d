"""`ModelShape`: a decoder's dimensions and weights, from its config.json. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Families whose layers are what `footprint.py` counts: two RMSNorms, attention, gated feed-forward.
PLANNED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite")


@dataclass(frozen=True)
class ModelShape:
    """The numbers of features, heads and layers of a decoder."""

    hidden: int
    query: int  # heads x head_dim
    key_value: int  # key_value_heads x head_dim
    intermediate: int
    num_layers: int
    num_heads: int
    head_dim: int
    vocabulary: int
    tied: bool  # the head is the embedding matrix
    fused: bool  # q, k and v are one matrix, and gate and up (Phi-3)
    normed_heads: bool  # q and k each go through an RMSNorm (Qwen3)

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """The (inputs, outputs) of a layer's quantised matrices, each of which gets an adapter."""
        hidden, inner = self.hidden, self.intermediate
        if self.fused:
            first: list[tuple[int, int]] = [(hidden, self.query + 2 * self.key_value)]
            second = [(hidden, 2 * inner)]
        else:
            first = [(hidden, self.query), (hidden, self.key_value), (hidden, self.key_value)]
            second = [(hidden, inner), (hidden, inner)]
        return (*first, (self.query, hidden), *second, (inner, hidden))

    @property
    def quantised_weights(self) -> int:
        """The number of weights that are held in 4 bits: all linear layers but the head."""
        return self.num_layers * sum(i * o for i, o in self.matrices)

    @property
    def plain_weights(self) -> int:
        """The number of weights that are not quantised: embeddings, head and norms."""
        head_norms = 2 * self.head_dim if self.normed_heads else 0
        norms = self.hidden + self.num_layers * (2 * self.hidden + head_norms)
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + norms

    def adapter_weights(self, lora_r: int) -> int:
        """The number of weights of an adapter: r x (inputs + outputs) for each quantised matrix."""
        return self.num_layers * lora_r * sum(i + o for i, o in self.matrices)


def largest_rank(config: Mapping[str, Any], max_adapter_bytes: float) -> int | None:
    """The highest `lora_r` whose adapter, saved in fp16, is not above the limit.

    None for a family that is not in `PLANNED_FAMILIES`, whose adapters are not known beforehand.
    """
    shape = model_shape(config)
    return None if shape is None else int(max_adapter_bytes // (2 * shape.adapter_weights(1)))


def model_shape(config: Mapping[str, Any]) -> ModelShape | None:
    """Read the shape off a config.json; None for a family that is not in `PLANNED_FAMILIES`."""
    family = config.get("model_type")
    if family not in PLANNED_FAMILIES:
        return None
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        head_dim = int(config.get("head_dim") or hidden // heads)
        return ModelShape(
            hidden=hidden,
            query=heads * head_dim,
            key_value=int(config.get("num_key_value_heads") or heads) * head_dim,
            intermediate=int(config["intermediate_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=heads,
            head_dim=head_dim,
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            fused=family == "phi3",
            normed_heads=family == "qwen3",
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None  # the config leaves out what its family has by default
