"""Merging a LoRA adapter into its base: one fp16 model that needs neither PEFT nor bitsandbytes."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from job.errors import work_dir_error
from job.log import log
from job.progress import size
from job.training.model import load_base

MAX_SHARD = "4GB"  # of a weight file


def merge_adapter(
    location: str,
    revision: str | None,
    adapter: Path,
    folder: Path,
    *,
    quantization: str = "nf4",
) -> None:
    """Write base + adapter to `folder` as fp16 safetensors, with the tokenizer.

    The base is what it was in training: what was in 4 bits is quantised and back, as the adapter
    also corrects rounding errors, which the original 16-bit weights do not have. Runs on the CPU
    and takes a little over 2 bytes of memory for each parameter. Raises what `load_base` raises,
    and `OutageError` if the volume of `folder` is full.
    """
    cpu = torch.device("cpu")
    model = load_base(location, revision, cpu, quantization=quantization)
    if getattr(model, "is_loaded_in_4bit", False):
        model = model.dequantize(dtype=torch.float16)
    model = model.to(torch.float16)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.config.dtype = torch.float16
    merged.config.use_cache = True  # off for training only
    try:
        merged.save_pretrained(folder, max_shard_size=MAX_SHARD)
        AutoTokenizer.from_pretrained(
            location, revision=revision or "main", trust_remote_code=False
        ).save_pretrained(folder)
    except OSError as error:
        raise work_dir_error(folder, error) from error
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors makes files that only their owner can read
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    log.info("merged model: %s of fp16 weights and tokenizer", size(num_bytes))
