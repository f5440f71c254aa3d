"""`fit`: the training of one attempt, from the loaded base model to the best adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from job.data.samples import Tables
from job.errors import GpuError
from job.ledger.records import Recipe
from job.log import log
from job.progress import size
from job.training.device import peak_memory_bytes
from job.training.eta import StepTimer
from job.training.gpu_faults import gpu_faults_told
from job.training.loop import Ending, TrainOutcome, train
from job.training.memory import MemoryPlan
from job.training.model import add_adapters, trainable_parameters
from job.training.recorder import Keeper, Recorder
from job.training.state import HISTORY_FILE, TrainState
from job.training.trainer import Trainer
from job.training.warmup import warm_up


@dataclass(frozen=True)
class FitInputs:
    """What `fit` needs beside the recipe."""

    base: Any  # from load_base()
    tables: Tables
    memory: MemoryPlan
    ending: Ending
    max_adapter_bytes: int
    refuse: Callable[[int], None] = lambda _: None  # an adapter of so many bytes: it may raise
    budget_seconds: float | None = None  # of training clock: for the planned end in the log only
    card: Callable[[TrainState], str] = lambda _: "# LoRA adapter\n"  # writes README.md beside it
    untuned_16bit: float | None = None  # the base's eval/loss in 16 bits; a checkpoint's own holds


@dataclass(frozen=True)
class Fit:
    """How a training run ended, and what it leaves."""

    status: str  # completed, truncated, stopped, diverged or infeasible
    reason: str
    state: TrainState
    history_path: Path  # a JSON line for every optimizer step and evaluation
    peak_memory_bytes: int | None
    rows_path: Path | None = None  # the evaluation at the best step by row; None without one


@gpu_faults_told()
def fit(
    recipe: Recipe, inputs: FitInputs, *, device: torch.device, work_dir: Path, keeper: Keeper
) -> Fit:
    """Train from the keeper's checkpoint or from the start; keep the best adapter.

    Where `ending.should_stop` raises `PreemptedError`, the state after the last optimizer step is
    kept first. An adapter that cannot even be attached beside the base makes the trial infeasible;
    where it was attached in an earlier attempt, it is this node's fault (`GpuError`).
    """
    inputs.ending.should_stop()
    trainer = _attach(recipe, inputs, device, had_room=keeper.resume_dir is not None)
    if trainer is None:
        why = "the adapter does not fit the GPU's memory beside the base: lower lora_r"
        return infeasible(why, work_dir, device)
    timer = StepTimer(recipe, len(inputs.tables.eval.input_ids), inputs.budget_seconds)
    begun = TrainState(untuned_16bit=inputs.untuned_16bit)
    recorder = Recorder(trainer, keeper, work_dir, timer, card=inputs.card, begun=begun)
    reason = _too_large(trainer, inputs)
    # A checkpoint's plan has proved itself. Killed before the first one, an attempt has published
    # nothing that counts, so plans that are timed anew cost the next one seconds and no more.
    if reason is None and keeper.resume_dir is None:
        reason = warm_up(
            trainer, inputs.tables.train, inputs.memory, should_stop=inputs.ending.should_stop
        )
    if reason is not None:
        outcome = TrainOutcome("infeasible", reason, recorder.state)
    else:
        with recorder:
            outcome = train(trainer, inputs.tables, recorder, inputs.ending)
    return Fit(
        status=outcome.status,
        reason=outcome.reason,
        state=outcome.state,
        history_path=recorder.history_path,
        peak_memory_bytes=peak_memory_bytes(device),
        rows_path=recorder.rows_path if recorder.rows_path.exists() else None,
    )


def infeasible(reason: str, work_dir: Path, device: torch.device) -> Fit:
    """The end of a trial that could not begin: what it needs does not fit the GPU's memory."""
    history = work_dir / HISTORY_FILE
    history.touch()
    return Fit("infeasible", reason, TrainState(), history, peak_memory_bytes(device))


def _attach(
    recipe: Recipe, inputs: FitInputs, device: torch.device, *, had_room: bool
) -> Trainer | None:
    """Attach a new adapter to the base model; None if there is no memory for it.

    Raises `GpuError` then, if an earlier attempt `had_room`.
    """
    try:
        return _new_trainer(recipe, inputs, device)
    except torch.OutOfMemoryError as error:
        if had_room:
            raise GpuError(
                "out of GPU memory while attaching the adapter, which had room in an earlier"
                " attempt: another process uses this card, or it is a smaller one"
            ) from error
        return None


def _new_trainer(recipe: Recipe, inputs: FitInputs, device: torch.device) -> Trainer:
    """A trainer of a new adapter on the base model. Raises `torch.OutOfMemoryError`."""
    model = add_adapters(inputs.base, recipe)
    num_parameters = sum(p.numel() for p in trainable_parameters(model).values())
    log.info("adapter: rank %d, %.2f M parameters", recipe.lora_r, num_parameters / 1e6)
    return Trainer(
        model,
        recipe,
        device=device,
        token_budget=inputs.memory.token_budget,
        recompute=inputs.memory.recompute,
    )


def _too_large(trainer: Trainer, inputs: FitInputs) -> str | None:
    """Say why the adapter, saved in fp16, is over its size limit; None if it is not.

    Raises what `inputs.refuse` raises.
    """
    num_bytes = 2 * sum(parameter.numel() for parameter in trainer.parameters)
    if num_bytes <= inputs.max_adapter_bytes:
        return None
    inputs.refuse(num_bytes)
    return (
        f"adapter would be {size(num_bytes)}, limit is {size(inputs.max_adapter_bytes)}:"
        " lower lora_r or raise JOB_MAX_ADAPTER_MB"
    )
