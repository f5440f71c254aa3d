"""How much of the card a micro-batch may take. Reads config.json only; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CPU_TOKEN_BUDGET = 512


def loss_chunk_targets(vocab_size: int) -> int:
    """Targets whose logits are held at once: 64 MiB of fp32, but rows enough for a matrix product.

    512 for a vocabulary of 32 k; never under 256, which a T4's tensor cores still fill.
    """
    return max(256, 2**24 // vocab_size)


@dataclass(frozen=True)
class MemoryPlan:
    """What a step may hold at once."""

    token_budget: int  # tokens of a micro-batch, at most (a longer sample goes alone)
    recompute: bool  # activations inside the layers are computed again in backward


def plan_memory(
    *, on_gpu: bool, per_device_train_batch_size: int, max_seq_length: int
) -> MemoryPlan:
    """The card's own plan: `per_device_train_batch_size` full-length samples, all recomputed.

    On a CPU memory is no concern and nothing is recomputed; there, attention between packed
    samples is computed and masked out, so long rows cost more than they save.
    """
    if not on_gpu:
        return MemoryPlan(CPU_TOKEN_BUDGET, recompute=False)
    return MemoryPlan(per_device_train_batch_size * max_seq_length, recompute=True)


def adapter_parameters(config: Mapping[str, Any], lora_r: int) -> int | None:
    """Parameters of LoRA on all linear layers of a Llama-shaped decoder, from its config.json.

    r * (inputs + outputs) for each of the seven projections of a layer; None for other shapes.
    """
    if config.get("model_type") not in ("llama", "mistral", "qwen2", "qwen3"):
        return None
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv = (config.get("num_key_value_heads") or heads) * head_dim
    query, intermediate = heads * head_dim, config["intermediate_size"]
    attention = (hidden + query) + 2 * (hidden + kv) + (query + hidden)
    feed_forward = 2 * (hidden + intermediate) + (intermediate + hidden)
    return int(config["num_hidden_layers"] * lora_r * (attention + feed_forward))
