"""fp16 on a GPU, fp32 on a CPU, by construction: weights, autocast, loss scaling."""

from __future__ import annotations

import contextlib
from typing import Any

import bitsandbytes as bnb
import torch

from job.errors import SettingsError


def compute_dtype(device: torch.device) -> torch.dtype:
    """fp16 on CUDA, never bf16: a T4 (sm75) emulates bf16 without tensor cores. fp32 on CPU."""
    return torch.float16 if device.type == "cuda" else torch.float32


def normalise_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Make every weight and every 4-bit layer compute in `dtype`; `SettingsError` if one cannot.

    Pre-quantised checkpoints carry bf16 in the quantisation state, the compute dtype, embeddings,
    norms and head, and keep it whatever dtype from_pretrained() is asked for. What quantisation
    states and buffers hold in fp32 stays so: rotary frequencies in fp16 would be off by half a
    radian at position 1000.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = dtype
            module.compute_type_is_set = True
            _normalise_quant_state(module.weight.quant_state, dtype)
            if module.weight.device.type == "cpu":
                # On CPUs with AVX512-BF16, the first forward in evaluation mode repacks the weight
                # for a path without autograd, and later training forwards silently lose gradients.
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
    """Weights are dequantised to `dtype`; the scales, quantised themselves, to fp32."""
    state.dtype = dtype
    scales = state.state2 if state.nested else state
    if state.nested:
        scales.dtype = torch.float32
        state.offset = state.offset.float()
    scales.absmax = scales.absmax.float()
    scales.code = scales.code.float()
    state.code = state.code.float()


def model_dtype(model: Any) -> torch.dtype:
    """What the base model of a `PeftModel` computes in."""
    dtype: torch.dtype = model.get_base_model().get_input_embeddings().weight.dtype
    return dtype


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """fp32 adapters between fp16 weights meet in fp16; nothing to do where all is fp32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def loss_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """Lifts fp16 gradients over their smallest number, 6e-8; switched off for fp32."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
