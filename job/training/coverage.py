"""How much of a base is held in 4 bits and adapted, found on meta tensors: no weight is read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.base import get_keys_to_not_convert

from job.errors import SettingsError
from job.quantization import MIXED_ORDER
from job.training.families import LEAST_SHARE, Coverage, UntrainableError
from job.training.quantization import is_in_4_bits, names_in_16_bits


def coverage(config: Mapping[str, Any], quantization: str = "nf4") -> Coverage:
    """Compute the shares for a config.json. Raises `UntrainableError` with the reason.

    Raises `SettingsError` for a `quantization` that does not go with the base.

    The model is made, quantised and adapted as for training, by the same libraries, but on the meta
    device, where tensors have a shape and no values: a second for a 47B.
    """
    model = _meta_model(config)
    linear = _linear_weights(model)
    total = max(1, sum(linear.values()))
    foreign = _foreign_linear(model)
    if quantization != "none":
        how = _quantization(config, model, quantization)
        quantiser = AutoHfQuantizer.from_config(how, pre_quantized=False)
        quantiser.preprocess_model(model=model, device_map={"": "meta"})
    in_4_bits = {
        name
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit) and name in linear
    }
    quantised = sum(linear[name] for name in in_4_bits) / total
    if quantization == "nf4" and quantised < LEAST_SHARE:
        as_it_is = " (JOB_QUANTIZATION=mixed takes it as it is)" if is_in_4_bits(config) else ""
        raise UntrainableError(
            f"only {quantised:.0%} of its linear weights can be held in 4 bits (needed:"
            f" {LEAST_SHARE:.0%}), those of {_heaviest_kinds(model, linear, in_4_bits)} not"
            f"{as_it_is}"
        )
    adapted = sum(linear.get(name, 0) for name in _adapted(model)) / total
    if adapted < LEAST_SHARE:
        raise UntrainableError(
            f"only {adapted:.0%} of its linear weights would get an adapter (needed:"
            f" {LEAST_SHARE:.0%})"
        )
    if foreign:
        raise UntrainableError(
            f"its {foreign} is a linear layer of its own kind, which PEFT would wrap"
        )
    return Coverage(quantised, adapted)


def kept_modules(config: Mapping[str, Any], quantization: str) -> list[str]:
    """Name the modules that a `mixed:` mode keeps in 16 bits, the head included.

    Raises `SettingsError` for a matrix that the base does not have.
    """
    return _kept(_meta_model(config), quantization)


def _kept(model: Any, quantization: str) -> list[str]:
    names = names_in_16_bits(quantization)
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    head = get_keys_to_not_convert(model)
    there = dict.fromkeys(name.rpartition(".")[2] for name in linear if name not in head)
    if unknown := [name for name in names if name not in there]:
        raise SettingsError(
            f"JOB_QUANTIZATION: the base has no linear layers named {unknown[0]}; there are"
            f" {', '.join(there)}"
        )
    return [*head, *(name for name in linear if name.rpartition(".")[2] in names)]


def _meta_model(config: Mapping[str, Any]) -> Any:
    family = config["model_type"]
    if family not in CONFIG_MAPPING:
        raise UntrainableError(f"this version of transformers knows no family {family}")
    try:
        read = CONFIG_MAPPING[family].from_dict(
            {key: value for key, value in config.items() if key != "quantization_config"}
        )
        _check_decoder(read)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(read, attn_implementation="sdpa")
    except UntrainableError:
        raise
    except Exception as error:  # a family's own code may raise anything
        first_line = str(error).strip().partition("\n")[0]
        if "attention implementation" in first_line:
            raise UntrainableError("transformers has no SDPA path for it") from error
        if "Unrecognized configuration class" in first_line:
            raise UntrainableError("it is no causal language model") from error
        raise UntrainableError(f"it cannot be built from its config.json: {first_line}") from error


def _check_decoder(config: PreTrainedConfig) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise UntrainableError("it is an encoder with a decoder, not a decoder alone")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise UntrainableError("it is an encoder: its tokens see those after them")


def _quantization(config: Mapping[str, Any], model: Any, quantization: str) -> BitsAndBytesConfig:
    if is_in_4_bits(config):
        return BitsAndBytesConfig.from_dict(dict(config["quantization_config"]))
    # Before a plain `mixed` is chosen, all that it can choose is looked at.
    mode = f"mixed:{','.join(_choosable(model))}" if quantization == "mixed" else quantization
    kept = None if mode == "nf4" else _kept(model, mode)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=kept
    )


def _choosable(model: Any) -> list[str]:
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    found = [name for name in MIXED_ORDER if name in names]
    if not found:
        raise SettingsError(
            "JOB_QUANTIZATION: what a plain mixed keeps in 16 bits is not known for this base: name"
            " the matrices, as mixed:down_proj"
        )
    return found


def _linear_weights(model: Any) -> dict[str, int]:
    """Count the weights of everything that multiplies, by module; embeddings and head are none.

    Experts that are one tensor of three dimensions and routers that are no module count as well.
    """
    head = model.get_output_embeddings()
    seen = {id(p) for module in model.modules() if _looks_up(module, head) for p in _own(module)}
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        for parameter in _own(module):
            if parameter.ndim >= 2 and id(parameter) not in seen:
                seen.add(id(parameter))
                found[name] = found.get(name, 0) + parameter.numel()
    return found


def _own(module: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    return module.parameters(recurse=False)


def _looks_up(module: torch.nn.Module, head: Any) -> bool:
    return module is head or isinstance(module, torch.nn.Embedding)


def _heaviest_kinds(model: Any, linear: Mapping[str, int], but: set[str]) -> str:
    """Name the two classes that hold most of the linear weights, those of `but` apart."""
    weights: dict[str, int] = {}
    for name in linear.keys() - but:
        kind = type(model.get_submodule(name)).__name__
        weights[kind] = weights.get(kind, 0) + linear[name]
    return " and ".join(sorted(weights, key=lambda kind: (-weights[kind], kind))[:2])


def _foreign_linear(model: Any) -> str | None:
    """Name a class of linear layers that is not PyTorch's: its forward pass may give anything."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and type(module) not in (
            torch.nn.Linear,
            Conv1D,
        ):
            return type(module).__name__
    return None


def _adapted(model: Any) -> list[str]:
    """Name the modules whose weight gets an adapter, after PEFT was let loose on the model."""
    config = LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM")
    try:
        with warnings.catch_warnings(action="ignore"):  # only a try
            adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    except ValueError as error:
        sentence = str(error).rpartition("] ")[2].partition(". ")[0]
        raise UntrainableError(f"PEFT refuses it: {sentence}") from error
    layers = {
        id(module.get_base_layer())
        for module in adapted.modules()
        if isinstance(module, LoraLayer) and hasattr(module.get_base_layer(), "weight")
    }
    base = adapted.get_base_model()
    return [
        name.removesuffix(".base_layer")
        for name, module in base.named_modules()
        if id(module) in layers
    ]
