"""`Recipe`: everything that fixes what a trial computes, as plain data."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Recipe:
    """A trial's hyper-parameters and its planned course. Part of spec.json, so JSON-able."""

    learning_rate: float
    gradient_accumulation_steps: int
    lora_dropout: float
    weight_decay: float
    lora_r: int
    lora_alpha: float
    lr_scheduler: str  # linear, cosine or constant, each after a linear warm-up
    warmup_ratio: float
    max_grad_norm: float
    per_device_train_batch_size: int
    seed: int
    planned_steps: int  # optimizer steps; fixed here, never recomputed from speed
    eval_steps: tuple[int, ...]  # optimizer steps after which eval/loss is measured
    patience: int  # evaluations without improvement before stopping

    @property
    def samples_per_step(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "eval_steps": list(self.eval_steps)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        return cls(**{**content, "eval_steps": tuple(content["eval_steps"])})


def plan_steps(
    num_samples: int, samples_per_step: int, *, max_steps: int, num_epochs: float
) -> int:
    """Optimizer steps of a trial: `num_epochs` passes, at most `max_steps`, at least one."""
    return max(1, min(max_steps, math.floor(num_epochs * num_samples / samples_per_step)))


def plan_evaluations(planned_steps: int, evals_per_trial: int) -> tuple[int, ...]:
    """Steps to evaluate after: equal shares of the planned steps, the last step among them."""
    shares = (math.ceil(planned_steps * k / evals_per_trial) for k in range(1, evals_per_trial + 1))
    return tuple(sorted(set(shares)))


def learning_rate_at(recipe: Recipe, step: int) -> float:
    """The learning rate of optimizer step `step` (the first is 0).

    The same numbers as transformers' `get_scheduler` of that name, whose warm-up is
    `ceil(warmup_ratio * planned_steps)` steps (but never all of them); written as a function of
    the step so that there is no scheduler state to save.
    """
    warmup_steps = math.ceil(recipe.warmup_ratio * recipe.planned_steps)
    warmup_steps = min(warmup_steps, recipe.planned_steps - 1)
    if step < warmup_steps:
        return recipe.learning_rate * step / warmup_steps
    if recipe.lr_scheduler == "constant":
        return recipe.learning_rate
    progress = (step - warmup_steps) / max(1, recipe.planned_steps - warmup_steps)
    if recipe.lr_scheduler == "cosine":
        return recipe.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    assert recipe.lr_scheduler == "linear", recipe.lr_scheduler
    return recipe.learning_rate * max(0.0, 1 - progress)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that is a stable function of `parts` (Python's own hash() is not)."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
