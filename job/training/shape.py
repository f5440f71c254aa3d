"""`ModelShape`: a decoder's dimensions and weights, from its config.json. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from job.training.quantization import is_in_4_bits, is_kept, names_in_16_bits

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
    # (matrix, number of layers that hold it in 16 bits); all others hold it in 4.
    in_16_bits: tuple[tuple[str, int], ...] = ()

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The (inputs, outputs) of a layer's matrices by name, each of which gets an adapter."""
        hidden, inner = self.hidden, self.intermediate
        if self.fused:
            return {
                "qkv_proj": (hidden, self.query + 2 * self.key_value),
                "o_proj": (self.query, hidden),
                "gate_up_proj": (hidden, 2 * inner),
                "down_proj": (inner, hidden),
            }
        return {
            "q_proj": (hidden, self.query),
            "k_proj": (hidden, self.key_value),
            "v_proj": (hidden, self.key_value),
            "o_proj": (self.query, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    @property
    def linear_weights(self) -> int:
        """The number of weights of all linear layers but the head."""
        return self.num_layers * sum(i * o for i, o in self.matrices.values())

    @property
    def quantised_weights(self) -> int:
        """The number of weights that are held in 4 bits."""
        matrices = self.matrices
        kept = sum(layers * math.prod(matrices[name]) for name, layers in self.in_16_bits)
        return self.linear_weights - kept

    @property
    def quantised_share(self) -> float:
        """The share of the linear layers' weights that is held in 4 bits."""
        return self.quantised_weights / self.linear_weights

    @property
    def plain_weights(self) -> int:
        """The number of weights that are not quantised: embeddings, head, norms, and matrices."""
        head_norms = 2 * self.head_dim if self.normed_heads else 0
        norms = self.hidden + self.num_layers * (2 * self.hidden + head_norms)
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return embeddings + norms + self.linear_weights - self.quantised_weights

    def is_dequantised(self, name: str) -> bool:
        """Whether a layer has this matrix in 4 bits, and makes 16 of them whenever it is used."""
        return name in self.matrices and dict(self.in_16_bits).get(name, 0) < self.num_layers

    def adapter_weights(self, lora_r: int) -> int:
        """The number of weights of an adapter: r x (inputs + outputs) for each matrix."""
        return self.num_layers * lora_r * sum(i + o for i, o in self.matrices.values())


def largest_rank(config: Mapping[str, Any], max_adapter_bytes: float) -> int | None:
    """The highest `lora_r` whose adapter, saved in fp16, is not above the limit.

    None for a family that is not in `PLANNED_FAMILIES`, whose adapters are not known beforehand.
    """
    shape = model_shape(config)
    return None if shape is None else int(max_adapter_bytes // (2 * shape.adapter_weights(1)))


def model_shape(config: Mapping[str, Any], quantization: str = "nf4") -> ModelShape | None:
    """Read the shape off a config.json; None for a family that is not in `PLANNED_FAMILIES`.

    A checkpoint that is in 4 bits already has those weights in 16 bits that its config.json names.
    """
    shape = _dimensions(config)
    return None if shape is None else replace(shape, in_16_bits=_kept(shape, config, quantization))


def _kept(
    shape: ModelShape, config: Mapping[str, Any], quantization: str
) -> tuple[tuple[str, int], ...]:
    if is_in_4_bits(config):
        patterns = config["quantization_config"].get("llm_int8_skip_modules") or ()
        layers = {
            name: sum(
                is_kept(_module(name, number), patterns) for number in range(shape.num_layers)
            )
            for name in (shape.matrices if patterns else ())
        }
        return tuple((name, count) for name, count in layers.items() if count)
    names = shape.matrices if quantization == "none" else names_in_16_bits(quantization)
    return tuple((name, shape.num_layers) for name in names if name in shape.matrices)


def _module(matrix: str, layer: int) -> str:
    """The name of a matrix' module in a model of one of `PLANNED_FAMILIES`."""
    part = "mlp" if matrix in ("gate_proj", "up_proj", "gate_up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{part}.{matrix}"


def _dimensions(config: Mapping[str, Any]) -> ModelShape | None:
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
