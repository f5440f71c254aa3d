"""The work of the costliest trial of a sweep, and the memory it needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from job.base_model import BaseModel
from job.data.prepared import PreparedData
from job.plan.forecast import Workload
from job.settings import Settings
from job.sweep.definition import SweepDefinition
from job.sweep.distributions import Choice, Constant, Distribution
from job.training.footprint import FP32_CPU, Work, footprint
from job.training.memory import T4_USABLE_BYTES, MemoryPlan, Samples, plan_memory
from job.training.recipe import plan_evaluations, plan_steps
from job.training.shape import model_shape


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


def memory_of(
    settings: Settings, base: BaseModel, data: PreparedData, worst: Costliest
) -> MemoryPlan:
    """The memory plan of a trial on this CPU, or on the card that the settings describe."""
    lengths = data.train.lengths
    per_step = settings.per_device_train_batch_size * max(worst.accumulation)
    samples = Samples(
        longest=int(lengths.max()),
        mean=float(lengths.mean()),
        per_step=per_step,
    )
    gib = settings.gpu_memory_gb
    usable = int(gib * 2**30) if gib else T4_USABLE_BYTES
    plan = plan_memory(
        base.config,
        samples,
        lora_r=worst.lora_r,
        lora_dropout=worst.lora_dropout,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        usable_bytes=None if settings.device == "cpu" else usable,
    )
    shape = model_shape(base.config)
    if settings.device != "cpu" or shape is None:
        return plan
    tokens = min(plan.token_budget, int(np.sort(lengths)[-samples.per_step :].sum()))
    work = Work(tokens, tokens, worst.lora_r, worst.lora_dropout > 0, plan.recompute)
    return replace(plan, predicted=footprint(shape, work, FP32_CPU))


def workloads_of(settings: Settings, data: PreparedData, worst: Costliest) -> tuple[Workload, ...]:
    """The work of a trial with each gradient accumulation; the one that takes longest is last."""
    mean = float(data.train.lengths.mean())
    rows = data.eval.head(settings.eval_rows)
    found = []
    for accumulation in worst.accumulation:
        samples = settings.per_device_train_batch_size * accumulation
        steps = plan_steps(
            len(data.train), samples, max_steps=settings.max_steps, num_epochs=settings.num_epochs
        )
        evaluations = len(plan_evaluations(steps, settings.evals_per_trial))
        eval_tokens = evaluations * int(rows.lengths.sum())
        found.append(Workload(steps, int(steps * samples * mean), eval_tokens))
    return tuple(sorted(found, key=lambda work: (work.train_tokens, work.steps)))
