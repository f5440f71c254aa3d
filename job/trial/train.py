"""The real training of a trial: what `fit` is given of an attempt. Imports torch in functions."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.base_model import BaseModel
from job.data.samples import Tables
from job.errors import SettingsError
from job.ledger.records import Recipe
from job.ledger.uploads import Uploads
from job.log import log
from job.process.gpu import preflight
from job.process.imports import import_for_good
from job.settings import Settings
from job.training.memory import MemoryPlan, Samples, plan_memory
from job.training.quantization import words
from job.training.state import TrainState
from job.trial.attempt import Attempt, Training
from job.trial.model_card import Provenance, adapter_card
from job.trial.result import stop_early
from job.trial.untuned import untuned_in_16_bits
from job.trial.weights import ranks, too_large

if TYPE_CHECKING:
    import torch

    from job.training.fit import Fit


def real_training() -> Training:
    """The training with torch, PEFT and bitsandbytes, as `run_trial` uses it."""
    return Training(_open_device, _load_base, _fit, _usable_bytes)


def _open_device(settings: Settings) -> torch.device:
    preflight(settings.device, gpu_memory_gb=settings.gpu_memory_gb)
    # Imported behind it: torch takes seconds, and this node may have no GPU that can be used.
    import_for_good("torch")
    from job.training.device import open_device

    return open_device(settings.device, gpu_memory_gb=settings.gpu_memory_gb)


def _usable_bytes(settings: Settings, device: torch.device) -> int | None:
    from job.training.device import usable_memory_bytes

    return usable_memory_bytes(device, gpu_memory_gb=settings.gpu_memory_gb)


def _load_base(base: BaseModel, device: torch.device, quantization: str) -> Any:
    seconds = import_for_good("job.training.fit")
    if seconds is not None:
        log.info("libraries for training: imported in %.1f s", seconds)
    from job.training.model import load_base

    return load_base(base.location, base.hub_revision, device, quantization=quantization)


def _fit(attempt: Attempt, uploads: Uploads, work_dir: Path) -> Fit:
    """Load the base in the precision that was drawn, and train."""
    from job.training.fit import FitInputs, fit, infeasible
    from job.training.loop import Ending
    from job.training.model import TooSmallError

    settings, loaded, recipe = attempt.settings, attempt.loaded, attempt.spec.recipe
    if attempt.spec.measure_step_0:
        recipe = recipe.changed(eval_steps=(0, *recipe.eval_steps))
    memory = _plan_memory(attempt, recipe)
    try:
        base = _base(attempt, memory)
    except TooSmallError as error:
        if uploads.resume_dir is not None:  # it had room in an earlier attempt
            raise
        return infeasible(str(error), work_dir, loaded.device)
    tables = Tables(loaded.data.train, loaded.data.eval.head(settings.eval_rows))
    measures = attempt.spec.measure_16bit and uploads.resume_dir is None
    inputs = FitInputs(
        base=base,
        tables=tables,
        memory=memory,
        untuned_16bit=untuned_in_16_bits(attempt, tables.eval) if measures else None,
        ending=Ending(
            should_stop=attempt.should_stop,
            out_of_time=attempt.clock.out_of_time,
            stop_asked=attempt.stop_asked,
            hopeless=partial(_hopeless, attempt),
        ),
        max_adapter_bytes=int(settings.max_adapter_mb * 1e6),
        refuse=partial(refuse_too_large, attempt),
        budget_seconds=settings.trial_budget_hours * 3600,
        card=partial(_card, attempt),
    )
    return fit(recipe, inputs, device=loaded.device, work_dir=work_dir, keeper=uploads)


def refuse_too_large(attempt: Attempt, num_bytes: int) -> None:
    """Raise `SettingsError` for an adapter over the limit if no trial can have a smaller one.

    Committed as infeasible, it would only be the first of a sweep's: where families are known,
    `check_adapter` refuses it before the base is loaded.
    """
    settings, definition = attempt.settings, attempt.definition
    if attempt.spec.recipe.lora_r <= ranks(settings, definition)[0]:
        raise SettingsError(too_large(settings, definition, num_bytes))


def _base(attempt: Attempt, memory: MemoryPlan) -> Any:
    """The base in the precision that was drawn. Raises `TooSmallError`."""
    from job.training.model import TooSmallError

    quantization, begun = attempt.spec.recipe.quantization, time.monotonic()
    predicted, usable = memory.predicted, memory.usable_bytes
    if predicted is not None and usable is not None and predicted.weights > usable:
        raise TooSmallError(
            f"the base in {words(quantization)} does not fit the GPU's memory: its weights take"
            f" {predicted.weights / 2**30:.1f} GiB of {usable / 2**30:.1f}"
        )
    model = attempt.loaded.weights.model(quantization)
    attempt.clock.load_seconds += time.monotonic() - begun
    return model


def _plan_memory(attempt: Attempt, recipe: Recipe) -> MemoryPlan:
    settings, loaded = attempt.settings, attempt.loaded
    return plan_memory(
        loaded.base.config,
        Samples.of(loaded.data.train.lengths, recipe.samples_per_step),
        lora_r=recipe.lora_r,
        lora_dropout=recipe.lora_dropout,
        per_device_train_batch_size=recipe.per_device_train_batch_size,
        usable_bytes=_usable_bytes(settings, loaded.device),
        quantization=recipe.quantization,
    )


def _card(attempt: Attempt, state: TrainState) -> str:
    base, data = attempt.loaded.base, attempt.loaded.data
    origin = Provenance(
        base_model=base.name,
        base_model_revision=base.revision,
        sweep=attempt.slot.ledger.sweep,
        slot=attempt.slot.number,
        recipe=attempt.spec.recipe.to_json(),
        data_digest=data.digest,
        train_rows=len(data.train),
        eval_rows=min(len(data.eval), attempt.settings.eval_rows),
    )
    spec = attempt.spec
    untuned = next((loss for step, loss in state.curve if step == 0), spec.untuned)
    in_16 = spec.untuned_16bit if state.untuned_16bit is None else state.untuned_16bit
    return adapter_card(
        origin,
        eval_loss=state.best_loss,
        step=state.step,
        untuned=untuned,
        untuned_16bit=in_16,
    )


def _hopeless(attempt: Attempt, state: TrainState) -> str | None:
    """Say why `early_terminate` ends the trial, or None; a failing store may be waited for."""
    with attempt.watchdog.phase("the store", outage_minutes=attempt.settings.outage_minutes):
        return stop_early(attempt.definition, attempt.slot.ledger, attempt.settings, state)
