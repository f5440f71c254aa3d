"""The work of the costliest trial of a sweep, and the memory it needs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from job.base_model import BaseModel
from job.data.prepared import PreparedData
from job.plan.forecast import Workload
from job.settings import Settings
from job.training.footprint import FP32_CPU, Work, footprint
from job.training.memory import T4_USABLE_BYTES, MemoryPlan, Samples, plan_memory
from job.training.recipe import plan_evaluations, plan_steps
from job.training.shape import model_shape
from job.trial.weights import Costliest


def samples_of(settings: Settings, data: PreparedData, worst: Costliest) -> Samples:
    """What a memory plan needs to know of the rows."""
    per_step = settings.per_device_train_batch_size * max(worst.accumulation)
    return Samples.of(data.train.lengths, per_step)


def usable_bytes_of(settings: Settings) -> int | None:
    """The memory of the card that the settings describe, a T4 if they do not; None: a CPU."""
    if settings.device == "cpu":
        return None
    gib = settings.gpu_memory_gb
    return int(gib * 2**30) if gib else T4_USABLE_BYTES


def memory_of(
    settings: Settings,
    base: BaseModel,
    data: PreparedData,
    worst: Costliest,
    quantization: str = "nf4",
) -> MemoryPlan:
    """The memory plan of a trial on this CPU, or on the card that the settings describe."""
    lengths, samples = data.train.lengths, samples_of(settings, data, worst)
    plan = plan_memory(
        base.config,
        samples,
        lora_r=worst.lora_r,
        lora_dropout=worst.lora_dropout,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        usable_bytes=usable_bytes_of(settings),
        quantization=quantization,
    )
    shape = model_shape(base.config, quantization)
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
