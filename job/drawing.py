"""Whose turn it is to say a slot's parameters: the built-in engine's, or the W&B sweep's."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from job.data.prepared import PreparedData
from job.ledger import Ledger
from job.log import log
from job.settings import Settings
from job.spec import freeze_spec, observe
from job.store.documents import Json
from job.sweep.builtin import suggest
from job.sweep.definition import SweepDefinition
from job.sweep.wandb import SweepPath, wait_until_running
from job.sweep.wandb_agent import AgentRun, draw


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

    agent_run = draw(settings, definition, begin, check=check)
    spec = ledger.spec(slot)
    if spec is None:
        return None
    if agent_run is not None:
        log.info("slot %d: drawn by W&B sweep %s", slot, agent_run.path)
    return Drawn(spec, agent_run)
