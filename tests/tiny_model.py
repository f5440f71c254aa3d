"""Tiny real models and token tables for the training tests; random weights, made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from job.data.samples import SampleTable
from job.ledger.records import Recipe
from job.training.recipe import plan_evaluations

VOCABULARY = 128
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "cohere", "cohere2")


def make_base(
    folder: Path, *, model_type: str = "llama", vocab_size: int = VOCABULARY, **changes: object
) -> Path:
    """Save a random two-layer model of 60 k parameters; return its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if model_type == "granite":  # its defaults of 1 would test nothing
        shape |= {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "attention_multiplier": 0.1}
    config = AutoConfig.for_model(model_type, **shape | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def make_table(num_samples: int, seed: int, *, longest: int = 40) -> SampleTable:
    """Samples of random lengths whose second half is to be learned: token i+1 follows from i."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, longest + 1, num_samples)
    samples = [
        (np.cumsum(np.r_[rng.integers(3, 60), rng.integers(1, 4, n - 1)]) % 120 + 3).astype(
            np.int32
        )
        for n in lengths
    ]
    targets = [np.arange(n) >= n // 2 for n in lengths]
    return SampleTable(
        np.concatenate(samples), np.concatenate(targets), np.r_[0, np.cumsum(lengths)]
    )


def make_recipe(**changes: object) -> Recipe:
    """Twenty steps of two samples times two; the untuned model is evaluated, too."""
    values: dict[str, object] = {
        "learning_rate": 5e-3,
        "gradient_accumulation_steps": 2,
        "lora_dropout": 0.0,
        "weight_decay": 0.05,
        "lora_r": 4,
        "lora_alpha": 8,
        "lr_scheduler": "linear",
        "warmup_ratio": 0.1,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": 2,
        "seed": 17,
        "planned_steps": 20,
        "patience": 3,
    } | changes
    planned_steps = values["planned_steps"]
    assert isinstance(planned_steps, int)
    values.setdefault("eval_steps", (0, *plan_evaluations(planned_steps, 4)))
    return Recipe(**values)  # type: ignore[arg-type]
