"""The base model, in 4 bits or 16, with its LoRA adapters."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from job.base_model import other_quantisation
from job.errors import (
    GpuError,
    JobError,
    OutageError,
    SettingsError,
    is_volume_full,
)
from job.hub import explained
from job.ledger.records import Recipe
from job.log import log
from job.training.attention import enable_packed_attention
from job.training.coverage import kept_modules
from job.training.families import PACKED_FAMILIES, is_packed
from job.training.footprint import EVERY_N_LAYERS, Recompute
from job.training.gpu_faults import is_gpu_fault
from job.training.layers import enable_lean_layers
from job.training.lora import enable_lean_lora
from job.training.loss import has_chunked_loss
from job.training.precision import autocast, compute_dtype, normalise_dtype
from job.training.recipe import derive_seed


class TooSmallError(GpuError):
    """The base's weights do not fit the card's free memory."""


# Of the largest logit: above fp16's rounding, below what a token does that sees the one after it.
TOLERANCE = 2e-3


def load_base(
    location: str,
    revision: str | None,
    device: torch.device,
    *,
    quantization: str = "nf4",
    dtype: torch.dtype | None = None,
) -> Any:
    """Load the base model, frozen, in evaluation mode, on `device`.

    Its matrices are in NF4 with double quantisation, or as `quantization` says (`JOB_QUANTIZATION`
    without a plain `mixed`); what is not computes in `dtype`, by default `compute_dtype(device)`,
    as all does. A checkpoint that is in 4 bits already keeps its own weights. Raises
    `SettingsError` if the files do not make a causal language model, `OutageError` if they cannot
    be fetched, `GpuError` if the card fails, `TooSmallError` if it is too small.
    """
    transformers_logging.disable_progress_bar()
    # cuDNN is SDPA's first choice on Hopper and newer, but it makes a plan, in half a second, for
    # every pair of sample length and row length, and packed rows hardly ever repeat one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    dtype = dtype or compute_dtype(device)
    report: list[str] = []
    try:
        with _collected_warnings(report):
            model = _from_files(location, revision or "main", device, quantization, dtype)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _load_error(location, error, "\n".join(report)) from error
    except Exception as error:  # the hub's client lets its HTTP library's own errors through
        if told := _hub_error(location, error):
            raise told from error
        raise
    normalise_dtype(model, dtype)
    model.requires_grad_(False)
    model.config.use_cache = False
    model.eval()
    if not is_packed(model.config.model_type):
        _try_family(location, model)
    return model


def _from_files(
    location: str, revision: str, device: torch.device, quantization: str, dtype: torch.dtype
) -> Any:
    """The model with all of its weights, as transformers loads it.

    Raises `ValueError` for files that are not what a trial needs, and whatever transformers raises.
    """
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(location, **where)
    if (own := getattr(config, "quantization_config", None)) is None:
        where |= _quantisation(config, quantization, dtype)
    elif (method := other_quantisation({"quantization_config": own})) is not None:
        raise ValueError(f"it is quantised already, by {method}, not in bitsandbytes' NF4")
    model, loading = AutoModelForCausalLM.from_pretrained(
        location,
        output_loading_info=True,
        dtype=dtype,
        device_map={"": device},
        attn_implementation="sdpa",
        use_safetensors=True,
        **where,
    )
    if missing := sorted(loading["missing_keys"]) + sorted(loading["mismatched_keys"]):
        raise ValueError(f"its files lack {missing[0]} (and {len(missing) - 1} more)")
    if getattr(model, "peft_config", None):
        raise ValueError("an adapter lies beside it, which transformers loads as well")
    return model


def _quantisation(config: Any, quantization: str, dtype: torch.dtype) -> dict[str, Any]:
    """The argument of `from_pretrained` that quantises 16-bit weights as they are loaded."""
    if quantization == "none":
        return {}
    kept = None if quantization == "nf4" else kept_modules(config.to_dict(), quantization)
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )
    return {"quantization_config": how}


@torch.no_grad()
def _try_family(location: str, model: Any) -> None:
    """Show eight tokens to a model of a family that no test of ours knows, as training will.

    Raises `SettingsError` if it fails, if a token sees those after it, or if positions that are
    given, as they are in training, are other than those that the model counts itself.
    """
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(3, 11, device=device)[None] % model.get_input_embeddings().num_embeddings
    given = {"position_ids": torch.arange(8, device=device)[None], "use_cache": False}
    changed = ids.clone()
    changed[0, -1] = ids[0, 0]
    try:
        with autocast(device, compute_dtype(device)):
            logits = model(input_ids=ids, **given).logits.float()
            counted = model(input_ids=ids, use_cache=False).logits.float()
            other = model(input_ids=changed, **given).logits.float()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if is_gpu_fault(error):
            raise
        first_line = str(error).strip().partition("\n")[0]
        raise _untrainable(location, model, f"its forward pass fails: {first_line}") from error
    limit = TOLERANCE * float(logits.abs().max())
    if float((logits - other)[:, :-1].abs().max()) > limit:
        raise _untrainable(location, model, "its tokens see those after them")
    if float((logits - counted).abs().max()) > limit:
        raise _untrainable(location, model, "it counts positions in a way of its own")


def _untrainable(location: str, model: Any, why: str) -> SettingsError:
    family = model.config.model_type
    return SettingsError(
        f"JOB_BASE_MODEL: {location} ({family}) cannot be trained: {why}; take another base, such"
        " as a Mistral, Llama, Qwen or Phi model"
    )


@contextlib.contextmanager
def _collected_warnings(texts: list[str]) -> Iterator[None]:
    """Collect what transformers warns of: why it could not quantise a weight stands only there."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    logger, collector = transformers_logging.get_logger("transformers"), Collector(logging.WARNING)
    logger.addHandler(collector)
    try:
        yield
    finally:
        logger.removeHandler(collector)


def _load_error(location: str, error: Exception, report: str = "") -> JobError:
    """Tell what a failed load means: this node's disk, network or card, or files that are no model.

    The network, because a hub's weights are downloaded only now: `resolve_base_model` reads no more
    than the config.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return TooSmallError(
            f"JOB_BASE_MODEL: {location} does not fit this GPU's free memory: {error}"
        )
    first_line = str(error).strip().partition("\n")[0]
    if is_volume_full(error):
        return OutageError(f"JOB_BASE_MODEL: no space left for {location}: enlarge JOB_WORK_DIR")
    if told := _hub_error(location, error):
        return told
    if "OutOfMemoryError" in report:
        return TooSmallError(f"JOB_BASE_MODEL: {location} does not fit this GPU's free memory")
    if is_gpu_fault(error) or is_gpu_fault(RuntimeError(report)):
        return GpuError(f"JOB_BASE_MODEL: {location}: this node's GPU failed: {first_line}")
    return SettingsError(
        f"JOB_BASE_MODEL: {location} cannot be loaded as a causal language model: {first_line}"
    )


def _hub_error(location: str, error: Exception) -> JobError | None:
    """What the error says of the hub; None for a folder, and where it says nothing of it."""
    return None if Path(location).is_dir() else explained(error, "JOB_BASE_MODEL", location)


def add_adapters(model: Any, recipe: Recipe) -> Any:
    """Wrap the base in fp32 LoRA adapters on every linear layer except the head.

    The initial weights are a function of the recipe's seed.
    """
    torch.manual_seed(derive_seed(recipe.seed, "adapter"))
    config = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules="all-linear",
        bias="none",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # PEFT sets it right by itself, for GPT-2's layers
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=True)
    enable_lean_lora(peft_model)
    if has_chunked_loss(model):
        enable_packed_attention(model)
        enable_lean_layers(model)
    else:
        log.info(
            "family %s: the plain loss, one sample at a time (packed rows are known to be safe for"
            " %s)",
            model.config.model_type,
            ", ".join(PACKED_FAMILIES),
        )
    for name, parameter in trainable_parameters(peft_model).items():
        assert parameter.dtype == torch.float32, name
    return peft_model


def set_recompute(model: Any, recompute: Recompute) -> None:
    """Have some layers keep no activations from forward to backward, but compute them again."""
    causal_lm = model.get_base_model()
    every = EVERY_N_LAYERS[recompute]
    if every is None:
        causal_lm.activation_checkpointing_disable()
    else:
        causal_lm.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
        # Only reentrant checkpoints need embeddings that require a gradient: with one, backward
        # would go on below the first adapter, where nothing is trained.
        causal_lm.disable_input_require_grads()


def trainable_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, the adapters', by name and in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adapter_state(model: Any) -> dict[str, torch.Tensor]:
    """Copy the adapter's weights to the CPU, in fp32, under the names that PEFT saves them by."""
    state = get_peft_model_state_dict(model)
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file. Raises `OutageError` if the work volume is full."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:  # the library wraps the system's error
        raise OutageError(f"{path} cannot be written ({error}); free or enlarge it") from error


def save_adapter(model: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write `state` in fp16 as a folder that `PeftModel.from_pretrained` can load."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: tensor.to(torch.float16).contiguous() for name, tensor in state.items()}
    write_tensors(folder / "adapter_model.safetensors", half)
    config = {**model.peft_config["default"].to_dict(), "inference_mode": True}
    # Equal adapters have equal bytes: PEFT keeps names in sets, whose order differs by process.
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    (folder / "adapter_config.json").write_text(
        json.dumps(plain, indent=2, sort_keys=True), encoding="utf-8"
    )
