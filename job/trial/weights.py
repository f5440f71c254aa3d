"""The base's weights for a trial: which precisions a sweep draws, and one of them on the device."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from job.errors import SettingsError
from job.progress import size
from job.quantization import MIXED_ORDER
from job.settings import Settings
from job.sweep.definition import SweepDefinition
from job.sweep.distributions import Choice, Constant, Distribution
from job.training.memory import FILL, RECOMPUTED_SHARE, MemoryPlan, Samples, plan_memory
from job.training.quantization import is_in_4_bits, mixed_of
from job.training.shape import largest_rank, model_shape


class BaseWeights:
    """The base's weights on the device, in one precision at a time."""

    def __init__(self, load: Callable[[str], Any]) -> None:
        self._load = load
        self._model: Any = None
        self._quantization: str | None = None

    def model(self, quantization: str) -> Any:
        """The base in this precision; what was there in another is dropped first.

        Raises what loading raises.
        """
        if quantization != self._quantization:
            if self._quantization is not None:
                self._model = self._quantization = None
                gc.collect()  # modules refer to each other in circles
            self._model = self._load(quantization)
            self._quantization = quantization
        return self._model


@dataclass(frozen=True)
class Costliest:
    """The costliest values that the sweep may draw."""

    lora_r: int
    lora_dropout: float
    accumulation: tuple[int, ...]  # all of them: which takes longest depends on the rows

    @classmethod
    def of(cls, settings: Settings, definition: SweepDefinition) -> Costliest:
        def values(name: str) -> tuple[float, ...]:
            return _values(definition.parameters.get(name), float(getattr(settings, name)))

        return cls(
            lora_r=int(max(values("lora_r"))),
            lora_dropout=max(values("lora_dropout")),
            accumulation=tuple(int(v) for v in values("gradient_accumulation_steps")),
        )


def _values(domain: Distribution | None, setting: float) -> tuple[float, ...]:
    """The values, or the ends, of a searched hyper-parameter; its setting if it is not searched."""
    if domain is None:
        return (setting,)
    if isinstance(domain, Constant):
        return (float(domain.value),)
    if isinstance(domain, Choice):
        return tuple(float(value) for value in domain.values)
    return (float(domain.min), float(domain.max))


def quantizations(settings: Settings, definition: SweepDefinition) -> tuple[str, ...]:
    """The precisions that the sweep may draw, from the one that takes least memory."""
    domain = definition.parameters.get("quantization")
    if isinstance(domain, Constant):
        found = [str(domain.value)]
    elif isinstance(domain, Choice):
        found = [str(value) for value in domain.values]
    else:
        found = [settings.quantization]
    return tuple(sorted(found, key=lambda mode: (mode == "none", mode != "nf4", len(mode), mode)))


def ranks(settings: Settings, definition: SweepDefinition) -> tuple[int, int]:
    """The smallest and the highest `lora_r` that the sweep may draw."""
    found = _values(definition.parameters.get("lora_r"), float(settings.lora_r))
    return int(min(found)), int(max(found))


def check_adapter(
    settings: Settings, definition: SweepDefinition, config: Mapping[str, Any]
) -> None:
    """Refuse a sweep of which no adapter may be uploaded. Raises `SettingsError`.

    Nothing is refused of a family whose adapters are not known beforehand: the first trial of the
    smallest rank ends with the same words.
    """
    smallest, _ = ranks(settings, definition)
    shape, largest = model_shape(config), largest_rank(config, settings.max_adapter_mb * 1e6)
    if shape is not None and largest is not None and smallest > largest:
        num_bytes = 2 * shape.adapter_weights(smallest)
        raise SettingsError(too_large(settings, definition, num_bytes, largest))


def too_large(
    settings: Settings, definition: SweepDefinition, num_bytes: int, largest: int | None = None
) -> str:
    """Say that the sweep's smallest adapter takes so many bytes in fp16, and the ways out.

    `largest` is the highest rank that fits; without it, it is worked out: bytes rise with the rank.
    """
    (smallest, _), limit = ranks(settings, definition), settings.max_adapter_mb
    if largest is None:
        largest = int(limit * 1e6 * smallest // num_bytes)
    is_searched = "lora_r" in definition.parameters
    name = "the sweep's smallest lora_r" if is_searched else "JOB_LORA_R"
    lower = f"lower {name} to {largest}, or " if largest else ""
    return (
        f"JOB_MAX_ADAPTER_MB: the adapter of {name} ({smallest}) would be {size(num_bytes)}, limit"
        f" is {size(limit * 1e6)}: {lower}raise JOB_MAX_ADAPTER_MB to {megabytes(num_bytes)}"
    )


def megabytes(num_bytes: int) -> str:
    """The least `JOB_MAX_ADAPTER_MB`, in tenths, that so many bytes are within."""
    return f"{math.ceil(num_bytes / 1e5) / 10:g}"


def choose_mixed(
    config: Mapping[str, Any],
    samples: Samples,
    *,
    worst: Costliest,
    per_device_train_batch_size: int,
    usable_bytes: int | None,
) -> str:
    """Choose what a plain `mixed` keeps in 16 bits on this card: as much as memory allows.

    That is the longest part of `MIXED_ORDER` with which a trial fits without recomputing more than
    in 4 bits; `nf4` if there is none. A checkpoint in 4 bits stays as it is (`mixed`). Raises
    `SettingsError` for a family whose memory cannot be predicted.
    """
    if is_in_4_bits(config):
        return "mixed"
    if (shape := model_shape(config)) is None:
        raise SettingsError(
            f"JOB_QUANTIZATION: what fits of a {config.get('model_type')} model in 16 bits cannot"
            " be predicted: name the matrices, as mixed:down_proj"
        )

    def plan(mode: str) -> MemoryPlan:
        return plan_memory(
            config,
            samples,
            lora_r=worst.lora_r,
            lora_dropout=worst.lora_dropout,
            per_device_train_batch_size=per_device_train_batch_size,
            usable_bytes=usable_bytes,
            quantization=mode,
        )

    names = [name for name in MIXED_ORDER if name in shape.matrices]
    most = RECOMPUTED_SHARE[plan("nf4").recompute]
    chosen = mixed_of(names)
    while names and not _fits(plan(chosen), most):
        names.pop()
        chosen = mixed_of(names)
    return chosen


def _fits(plan: MemoryPlan, most_recomputed: float) -> bool:
    if plan.predicted is None or plan.usable_bytes is None:  # a CPU
        return True
    is_within = plan.predicted.total <= FILL * plan.usable_bytes
    return is_within and RECOMPUTED_SHARE[plan.recompute] <= most_recomputed
