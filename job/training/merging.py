"""A LoRA adapter added to its base's weights: one fp16 model that needs neither PEFT nor 4 bits."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from job.errors import work_dir_error
from job.log import log
from job.progress import size
from job.training.model import load_base

MAX_SHARD = "4GB"


def merge_adapter(location: str, revision: str | None, adapter: Path, folder: Path) -> None:
    """Write base + adapter to `folder` as fp16 safetensors with the tokenizer beside them.

    The base is quantised to 4 bits and back, as the adapter saw it in training: added to the
    original 16-bit weights, it would correct rounding errors that are not there. Runs on the CPU
    and takes a little over 2 bytes a parameter of memory.
    """
    model = load_base(location, revision, torch.device("cpu"))
    model = model.dequantize(dtype=torch.float16).to(torch.float16)
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
        path.chmod(0o644)  # safetensors writes for this user only
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    log.info("merged model: %s of fp16 weights and tokenizer", size(num_bytes))
