"""TRL's `SFTTrainer` with its packing, as a side of `benchmarks.training`; prints JSON.

Runs in an environment of its own, never a dependency of the job, and imports nothing of it:

    python -m venv build/trl && build/trl/bin/pip install -c constraints.txt trl==1.16.0 \\
        torch==2.13.0 transformers peft bitsandbytes accelerate
    make bench TRL_PYTHON=build/trl/bin/python
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from benchmarks import peer

ROW_TOKENS = 1024


def main() -> None:
    arguments = peer.arguments("cpu", "cuda")
    folder, on_gpu = arguments.folder, arguments.device == "cuda"
    recipe = json.loads((folder / "recipe.json").read_text())
    if on_gpu:
        peer.be_a_t4(arguments.gpu_memory_gb)
    trainer, tokens = _trainer(folder, recipe, on_gpu)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    recorder = peer.Clock()
    trainer.add_callback(recorder)
    trainer.train()
    rows = trainer.args.gradient_accumulation_steps
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(
        json.dumps(
            {
                "losses": recorder.losses,
                "seconds": recorder.seconds,
                "tokens": [
                    sum(tokens[i * rows : (i + 1) * rows]) for i in range(len(recorder.losses))
                ],
                "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak,
                "plan": f"rows of {ROW_TOKENS} tokens packed by TRL (bfd)"
                + (", all layers recomputed" if on_gpu else ""),
                "predicted_bytes": None,
            }
        )
    )


def _trainer(folder: Path, recipe: dict[str, Any], on_gpu: bool) -> tuple[SFTTrainer, list[int]]:
    dtype = torch.float16 if on_gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model",
        dtype=dtype,
        device_map={"": "cuda" if on_gpu else "cpu"},
        attn_implementation="sdpa",
        quantization_config=peer.in_4_bits(dtype),
    )
    rows = peer.read_rows(folder)
    samples_per_step = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    mean_tokens = statistics.fmean(len(ids) for ids, _ in rows)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            **peer.training(recipe)
            | {
                "per_device_train_batch_size": 1,
                # As many rows as hold a step's tokens; TRL counts rows, not samples.
                "gradient_accumulation_steps": max(
                    1, round(samples_per_step * mean_tokens / ROW_TOKENS)
                ),
            },
            packing=True,
            max_length=ROW_TOKENS,
            use_cpu=not on_gpu,
            bf16=False,
            fp16=on_gpu,
            activation_checkpointing=on_gpu,
            gradient_checkpointing=None,  # TRL's default overrides the new name
        ),
        train_dataset=Dataset.from_dict(
            {"input_ids": [row[0] for row in rows], "labels": [peer.labels(row) for row in rows]}
        ),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, "<pad>")),
            pad_token="<pad>",  # noqa: S106
            eos_token="<eos>",  # noqa: S106
        ),
        peft_config=LoraConfig(**peer.lora(recipe)),
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL makes them bf16, which a loss scaler refuses
            parameter.data = parameter.data.float()
    tokens: list[int] = []
    collate = trainer.data_collator

    def counted(rows: list[dict[str, Any]]) -> Any:
        tokens.append(sum(len(row["input_ids"]) for row in rows))
        return collate(rows)

    trainer.data_collator = counted
    return trainer, tokens


if __name__ == "__main__":
    sys.exit(main())
