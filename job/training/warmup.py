"""`warm_up`: plans are timed on real rows and the heaviest step is tried; then all is undone."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from job.data.samples import SampleTable
from job.log import log
from job.training.batching import pack, samples_of_step
from job.training.loop import easing_on_oom, with_other_kernels
from job.training.memory import MemoryPlan
from job.training.state import TrainState
from job.training.trainer import ShouldStop, Trainer, never_stop

TIMED_STEPS = 2  # optimizer steps that every plan is timed on; each has one micro-batch or more

Clock = Callable[[], float]


def warm_up(
    trainer: Trainer,
    table: SampleTable,
    plan: MemoryPlan,
    *,
    should_stop: ShouldStop = never_stop,
    clock: Clock = time.monotonic,
) -> str | None:
    """Find the fastest of the plan and its rivals that also takes the heaviest step; undo all.

    Weights, moments, loss scale and random numbers are then as before; only token budget and
    recompute mode may have changed. Where no plan takes the heaviest step, the last one is eased.
    Returns None, or why the trial is infeasible: not even the longest sample fits the GPU's memory.
    Raises what `should_stop` raises.
    """
    log.info("memory: %s", plan)
    if not plan.warm_up:
        return None
    cuda = [trainer.device] if trainer.device.type == "cuda" else []
    before = trainer.snapshot()

    def search() -> None:
        trainer.drop_partial_step()  # of an operation that had no deterministic kernel
        fastest_first = _fastest_first(trainer, table, plan, should_stop, clock)
        _settle(trainer, table, fastest_first, should_stop)

    with torch.random.fork_rng(devices=cuda):
        try:
            with_other_kernels(search)
        except torch.OutOfMemoryError as error:
            return f"the longest sample does not fit the GPU's memory: {error}"
        finally:
            trainer.go_back(before)
    if cuda:
        peak = torch.cuda.max_memory_allocated(trainer.device)
        log.info("memory: the heaviest step took %.2f GiB at its peak", peak / 2**30)
        torch.cuda.reset_peak_memory_stats(trainer.device)  # what follows is the trial's own
    return None


def _fastest_first(
    trainer: Trainer, table: SampleTable, plan: MemoryPlan, should_stop: ShouldStop, clock: Clock
) -> list[MemoryPlan]:
    """Time the plan and its rivals on the same samples; one without a rival needs no timing."""
    if not plan.rivals:
        return [plan]
    rates: list[tuple[float, MemoryPlan]] = []
    for candidate in (plan, *plan.rivals):
        trainer.set_plan(candidate.token_budget, candidate.recompute)
        try:
            rates.append((_tokens_per_second(trainer, table, should_stop, clock), candidate))
        except torch.OutOfMemoryError:
            log.info("speed: %s: out of memory", candidate.words)
        trainer.drop_partial_step()  # also lets go of blocks that suit this plan's rows only
    rates.sort(key=lambda pair: -pair[0])
    for rate, candidate in rates:
        log.info("speed: %s: %.0f tokens/s", candidate.words, rate)
    return [candidate for _, candidate in rates] or [plan]


def _tokens_per_second(
    trainer: Trainer, table: SampleTable, should_stop: ShouldStop, clock: Clock
) -> float:
    """The rate of the first optimizer steps' forward and backward passes, the very first apart."""
    num_tokens, seconds = 0, 0.0
    for step in range(TIMED_STEPS):
        indices = samples_of_step(trainer.recipe, len(table), step)
        batches = list(pack(table, indices, trainer.row_budget))
        num_targets = table.targets_of(indices)
        if step == 0:  # kernels are loaded and memory is taken at their first use
            float(trainer.accumulate(batches[:1], num_targets, should_stop))
        started = clock()
        float(trainer.accumulate(batches, num_targets, should_stop))  # waits for the GPU
        seconds += clock() - started
        num_tokens += sum(batch.num_tokens for batch in batches)
    return num_tokens / seconds


def _settle(
    trainer: Trainer, table: SampleTable, plans: list[MemoryPlan], should_stop: ShouldStop
) -> None:
    """Set the first plan that takes the heaviest step, or the last one, eased until it does."""
    *others, last = plans
    for plan in others:
        trainer.set_plan(plan.token_budget, plan.recompute)
        try:
            _heaviest_step(trainer, table)
        except torch.OutOfMemoryError:
            log.info("memory: %s: the heaviest step does not fit", plan.words)
        else:
            break
        trainer.drop_partial_step()  # here, as inside the handler the step's tensors are alive
        should_stop()
    else:
        trainer.set_plan(last.token_budget, last.recompute)
        easing_on_oom(trainer, lambda: _heaviest_step(trainer, table))
    if len(plans) > 1:
        taken = MemoryPlan(trainer.token_budget, trainer.recompute)
        log.info("plan: %s", taken.words)


def _heaviest_step(trainer: Trainer, table: SampleTable) -> None:
    """Take a step of two heaviest micro-batches: the second finds the gradients of the first."""
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    heaviest = trainer.heaviest(table)
    trainer.take_step([heaviest, heaviest], TrainState())
