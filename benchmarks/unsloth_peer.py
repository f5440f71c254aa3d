"""Unsloth as a side of `benchmarks.training`: its loader, its kernels, and TRL's trainer, patched.

Runs in an environment of its own, never a dependency of the job, and imports nothing of it. It
needs torch for CUDA with Triton, and Unsloth with what it asks for; without xformers it computes
attention as PyTorch does (on a T4 that is the same kernel):

    make bench-gpu UNSLOTH_PYTHON=build/unsloth/bin/python

The samples of a step and their order are the job's. Unsloth trains padding-free, two samples a
micro-batch. Prints one line of JSON.
"""

from __future__ import annotations

import os

# Read when Hugging Face's packages and torch are imported: nothing is fetched, nothing is sent.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "WANDB_MODE": "disabled",
}
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as Unsloth sets it

import unsloth  # noqa: I001  it patches what is imported after it

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel

MAX_LENGTH = 1024
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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
    answer = os.dup(1)
    os.dup2(2, 1)  # Unsloth prints its banner and more on stdout
    torch.backends.cuda.enable_flash_sdp(False)  # as on a T4, which has neither
    torch.backends.cuda.enable_cudnn_sdp(False)
    if arguments.gpu_memory_gb:
        _cap_memory(int(arguments.gpu_memory_gb * 2**30))
    recipe = json.loads((arguments.folder / "recipe.json").read_text())
    model, tokenizer = _model(arguments.folder, recipe)
    trainer = _trainer(arguments.folder, recipe, model, tokenizer)
    clock = _Clock()
    trainer.add_callback(clock)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    result = {
        "losses": clock.losses,
        "seconds": clock.seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "plan": _about(trainer),
        "predicted_bytes": None,
    }
    os.write(answer, (json.dumps(result) + "\n").encode())


def _cap_memory(cap: int) -> None:
    """Make the card as small as a T4, also for code that asks how much is free."""
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / torch.cuda.mem_get_info()[1]))
    ask = torch.cuda.mem_get_info

    def capped(device: Any = None) -> tuple[int, int]:
        free, total = ask(device)
        return max(0, min(free, cap - torch.cuda.memory_reserved(device))), min(total, cap)

    torch.cuda.mem_get_info = torch.cuda.memory.mem_get_info = capped


def _model(folder: Path, recipe: dict[str, Any]) -> tuple[Any, Any]:
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(_with_a_tokenizer(folder)),
        max_seq_length=MAX_LENGTH,
        dtype=torch.float16,
        load_in_4bit=True,
        local_files_only=True,
        use_gradient_checkpointing="unsloth",
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=recipe["lora_r"],
        lora_alpha=recipe["lora_alpha"],
        lora_dropout=recipe["lora_dropout"],
        target_modules=MATRICES,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=recipe["seed"],
        max_seq_length=MAX_LENGTH,
    )
    if not any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        raise RuntimeError("Unsloth loaded the model in 16 bits: bitsandbytes was of no use to it")
    return model, tokenizer


def _with_a_tokenizer(folder: Path) -> Path:
    """The model beside a tokenizer of a few words, which Unsloth insists on and nothing uses."""
    linked = folder / "unsloth-model"
    linked.mkdir(exist_ok=True)
    for file in (folder / "model").iterdir():
        (linked / file.name).unlink(missing_ok=True)
        (linked / file.name).symlink_to(file.resolve())
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"word{i}" for i in range(60))]
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>")
        ),
        pad_token=words[0],
        bos_token=words[1],
        eos_token=words[2],
        unk_token=words[3],
        padding_side="right",
        model_max_length=4 * MAX_LENGTH,
    ).save_pretrained(linked)
    return linked


def _trainer(folder: Path, recipe: dict[str, Any], model: Any, tokenizer: Any) -> SFTTrainer:
    rows = np.load(folder / "rows.npz")
    parts = [slice(a, b) for a, b in zip(rows["offsets"][:-1], rows["offsets"][1:], strict=True)]
    parts = [parts[i] for i in _order(recipe, len(parts))]
    ids = [rows["input_ids"][part].tolist() for part in parts]
    # A completion mask and no labels: with labels Unsloth takes a collator that pads.
    masks = [rows["is_target"][part].astype(int).tolist() for part in parts]
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": ids, "completion_mask": masks}),
        args=SFTConfig(
            output_dir=str(folder / "unsloth"),
            max_steps=recipe["planned_steps"],
            per_device_train_batch_size=recipe["per_device_train_batch_size"],
            gradient_accumulation_steps=recipe["gradient_accumulation_steps"],
            learning_rate=recipe["learning_rate"],
            weight_decay=recipe["weight_decay"],
            lr_scheduler_type=recipe["lr_scheduler"],
            warmup_steps=recipe["warmup_ratio"],
            max_grad_norm=recipe["max_grad_norm"],
            max_length=MAX_LENGTH,
            completion_only_loss=True,
            padding_free=True,
            dataset_num_proc=1,
            optim="adamw_torch",
            fp16=True,
            bf16=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=recipe["seed"],
        ),
    )
    kept = [len(row) for row in trainer.train_dataset["input_ids"]]
    if kept != [len(row) for row in ids]:
        raise RuntimeError(f"Unsloth changed the rows: {len(kept)} of {len(ids)} are left")
    # One epoch in the order that is given: the job's steps, one after another.
    trainer._get_train_sampler = lambda *_, **__: torch.utils.data.SequentialSampler(ids)
    return trainer


def _order(recipe: dict[str, Any], num_samples: int) -> list[int]:
    """The samples of the job's steps, one after another (`job/training/batching.py`)."""
    per_step = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    needed, epoch, drawn = per_step * recipe["planned_steps"], 0, []
    while len(drawn) < needed:
        text = f"{recipe['seed']}/epoch/{epoch}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
        drawn += np.random.default_rng(seed).permutation(num_samples).tolist()
        epoch += 1
    return drawn[:needed]


def _about(trainer: SFTTrainer) -> str:
    padding_free = getattr(trainer.args, "padding_free", False)
    adapters = {str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}
    return (
        f"Unsloth {unsloth.__version__}, {'padding-free' if padding_free else 'padded'},"
        f" its own recomputing, adapters in {', '.join(sorted(adapters))}"
    )


if __name__ == "__main__":
    sys.exit(main())
