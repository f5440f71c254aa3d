"""`warm_up`: the heaviest step that a trial can meet, taken before the first one and undone."""

from __future__ import annotations

import torch

from job.data.samples import SampleTable
from job.log import log
from job.training.loop import easing_on_oom
from job.training.memory import MemoryPlan
from job.training.state import TrainState
from job.training.trainer import Trainer


def warm_up(trainer: Trainer, table: SampleTable, plan: MemoryPlan) -> str | None:
    """Take the heaviest step that the plan allows, ease the plan if it does not fit, undo the step.

    Weights, moments, loss scale and random numbers are then as before; only token budget and
    recompute mode may have changed. Returns None, or why the trial is infeasible: not even the
    longest sample fits the GPU's memory.
    """
    log.info("memory: %s", plan)
    if not plan.warm_up:
        return None
    cuda = [trainer.device] if trainer.device.type == "cuda" else []
    before = trainer.snapshot()
    with torch.random.fork_rng(devices=cuda):
        if cuda:
            torch.cuda.reset_peak_memory_stats(trainer.device)
        try:
            easing_on_oom(trainer, lambda: _heaviest_step(trainer, table))
        except torch.OutOfMemoryError as error:
            return f"the longest sample does not fit the GPU's memory: {error}"
        finally:
            trainer.go_back(before)
    if cuda:
        peak = torch.cuda.max_memory_allocated(trainer.device)
        log.info("memory: the heaviest step took %.2f GiB at its peak", peak / 2**30)
    return None


def _heaviest_step(trainer: Trainer, table: SampleTable) -> None:
    """Take a step of two heaviest micro-batches: the second finds the gradients of the first."""
    heaviest = trainer.heaviest(table)
    trainer.take_step([heaviest, heaviest], TrainState())
