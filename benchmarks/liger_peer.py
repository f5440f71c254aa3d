"""A stock stack of today as a side of `benchmarks.training`: Trainer, PEFT and Liger's kernels.

Runs in an environment of its own, never a dependency of the job, and imports nothing of it. It
needs torch for CUDA with Triton, transformers, peft, bitsandbytes, accelerate and liger-kernel:

    make bench-gpu LIGER_PYTHON=build/liger/bin/python

The samples of a step are the job's; sorted by length before they are paired, so that pairs hold
little padding. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

IGNORED = -100  # a label that is no target


class _Clock(TrainerCallback):
    """The seconds and the loss of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        torch.cuda.synchronize()
        self.seconds.append(time.monotonic() - self._started)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cuda",), default="cuda")
    parser.add_argument("--gpu-memory-gb", type=float)
    arguments = parser.parse_args()
    torch.backends.cuda.enable_flash_sdp(False)  # as on a T4, which has neither
    torch.backends.cuda.enable_cudnn_sdp(False)
    if arguments.gpu_memory_gb:
        share = arguments.gpu_memory_gb * 2**30 / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    recipe = json.loads((arguments.folder / "recipe.json").read_text())
    samples = _samples(np.load(arguments.folder / "rows.npz"))
    order = _order(recipe, [len(sample["input_ids"]) for sample in samples])
    clock = _Clock()
    trainer = Trainer(
        model=_model(arguments.folder / "model", recipe),
        args=_arguments(arguments.folder / "liger", recipe),
        train_dataset=[samples[i] for i in order],
        data_collator=_padded,
        callbacks=[clock],
    )
    # One epoch in the order that is given: the job's steps, one after another.
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(order)
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    result = {
        "losses": clock.losses,
        "seconds": clock.seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "plan": "pairs of like length, Liger's kernels, all layers recomputed",
        "predicted_bytes": None,
    }
    print(json.dumps(result))


def _model(folder: Path, recipe: dict[str, Any]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float16,
        device_map={"": "cuda"},
        attn_implementation="sdpa",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float16,
        ),
    )
    model.config.use_cache = False
    model.enable_input_require_grads()
    config = LoraConfig(
        r=recipe["lora_r"],
        lora_alpha=recipe["lora_alpha"],
        lora_dropout=recipe["lora_dropout"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _arguments(folder: Path, recipe: dict[str, Any]) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe["planned_steps"],
        per_device_train_batch_size=recipe["per_device_train_batch_size"],
        gradient_accumulation_steps=recipe["gradient_accumulation_steps"],
        learning_rate=recipe["learning_rate"],
        weight_decay=recipe["weight_decay"],
        lr_scheduler_type=recipe["lr_scheduler"],
        warmup_steps=recipe["warmup_ratio"],
        max_grad_norm=recipe["max_grad_norm"],
        fp16=True,
        optim="adamw_torch",
        use_liger_kernel=True,
        activation_checkpointing=True,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=recipe["seed"],
    )


def _samples(rows: Any) -> list[dict[str, list[int]]]:
    samples = []
    for start, end in zip(rows["offsets"][:-1], rows["offsets"][1:], strict=True):
        ids, is_target = rows["input_ids"][start:end], rows["is_target"][start:end]
        labels = np.where(is_target, ids, IGNORED)
        samples.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return samples


def _order(recipe: dict[str, Any], lengths: list[int]) -> list[int]:
    """The samples of the job's steps (`job/training/batching.py`), each step's longest first."""
    per_step = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    needed, epoch, drawn = per_step * recipe["planned_steps"], 0, []
    while len(drawn) < needed:
        text = f"{recipe['seed']}/epoch/{epoch}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
        drawn += np.random.default_rng(seed).permutation(len(lengths)).tolist()
        epoch += 1
    steps = [drawn[first : first + per_step] for first in range(0, needed, per_step)]
    return [i for step in steps for i in sorted(step, key=lambda sample: -lengths[sample])]


def _padded(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(example["input_ids"]) for example in examples)

    def rows(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([e[name] + [filler] * (longest - len(e[name])) for e in examples])

    ones = [[1] * len(e["input_ids"]) + [0] * (longest - len(e["input_ids"])) for e in examples]
    return {
        "input_ids": rows("input_ids", 0),
        "labels": rows("labels", IGNORED),
        "attention_mask": torch.tensor(ones),
    }


if __name__ == "__main__":
    main()
