"""What is frozen before a slot's training, and what the other slots say to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import job
from job.attempts import now
from job.data.prepared import PreparedData
from job.errors import SlotError
from job.ledger import Ledger
from job.log import log
from job.settings import Settings
from job.store.documents import Json
from job.sweep.builtin import Observation
from job.sweep.definition import SweepDefinition
from job.sweep.hyperband import should_stop
from job.training.recipe import Recipe, plan_evaluations, plan_steps
from job.training.state import TrainState


def freeze_spec(
    settings: Settings,
    ledger: Ledger,
    slot: int,
    data: PreparedData,
    params: Mapping[str, Any],
    *,
    measure_step_0: bool,
    wandb: Mapping[str, str],
) -> Json:
    """Write the slot's spec once, whoever drew its parameters; return the one that holds."""
    values: dict[str, Any] = {**settings.hyperparameters, **params}
    planned_steps = plan_steps(
        len(data.train),
        settings.per_device_train_batch_size * values["gradient_accumulation_steps"],
        max_steps=settings.max_steps,
        num_epochs=settings.num_epochs,
    )
    recipe = Recipe(
        **values,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        seed=settings.seed,
        planned_steps=planned_steps,
        eval_steps=plan_evaluations(planned_steps, settings.evals_per_trial),
        patience=settings.patience,
    )
    spec = {
        "params": dict(params),
        "recipe": recipe.to_json(),
        "measure_step_0": measure_step_0,
        "data_digest": data.digest,
        **wandb,
        "code_version": job.__version__,
        "created_at": now(),
    }
    return ledger.specify(slot, spec)


def observe(
    ledger: Ledger, num_trials: int, *, but: int | None = None
) -> tuple[list[Observation], float | None]:
    """What the other slots say, and the untuned model's eval/loss if one of them measured it.

    A damaged slot says nothing, and ends no other slot's trial.
    """
    observations = []
    step_0_loss = None
    for slot in range(num_trials):
        if slot == but:
            continue
        try:
            view = ledger.pin(slot)
            spec, result = view.spec(slot), view.result(slot)
            closed = view.failure(slot) is not None or view.exclusion(slot) is not None
        except SlotError as error:
            log.warning("the engine is not told of a damaged slot: %s", error)
            continue
        if spec is None or closed:
            continue
        result = result or {"status": "running", "eval_loss": None, "curve": []}
        observations.append(
            Observation(slot, spec["params"], result["status"], result["eval_loss"])
        )
        for step, loss in result["curve"][:1]:
            step_0_loss = loss if step == 0 else step_0_loss
    return observations, step_0_loss


def stop_early(
    definition: SweepDefinition, ledger: Ledger, settings: Settings, state: TrainState
) -> str | None:
    """Why the sweep file's `early_terminate` ends this trial; None if it may go on."""
    if definition.early_terminate is None or settings.wandb_sweep_id is not None:
        return None  # W&B's own is told to its agent
    own = [loss for step, loss in state.curve if step > 0]
    others = [
        [loss for step, loss in result["curve"] if step > 0 and loss is not None]
        for _, _, result in ledger.committed(settings.num_trials)
    ]
    if should_stop(definition.early_terminate, own, others):
        return f"early_terminate: among the worse after {len(own)} evaluations"
    return None
