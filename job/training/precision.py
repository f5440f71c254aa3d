"""Weights, autocast and loss scaling: fp16 on a GPU, fp32 on a CPU, never bf16."""

from __future__ import annotations

import contextlib
from typing import Any

import bitsandbytes as bnb
import torch

from job.errors import SettingsError


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype to compute in: fp16 on CUDA, as a T4 has no tensor cores for bf16; else fp32."""
    return torch.float16 if device.type == "cuda" else torch.float32


def normalise_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Convert all weights to `dtype`, and have all 4-bit layers compute in it.

    Pre-quantised checkpoints have bf16 in their quantisation state, compute dtype, embeddings,
    norms and head, whatever dtype `from_pretrained` is asked for. Fp32 in quantisation states and
    buffers stays fp32: rotary frequencies in fp16 would be off by half a radian at position 1000.
    Raises `SettingsError` if a weight is too large for fp16.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = dtype
            module.compute_type_is_set = True
            _normalise_quant_state(module.weight.quant_state, dtype)
            if module.weight.device.type == "cpu":
                # On CPUs with AVX512-BF16, bitsandbytes repacks the weight at its first forward in
                # evaluation mode, for a path without autograd: training then loses its gradients.
                module.support_avx512bf16_for_cpu = False
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not isinstance(parameter, bnb.nn.Params4bit):
            parameter.data = parameter.data.to(dtype)
            if dtype == torch.float16 and not bool(parameter.isfinite().all()):
                raise SettingsError(
                    f"JOB_BASE_MODEL: {name} holds values that fp16 cannot (over 65504), and a T4"
                    " has no bf16; take another model"
                )
    for buffer in model.buffers():
        if buffer.dtype == torch.bfloat16:
            buffer.data = buffer.data.to(dtype)
    wrong = [n for n, p in model.named_parameters() if p.dtype not in (dtype, torch.uint8)]
    wrong += [n for n, buffer in model.named_buffers() if buffer.dtype == torch.bfloat16]
    assert not wrong, f"not {dtype}: {wrong[:3]}"


def _normalise_quant_state(state: Any, dtype: torch.dtype) -> None:
    """Have weights dequantised to `dtype`, and their scales, which are quantised, too, to fp32."""
    state.dtype = dtype
    scales = state.state2 if state.nested else state
    if state.nested:
        scales.dtype = torch.float32
        state.offset = state.offset.float()
    scales.absmax = scales.absmax.float()
    scales.code = scales.code.float()
    state.code = state.code.float()


def model_dtype(model: Any) -> torch.dtype:
    """The dtype that the base model of a `PeftModel` computes in."""
    dtype: torch.dtype = model.get_base_model().get_input_embeddings().weight.dtype
    return dtype


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Autocast to fp16, in which fp32 adapters and fp16 weights meet; nothing where all is fp32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def loss_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """A scaler that keeps fp16 gradients above fp16's smallest number, 6e-8; off for fp32."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
