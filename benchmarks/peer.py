"""What the peers of `benchmarks.training` share. A peer's Python lacks packages that the job needs,
so nothing of the job is imported here.

A peer reads the folder that the benchmark writes (model, recipe.json, rows.npz), trains the job's
samples in the job's order, and prints one line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BitsAndBytesConfig, TrainerCallback

IGNORED = -100  # a label that is no target


class Clock(TrainerCallback):  # type: ignore[misc]
    """The seconds and the loss of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.monotonic() - self._started)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def arguments(*devices: str) -> argparse.Namespace:
    """The command line that the benchmark gives every side; the first device is the default."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--gpu-memory-gb", type=float)
    return parser.parse_args()


def be_a_t4(gpu_memory_gb: float | None) -> None:
    """Leave the attention kernels that a T4 has, and so much of the memory, in GiB."""
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    if gpu_memory_gb:
        share = gpu_memory_gb * 2**30 / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))


def in_4_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """The job's own quantisation: NF4, twice, computing in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def read_rows(folder: Path) -> list[tuple[list[int], list[bool]]]:
    """The token ids of each sample, and which of them are targets."""
    rows = np.load(folder / "rows.npz")
    parts = [slice(a, b) for a, b in zip(rows["offsets"][:-1], rows["offsets"][1:], strict=True)]
    return [(rows["input_ids"][p].tolist(), rows["is_target"][p].tolist()) for p in parts]


def labels(sample: tuple[list[int], list[bool]]) -> list[int]:
    """A sample's tokens, with `IGNORED` for those that are no target."""
    return [token if is_target else IGNORED for token, is_target in zip(*sample, strict=True)]


def steps_of(recipe: dict[str, Any], num_samples: int) -> list[list[int]]:
    """The samples of each of the job's steps (`job/training/batching.py`)."""
    per_step = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    needed, epoch, drawn = per_step * recipe["planned_steps"], 0, []
    while len(drawn) < needed:
        text = f"{recipe['seed']}/epoch/{epoch}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
        drawn += np.random.default_rng(seed).permutation(num_samples).tolist()
        epoch += 1
    return [drawn[first : first + per_step] for first in range(0, needed, per_step)]


def training(recipe: dict[str, Any]) -> dict[str, Any]:
    """What `TrainingArguments` and `SFTConfig` are given of the recipe, alike for all peers."""
    return {
        "max_steps": recipe["planned_steps"],
        "per_device_train_batch_size": recipe["per_device_train_batch_size"],
        "gradient_accumulation_steps": recipe["gradient_accumulation_steps"],
        "learning_rate": recipe["learning_rate"],
        "weight_decay": recipe["weight_decay"],
        "lr_scheduler_type": recipe["lr_scheduler"],
        "warmup_steps": recipe["warmup_ratio"],
        "max_grad_norm": recipe["max_grad_norm"],
        "optim": "adamw_torch",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def lora(recipe: dict[str, Any]) -> dict[str, Any]:
    """What `LoraConfig` is given of the recipe."""
    return {
        "r": recipe["lora_r"],
        "lora_alpha": recipe["lora_alpha"],
        "lora_dropout": recipe["lora_dropout"],
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
