"""The hyper-parameters a sweep may name, and the values each of them can sensibly take."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from job.quantization import QUANTIZATION_PATTERN, QUANTIZATION_WORDS, in_one_spelling

LR_SCHEDULERS = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class Hyperparameter:
    """What values a hyper-parameter may take.

    `kind` int takes only ints, float takes ints too. `allowed` is asked for both ends of a range,
    so the allowed numbers must be one interval. `text` completes "must be …". `spelt` gives the one
    spelling of what may be written in several ways; values are compared in that.
    """

    kind: type[int] | type[float] | type[str]
    allowed: Callable[[Any], bool]
    text: str
    spelt: Callable[[Any], Any] = lambda value: value

    def accepts(self, value: object) -> bool:
        """Whether a trial could train with this value."""
        if self.kind is str:
            return isinstance(value, str) and self.allowed(value)
        kinds = (int,) if self.kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        return self.allowed(value)  # NaN fails every comparison, and so every check below


HYPERPARAMETERS: Mapping[str, Hyperparameter] = MappingProxyType(
    {
        # Below 1: `log_uniform` takes exponents, and 5.0e-6 read as one is e^0.000005 = 1.000005.
        "learning_rate": Hyperparameter(
            float, lambda v: 0 < v < 1, "a number above 0 and below 1, such as 2.0e-4"
        ),
        "gradient_accumulation_steps": Hyperparameter(
            int, lambda v: 1 <= v <= 1024, "a whole number from 1 to 1024"
        ),
        "lora_dropout": Hyperparameter(
            float, lambda v: 0 <= v < 1, "a number from 0 to below 1, such as 0.05"
        ),
        "weight_decay": Hyperparameter(
            float, lambda v: 0 <= v <= 10, "a number from 0 to 10, such as 0.01"
        ),
        "lora_r": Hyperparameter(int, lambda v: 1 <= v <= 1024, "a whole number from 1 to 1024"),
        "lora_alpha": Hyperparameter(
            float, lambda v: 0 < v <= 4096, "a number above 0 and up to 4096, such as 16"
        ),
        "lr_scheduler": Hyperparameter(
            str, lambda v: v in LR_SCHEDULERS, "one of " + ", ".join(LR_SCHEDULERS)
        ),
        "warmup_ratio": Hyperparameter(
            float, lambda v: 0 <= v < 1, "a number from 0 to below 1, such as 0.03"
        ),
        "max_grad_norm": Hyperparameter(
            float, lambda v: 0 < v <= 1000, "a number above 0 and up to 1000, such as 1.0"
        ),
        "quantization": Hyperparameter(
            str,
            lambda v: re.fullmatch(QUANTIZATION_PATTERN, v) is not None,
            QUANTIZATION_WORDS,
            in_one_spelling,
        ),
    }
)
