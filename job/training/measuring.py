"""The eval/loss of finished models on held-out rows, whether they fit into memory or not."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from job.data.samples import SampleTable
from job.log import log
from job.progress import CountProgress, size
from job.training.attention import enable_packed_attention
from job.training.batching import pack
from job.training.gpu_faults import gpu_faults_told
from job.training.loss import has_chunked_loss, sample_nll
from job.training.model import load_base
from job.training.precision import autocast, compute_dtype
from job.training.weights import Weights, local_folder, read_config, skeleton

TOKEN_BUDGET = 4096  # of a packed row
STREAMED_TOKEN_BUDGET = 16_384  # the weights are read again for each row


@gpu_faults_told()
def losses_in_4_bits(
    location: str, revision: str | None, adapter: Path, table: SampleTable, device: torch.device
) -> tuple[float, float]:
    """The eval/loss of the NF4 base, untuned and with the adapter.

    Raises what `load_base` raises.
    """
    _free(device)
    base = load_base(location, revision, device)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    if has_chunked_loss(base):
        enable_packed_attention(base)
    with model.disable_adapter():
        untuned = _loss(model.get_base_model(), table, device, "untuned in 4 bits")
    return untuned, _loss(model.get_base_model(), table, device, "adapter in 4 bits")


@gpu_faults_told()
def loss_in_16_bits(
    location: str,
    revision: str | None,
    table: SampleTable,
    device: torch.device,
    *,
    title: str,
    memory_bytes: int,
) -> float | None:
    """The eval/loss of a model's own weights, rounded to fp16, computed in `compute_dtype`.

    A model that would take more than `memory_bytes` passes through the memory layer by layer, once
    for every `STREAMED_TOKEN_BUDGET` tokens; one of a family whose rows are not packed is then not
    measured (None). Raises `SettingsError` for files that are no model.
    """
    _free(device)
    folder = local_folder(location, revision)
    config = read_config(folder)
    model, dtype = skeleton(config), compute_dtype(device)
    num_bytes = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    streamed = num_bytes > memory_bytes
    if streamed and not has_chunked_loss(model):
        log.warning("%s: not measured, it needs %s of memory", title, size(num_bytes))
        return None
    if streamed:
        _stream(model, Weights(folder, config), device, dtype)
    else:
        # By way of fp16: a merged model is in fp16, and so is every base on a GPU.
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float16,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
        )
        model = model.eval().float() if dtype == torch.float32 else model.eval()
    model.config.use_cache = False
    if has_chunked_loss(model):
        enable_packed_attention(model)
    return _loss(model, table, device, title, STREAMED_TOKEN_BUDGET if streamed else TOKEN_BUDGET)


def _free(device: torch.device) -> None:
    """Free what an earlier model held: only a collection ends a model's cycles of objects."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _loss(
    model: Any, table: SampleTable, device: torch.device, title: str, budget: int = TOKEN_BUDGET
) -> float:
    row_budget = budget if has_chunked_loss(model) else 1
    total = torch.zeros((), dtype=torch.float64, device=device)
    with (
        CountProgress(f"measuring {title}", "rows", total=len(table)) as progress,
        torch.no_grad(),
        autocast(device, compute_dtype(device)),
    ):
        for batch in pack(table, range(len(table)), row_budget):
            total += sample_nll(model, batch.to(device)).sum()
            progress.advance(len(batch.sample_lengths))
    return float(total) / table.num_target_tokens


def _stream(model: Any, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
    """Have every layer of a skeleton read its weights when it runs, and drop them afterwards.

    Embeddings and head stay: the loss takes the head's matrix itself.
    """

    def fill(module: Any, name: str) -> None:
        for key, _ in list(module.named_parameters(recurse=False)):
            tensor = weights.read(f"{name}.{key}", device).to(torch.float16).to(dtype)
            module.register_parameter(key, torch.nn.Parameter(tensor, requires_grad=False))

    def empty(module: Any) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            hollow = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
            module.register_parameter(key, hollow)

    body, head = model.base_model, model.get_output_embeddings()
    # Its frequencies are no weights: no file has them.
    body.rotary_emb = type(body.rotary_emb)(config=model.config).to(device)
    resident = {model.get_input_embeddings(), head}
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue
        if module not in resident:
            module.register_forward_pre_hook(lambda module, _, name=name: fill(module, name))
            module.register_forward_hook(lambda module, *_: empty(module))
        elif f"{name}.weight" in weights.names():
            fill(module, name)
    if model.config.tie_word_embeddings:
        head.weight = model.get_input_embeddings().weight
