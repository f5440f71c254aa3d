"""Random models in real shapes and rows with real lengths, made on the machine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from job.data.samples import SampleTable
from job.ledger.records import Recipe

SHARD_BYTES = 2 * 2**30
LLAMA_VOCABULARY = {"vocab_size": 128_256, "rms_norm_eps": 1e-5}
# config.json of the models of these names, as far as speed and memory depend on it.
SHAPES: dict[str, dict[str, Any]] = {
    "smoke": {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "vocab_size": 1024},
    "tiny": {"model_type": "llama", "hidden_size": 256, "intermediate_size": 704,
             "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
             "vocab_size": 8192},
    "135m": {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
             "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
             "vocab_size": 49_152, "tie_word_embeddings": True},
    "1b": {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
           "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "head_dim": 64, "tie_word_embeddings": True, **LLAMA_VOCABULARY},
    "3b": {"model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192,
           "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
           "head_dim": 128, "tie_word_embeddings": True, **LLAMA_VOCABULARY},
    "7b": {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14_336,
           "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
           "vocab_size": 32_768, "sliding_window": None},
    "8b": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14_336,
           "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
           **LLAMA_VOCABULARY},
}  # fmt: skip


def make_recipe(num_steps: int, **changes: Any) -> Recipe:
    """The tuning card's recipe, evaluated at its end only."""
    values: dict[str, Any] = {
        "learning_rate": 2e-4,
        "gradient_accumulation_steps": 4,
        "lora_dropout": 0.05,
        "weight_decay": 0.01,
        "lora_r": 8,
        "lora_alpha": 16,
        "lr_scheduler": "linear",
        "warmup_ratio": 0.1,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": 2,
        "seed": 17,
        "patience": 1,
    }
    return Recipe(**values | changes, planned_steps=num_steps, eval_steps=(num_steps,))


def write_model(folder: Path, name: str) -> Path:
    """A model folder with random fp16 weights, made tensor by tensor: 2 GB of memory suffice."""
    shape = {"max_position_embeddings": 4096, **SHAPES[name]}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.dtype = torch.float16
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    weight_map = {}
    for number, shard in enumerate(_shards(shapes)):
        file = f"model-{number:05d}.safetensors"
        save_file({n: _random(n, shapes[n].shape) for n in shard}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _shards(shapes: dict[str, torch.Tensor]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in shapes.items():
        if names and size + 2 * tensor.numel() > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * tensor.numel()
    yield names


def _random(name: str, shape: torch.Size) -> torch.Tensor:
    """Random weights of a size that keeps activations near 1, as training would leave them."""
    if "norm" in name:
        return torch.ones(shape, dtype=torch.float16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(len(name) + shape[0])
    weights = torch.randn(shape, generator=generator, device=device) / math.sqrt(shape[-1])
    return weights.half().cpu()


def log_normal_rows(num_samples: int, vocabulary: int, *, seed: int = 17) -> SampleTable:
    """Lengths log-normal (median 200, sigma 0.8, cap 1024); the second half of a sample counts."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(math.log(200), 0.8, num_samples), 16, 1024).astype(np.int64)
    ids = [rng.integers(3, vocabulary, n).astype(np.int32) for n in lengths]
    return SampleTable.concatenate(ids, [np.arange(n) >= n // 2 for n in lengths])
