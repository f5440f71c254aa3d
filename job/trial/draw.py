"""Whose turn it is to say a slot's parameters: the built-in engine's, or the W&B sweep's."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import job
from job.data.prepared import PreparedData
from job.errors import SlotError
from job.ledger.accounts import now
from job.ledger.ledger import Ledger
from job.ledger.records import Recipe
from job.log import log
from job.settings import Settings
from job.store.documents import Json
from job.sweep.builtin import Observation, suggest
from job.sweep.definition import SweepDefinition
from job.sweep.hyperband import should_stop
from job.training.recipe import plan_evaluations, plan_steps
from job.training.state import TrainState
from job.wandb.agent import AgentRun, draw
from job.wandb.sweeps import SweepPath, wait_until_running


@dataclass(frozen=True)
class Drawn:
    """A slot's frozen spec and, if this attempt drew it from W&B, the run that is open there."""

    spec: Json
    agent_run: AgentRun | None = None


def drawable(
    settings: Settings, ledger: Ledger, slots: list[int], check: Callable[[], None]
) -> list[int]:
    """Those of the open slots that can be worked on: all, unless the W&B sweep gives no more.

    Waits for a paused one. Asked before anything is loaded, and only if a slot is not drawn yet.
    """
    if settings.wandb_sweep_id is None:
        return slots
    drawn = [slot for slot in slots if ledger.spec(slot) is not None]
    if len(drawn) == len(slots) or not wait_until_running(settings, check).is_over:
        return slots
    return drawn


def draw_for(
    settings: Settings,
    definition: SweepDefinition,
    ledger: Ledger,
    slot: int,
    data: PreparedData,
    *,
    check: Callable[[], None],
) -> Drawn | None:
    """Ask the engine for the slot's parameters and freeze them; None if it has no more.

    Whoever freezes first wins: what is returned is what stands in the bucket.
    """
    observations, step_0_loss = observe(ledger, settings.num_trials, but=slot)
    freeze = partial(freeze_spec, settings, ledger, slot, data, measure_step_0=step_0_loss is None)
    if settings.wandb_sweep_id is None:
        params = suggest(
            definition,
            slot=slot,
            sweep=ledger.sweep,
            observations=observations,
            step0_loss=step_0_loss,
            defaults=settings.hyperparameters,
        )
        if params is None:
            return None
        log.info("slot %d: drawn by %s from %d results", slot, definition.method, len(observations))
        return Drawn(freeze(params, wandb={"wandb_run_id": uuid.uuid4().hex[:8]}))

    def begin(params: Mapping[str, Any], run_id: str, path: SweepPath) -> bool:
        frozen = freeze(params, wandb={"wandb_run_id": run_id, "wandb_sweep": str(path)})
        return bool(frozen["wandb_run_id"] == run_id)

    agent_run = draw(settings, definition, begin, should_stop=check)
    spec = ledger.spec(slot)
    if spec is None:
        return None
    if agent_run is not None:
        log.info("slot %d: drawn by W&B sweep %s", slot, agent_run.path)
    return Drawn(spec, agent_run)


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
