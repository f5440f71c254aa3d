"""The eval/loss of finished models on held-out rows, whether they fit into memory or not."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from job.data.samples import SampleTable
from job.log import log
from job.progress import CountProgress, size
from job.training.attention import enable_packed_attention
from job.training.batching import MicroBatch, pack
from job.training.gpu_faults import gpu_faults_told
from job.training.loss import has_chunked_loss, sample_nll
from job.training.model import load_base
from job.training.precision import autocast, compute_dtype
from job.training.weights import Weights, local_folder, read_config, skeleton

TOKEN_BUDGET = 4096  # of a packed row
STREAMED_TOKEN_BUDGET = 16_384  # the weights are read again for each row

# Told, between two layers, the share that is done of what takes long: reading the weights, once or
# for every row. Raises to end the measuring.
Pace = Callable[[float], None]


@gpu_faults_told()
def losses_in_4_bits(
    location: str, revision: str | None, adapter: Path, table: SampleTable, device: torch.device
) -> tuple[float, float]:
    """The eval/loss of the NF4 base, untuned and with the adapter.

    Raises what `load_base` raises.
    """
    free_memory(device)
    base = load_base(location, revision, device)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    if has_chunked_loss(base):
        enable_packed_attention(base)
    rows = _rows(base, table, TOKEN_BUDGET)
    with model.disable_adapter():
        untuned = _loss(base, table, rows, device, title="untuned in 4 bits")
    return untuned, _loss(base, table, rows, device, title="adapter in 4 bits")


@gpu_faults_told()
def loss_in_16_bits(
    location: str,
    revision: str | None,
    table: SampleTable,
    device: torch.device,
    *,
    title: str,
    memory_bytes: int,
    pace: Pace = lambda _: None,
) -> float | None:
    """The eval/loss of a model's own weights, rounded to fp16, computed in `compute_dtype`.

    A model that would take more than `memory_bytes` passes through the memory layer by layer, once
    for every `STREAMED_TOKEN_BUDGET` tokens; one of a family whose rows are not packed is then not
    measured (None). Raises `SettingsError` for files that are no model, and what `pace` raises.
    """
    free_memory(device)
    folder = local_folder(location, revision)
    config = read_config(folder)
    model, dtype = skeleton(config), compute_dtype(device)
    num_bytes = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    fits, packed = num_bytes <= memory_bytes, has_chunked_loss(model)
    if not fits and not packed:
        log.warning("%s: not measured, it needs %s of memory", title, size(num_bytes))
        return None
    batches = _rows(model, table, TOKEN_BUDGET if fits else STREAMED_TOKEN_BUDGET)
    if packed:
        reads = 1 if fits else len(batches)
        _read_as_it_runs(
            model, Weights(folder, config), device, dtype, keep=fits, reads=reads, pace=pace
        )
        enable_packed_attention(model)
    else:
        model = _whole(folder, device, dtype)
    model.config.use_cache = False
    return _loss(model, table, batches, device, title=title, pace=pace)


def _whole(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A model as transformers loads it, by way of fp16."""
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float16,
        device_map={"": device},
        use_safetensors=True,
        trust_remote_code=False,
    )
    return model.eval().float() if dtype == torch.float32 else model.eval()


def free_memory(device: torch.device) -> None:
    """Free what an earlier model held: only a collection ends a model's cycles of objects."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _rows(model: Any, table: SampleTable, token_budget: int) -> list[MicroBatch]:
    budget = token_budget if has_chunked_loss(model) else 1
    return list(pack(table, range(len(table)), budget))


def _loss(
    model: Any,
    table: SampleTable,
    batches: Sequence[MicroBatch],
    device: torch.device,
    *,
    title: str,
    pace: Pace = lambda _: None,
) -> float:
    total = torch.zeros((), dtype=torch.float64, device=device)
    with (
        CountProgress(f"measuring {title}", "rows", total=len(table)) as progress,
        torch.no_grad(),
        autocast(device, compute_dtype(device)),
    ):
        for batch in batches:
            pace(1.0)
            total += sample_nll(model, batch.to(device)).sum()
            progress.advance(len(batch.sample_lengths))
    return float(total) / table.num_target_tokens


def _read_as_it_runs(
    model: Any,
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype,
    *,
    keep: bool,
    reads: int,
    pace: Pace,
) -> None:
    """Have every layer of a skeleton read its weights when it runs.

    They stay with `keep`, and are dropped otherwise, to be read again for every row. Embeddings and
    head stay: the loss takes the head's matrix itself.
    """
    hooked: list[Any] = []
    runs = 0

    def before(module: Any, name: str) -> None:
        nonlocal runs
        runs += 1
        pace(min(1.0, runs / (reads * len(hooked))))
        _fill(module, name, weights, device, dtype)

    body, head = model.base_model, model.get_output_embeddings()
    # Its frequencies are no weights: no file has them.
    body.rotary_emb = type(body.rotary_emb)(config=model.config).to(device)
    resident = {model.get_input_embeddings(), head}
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue
        if module not in resident:
            hooked.append(module)
            module.register_forward_pre_hook(lambda module, _, name=name: before(module, name))
            if not keep:
                module.register_forward_hook(lambda module, *_: _empty(module))
        elif f"{name}.weight" in weights.names():
            _fill(module, name, weights, device, dtype)
    if model.config.tie_word_embeddings:
        head.weight = model.get_input_embeddings().weight


def _fill(
    module: Any, name: str, weights: Weights, device: torch.device, dtype: torch.dtype
) -> None:
    """Read what the module has no weights of; by way of fp16, as every base on a GPU is."""
    for key, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_meta:
            tensor = weights.read(f"{name}.{key}", device).to(torch.float16).to(dtype)
            module.register_parameter(key, torch.nn.Parameter(tensor, requires_grad=False))


def _empty(module: Any) -> None:
    for key, parameter in list(module.named_parameters(recurse=False)):
        hollow = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
        module.register_parameter(key, hollow)
