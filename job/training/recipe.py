"""What follows from a trial's recipe: its steps, evaluations, learning rates and seeds."""

from __future__ import annotations

import hashlib
import math

from job.ledger.records import Recipe


def plan_steps(
    num_samples: int, samples_per_step: int, *, max_steps: int, num_epochs: float
) -> int:
    """Plan a trial's optimizer steps: `num_epochs` passes, at most `max_steps`, at least one."""
    return max(1, min(max_steps, math.floor(num_epochs * num_samples / samples_per_step)))


def plan_evaluations(planned_steps: int, evals_per_trial: int) -> tuple[int, ...]:
    """Choose the steps to evaluate after: equal shares of the planned steps, up to the last."""
    shares = (math.ceil(planned_steps * k / evals_per_trial) for k in range(1, evals_per_trial + 1))
    return tuple(sorted(set(shares)))


def learning_rate_at(recipe: Recipe, step: int) -> float:
    """Compute the learning rate of optimizer step `step` (the first is 0).

    The numbers are those of transformers' `get_scheduler` of that name, with a warm-up of
    `ceil(warmup_ratio * planned_steps)` steps (but never all of them). As a function of the step it
    has no state to save.
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
    """Derive a 63-bit seed from `parts`, the same in every process (Python's hash() is not)."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
