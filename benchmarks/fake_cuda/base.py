"""A base model of any shape and precision, on a fake card, as `load_base` would leave it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from transformers import AutoConfig, AutoModelForCausalLM

from job.training.precision import normalise_dtype
from job.training.quantization import names_in_16_bits

CARD = torch.device("cuda", 0)


def fake_base(config: Mapping[str, Any], quantization: str = "nf4") -> Any:
    """Make a base from a config.json's entries: what is not NF4 by `quantization` is fp16."""
    options = dict(config)
    configuration = AutoConfig.for_model(options.pop("model_type"), **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            configuration, dtype=torch.float16, attn_implementation="sdpa"
        )
    head, kept = model.get_output_embeddings(), names_in_16_bits(quantization)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            is_kept = child is head or quantization == "none" or name in kept
            if type(child) is torch.nn.Linear and not is_kept:
                setattr(parent, name, _quantised(child))
    _put_on_card(model)
    model.is_loaded_in_4bit = quantization != "none"
    normalise_dtype(model, torch.float16)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def _put_on_card(model: torch.nn.Module) -> None:
    """Put on the card what was made on the meta device, tied weights once."""
    moved: dict[torch.Tensor, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.device != CARD:
                if weight not in moved:
                    moved[weight] = torch.nn.Parameter(torch.empty_like(weight, device=CARD))
                module._parameters[name] = moved[weight]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=CARD)


def _quantised(linear: torch.nn.Linear) -> Any:
    """A `Linear4bit`; its own constructor wraps weights in a class that fake tensors cannot be."""
    layer = bnb.nn.Linear4bit.__new__(bnb.nn.Linear4bit)
    torch.nn.Module.__init__(layer)
    layer.in_features, layer.out_features = linear.in_features, linear.out_features
    layer.bias = linear.bias
    layer.quant_storage = torch.uint8
    layer.compute_dtype, layer.compute_type_is_set = torch.float16, True
    layer.support_avx512bf16_for_cpu = False
    packed = torch.empty(linear.weight.numel() // 2, 1, dtype=torch.uint8, device=CARD)
    layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    layer.weight.quant_state = layer.quant_state = _quant_state(linear.weight.shape)
    layer.weight.quant_type, layer.weight.compress_statistics = "nf4", True  # PEFT asks for them
    return layer


def _quant_state(shape: torch.Size) -> QuantState:
    """NF4 in blocks of 64; their scales in 8 bits, in blocks of 256 with fp32 scales."""
    blocks = shape.numel() // 64
    scales = QuantState(
        absmax=torch.empty(-(-blocks // 256), device=CARD),
        blocksize=256,
        code=torch.empty(256, device=CARD),
        dtype=torch.float32,
    )
    return QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8, device=CARD),
        shape=shape,
        dtype=torch.float16,
        blocksize=64,
        code=torch.empty(16, device=CARD),
        quant_type="nf4",
        offset=torch.empty((), device=CARD),
        state2=scales,
    )
