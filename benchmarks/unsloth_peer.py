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

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel

from benchmarks import peer

MAX_LENGTH = 1024
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    arguments = peer.arguments("cuda")
    answer = os.dup(1)
    os.dup2(2, 1)  # Unsloth prints its banner and more on stdout
    peer.be_a_t4(arguments.gpu_memory_gb)
    if arguments.gpu_memory_gb:
        _tell_of_the_cap(int(arguments.gpu_memory_gb * 2**30))
    recipe = json.loads((arguments.folder / "recipe.json").read_text())
    model, tokenizer = _model(arguments.folder, recipe)
    trainer = _trainer(arguments.folder, recipe, model, tokenizer)
    clock = peer.Clock()
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


def _tell_of_the_cap(cap: int) -> None:
    """Have code that asks for the free memory hear of the cap, in bytes, as well."""
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
    rows = peer.read_rows(folder)
    rows = [rows[i] for step in peer.steps_of(recipe, len(rows)) for i in step]
    ids = [row[0] for row in rows]
    # A completion mask and no labels: with labels Unsloth takes a collator that pads.
    masks = [[int(is_target) for is_target in row[1]] for row in rows]
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": ids, "completion_mask": masks}),
        args=SFTConfig(
            output_dir=str(folder / "unsloth"),
            **peer.training(recipe),
            max_length=MAX_LENGTH,
            completion_only_loss=True,
            padding_free=True,
            dataset_num_proc=1,
            fp16=True,
            bf16=False,
            seed=recipe["seed"],
        ),
    )
    kept = [len(row) for row in trainer.train_dataset["input_ids"]]
    if kept != [len(row) for row in ids]:
        raise RuntimeError(f"Unsloth changed the rows: {len(kept)} of {len(ids)} are left")
    # One epoch in the order that is given: the job's steps, one after another.
    trainer._get_train_sampler = lambda *_, **__: torch.utils.data.SequentialSampler(ids)
    return trainer


def _about(trainer: SFTTrainer) -> str:
    padding_free = getattr(trainer.args, "padding_free", False)
    adapters = {str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}
    return (
        f"Unsloth {unsloth.__version__}, {'padding-free' if padding_free else 'padded'},"
        f" its own recomputing, adapters in {', '.join(sorted(adapters))}"
    )


if __name__ == "__main__":
    sys.exit(main())
