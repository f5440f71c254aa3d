"""A stock stack of today as a side of `benchmarks.training`: Trainer, PEFT and Liger's kernels.

Runs in an environment of its own, never a dependency of the job, and imports nothing of it. It
needs torch for CUDA with Triton, transformers (5.17 was measured), peft, bitsandbytes, accelerate
and liger-kernel (0.8.5):

    make bench-gpu LIGER_PYTHON=build/liger/bin/python

The samples of a step are the job's; sorted by length before they are paired, so that pairs hold
little padding. Prints one line of JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from benchmarks import peer

# The name of it since transformers 5.23, and before.
_RECOMPUTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


def main() -> None:
    arguments = peer.arguments("cuda")
    peer.be_a_t4(arguments.gpu_memory_gb)
    recipe = json.loads((arguments.folder / "recipe.json").read_text())
    rows = peer.read_rows(arguments.folder)
    samples = [{"input_ids": row[0], "labels": peer.labels(row)} for row in rows]
    steps = peer.steps_of(recipe, len(rows))
    order = [i for step in steps for i in sorted(step, key=lambda row: -len(rows[row][0]))]
    clock = peer.Clock()
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
        quantization_config=peer.in_4_bits(torch.float16),
    )
    model.config.use_cache = False
    model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(**peer.lora(recipe)))


def _arguments(folder: Path, recipe: dict[str, Any]) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        **peer.training(recipe),
        fp16=True,
        use_liger_kernel=True,
        **{_RECOMPUTING: True},
        remove_unused_columns=False,
        seed=recipe["seed"],
    )


def _padded(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(example["input_ids"]) for example in examples)

    def rows(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([e[name] + [filler] * (longest - len(e[name])) for e in examples])

    ones = [[1] * len(e["input_ids"]) + [0] * (longest - len(e["input_ids"])) for e in examples]
    return {
        "input_ids": rows("input_ids", 0),
        "labels": rows("labels", peer.IGNORED),
        "attention_mask": torch.tensor(ones),
    }


if __name__ == "__main__":
    main()
