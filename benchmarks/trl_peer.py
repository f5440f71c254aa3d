"""TRL's `SFTTrainer` with its packing, as a side of `benchmarks.training`; prints JSON.

Runs in an environment of its own, never a dependency of the job, and imports nothing of it:

    python -m venv build/trl && build/trl/bin/pip install -c constraints.txt trl==1.16.0 \\
        torch==2.13.0 transformers peft bitsandbytes accelerate
    make bench TRL_PYTHON=build/trl/bin/python
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

ROW_TOKENS = 1024


class _Recorder(TrainerCallback):
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
            self.losses.append(logs["loss"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--gpu-memory-gb", type=float)
    arguments = parser.parse_args()
    folder, on_gpu = arguments.folder, arguments.device == "cuda"
    recipe = json.loads((folder / "recipe.json").read_text())
    if on_gpu:
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        if arguments.gpu_memory_gb:
            share = arguments.gpu_memory_gb * 2**30 / torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    trainer, tokens = _trainer(folder, recipe, on_gpu)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    recorder = _Recorder()
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
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    data = np.load(folder / "rows.npz")
    parts = [slice(a, b) for a, b in zip(data["offsets"][:-1], data["offsets"][1:], strict=True)]
    ids = [data["input_ids"][part] for part in parts]
    labels = [np.where(data["is_target"][p], data["input_ids"][p], -100) for p in parts]
    samples_per_step = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    mean_tokens = float(np.diff(data["offsets"]).mean())
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            max_steps=recipe["planned_steps"],
            per_device_train_batch_size=1,
            # As many rows as hold a step's tokens; TRL counts rows, not samples.
            gradient_accumulation_steps=max(1, round(samples_per_step * mean_tokens / ROW_TOKENS)),
            learning_rate=recipe["learning_rate"],
            weight_decay=recipe["weight_decay"],
            lr_scheduler_type=recipe["lr_scheduler"],
            warmup_steps=recipe["warmup_ratio"],
            max_grad_norm=recipe["max_grad_norm"],
            packing=True,
            max_length=ROW_TOKENS,
            optim="adamw_torch",
            logging_steps=1,
            use_cpu=not on_gpu,
            bf16=False,
            fp16=on_gpu,
            activation_checkpointing=on_gpu,
            gradient_checkpointing=None,  # TRL's default overrides the new name
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_dict(
            {"input_ids": [i.tolist() for i in ids], "labels": [i.tolist() for i in labels]}
        ),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, "<pad>")),
            pad_token="<pad>",  # noqa: S106
            eos_token="<eos>",  # noqa: S106
        ),
        peft_config=LoraConfig(
            r=recipe["lora_r"],
            lora_alpha=recipe["lora_alpha"],
            lora_dropout=recipe["lora_dropout"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
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
