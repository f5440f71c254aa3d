"""Greedy generation by the 4-bit base with one of several adapters, or with none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers.utils import logging

from job.training.gpu_faults import gpu_faults_told, out_of_memory_by_one_name
from job.training.model import load_base
from job.training.precision import autocast, compute_dtype


@gpu_faults_told()
def load_models(
    location: str,
    revision: str | None,
    adapters: Mapping[str, Path],
    device: torch.device,
    *,
    memory_bytes: int,
    quantization: str = "nf4",
) -> Any:
    """Load the base once, with all adapters beside it, each under its name.

    On a CPU the 4-bit matrices are written out in fp32 if `memory_bytes` allow it: the same
    numbers, but not computed anew for every token. Raises what `load_base` raises.
    """
    model = load_base(location, revision, device, quantization=quantization)
    num_bytes, in_4_bits = 4 * model.num_parameters(), getattr(model, "is_loaded_in_4bit", False)
    if in_4_bits and device.type == "cpu" and num_bytes <= memory_bytes:
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # it warns of what is asked for here
        try:
            model = model.dequantize(dtype=torch.float32)
        finally:
            logging.set_verbosity(level)
    for name, folder in adapters.items():
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
    return model.eval()


@gpu_faults_told()
def generate(
    model: Any,
    adapter: str | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
) -> list[list[int]]:
    """Generate the likeliest tokens behind each prompt, without what ends them.

    `adapter` is one of `load_models`' names, None the untuned base. Prompts are padded on the left
    to one batch; half of them at a time where a GPU's memory is not enough.
    """
    try:
        return _generate(model, adapter, prompts, max_new_tokens, end_ids)
    except torch.OutOfMemoryError:
        if len(prompts) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(prompts) // 2
    return [
        answer
        for part in (prompts[:half], prompts[half:])
        for answer in generate(model, adapter, part, max_new_tokens=max_new_tokens, end_ids=end_ids)
    ]


@out_of_memory_by_one_name()
def _generate(
    model: Any,
    adapter: str | None,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Sequence[int],
) -> list[list[int]]:
    longest = max(map(len, prompts))
    padding, device = end_ids[0], model.device
    ids = [[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    arguments: dict[str, Any] = {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
        "max_new_tokens": max_new_tokens,
        "do_sample": False, "num_beams": 1, "use_cache": True,
        # A base's own generation settings may ask for sampling.
        "temperature": None, "top_p": None, "top_k": None,
        "eos_token_id": list(end_ids), "pad_token_id": padding,
    }  # fmt: skip
    if adapter is not None:
        model.set_adapter(adapter)
    with torch.inference_mode(), autocast(device, compute_dtype(device)):
        if adapter is None and isinstance(model, PeftModel):
            with model.disable_adapter():
                tokens = model.generate(**arguments)
        else:
            tokens = model.generate(**arguments)
    return [_until_end(row, end_ids) for row in tokens[:, longest:].tolist()]


def _until_end(tokens: list[int], end_ids: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in end_ids), len(tokens))
    return tokens[:end]
