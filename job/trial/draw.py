"""A slot's parameters: drawn by the built-in engine or the W&B sweep, and frozen in its spec."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import job
from job.data.prepared import PreparedData
from job.errors import SlotError
from job.ledger.accounts import now
from job.ledger.ledger import Ledger
from job.ledger.records import Recipe, Result, Spec
from job.ledger.slot import Slot
from job.log import log
from job.quantization import params_in_one_spelling
from job.settings import Settings
from job.sweep.builtin import most_trials, suggest, why_nothing_left
from job.sweep.definition import SweepDefinition
from job.sweep.observations import Observation
from job.training.recipe import plan_evaluations, plan_steps
from job.trial.slots import drawn_of
from job.trial.weights import quantizations
from job.wandb.agent import AgentRun, draw
from job.wandb.sweeps import SweepPath, wait_until_running

# The other slots' parameters and results, and the untuned model's eval/loss if it is known.
Observed = tuple[list[Observation], float | None]


@dataclass(frozen=True)
class Drawn:
    """A slot's frozen spec and, if this attempt drew it from W&B, the run that is open there."""

    spec: Spec
    agent_run: AgentRun | None = None


def drawable(
    settings: Settings, ledger: Ledger, numbers: list[int], should_stop: Callable[[], None]
) -> list[int]:
    """The open slots that can be worked on: all, or the drawn ones if the W&B sweep gives no more.

    Waits while the W&B sweep is paused. Called before anything is loaded; W&B is asked only if
    one of the slots is not drawn yet.
    """
    if settings.wandb_sweep_id is None:
        return numbers
    drawn = drawn_of(ledger, numbers)
    if len(drawn) == len(numbers) or not wait_until_running(settings, should_stop).is_over:
        return numbers
    return drawn


def with_a_point(
    settings: Settings, definition: SweepDefinition, ledger: Ledger, numbers: list[int]
) -> tuple[list[int], str | None]:
    """Those of the open slots that are drawn or can be, and why the built-in engine has no others.

    Called before anything is loaded. W&B says itself what its sweep has left.
    """
    limit = None if settings.wandb_sweep_id is not None else most_trials(definition)
    if limit is None or limit[0] >= settings.num_trials:
        return numbers, None
    observations, _ = observe(ledger, settings.num_trials)
    left, why = drawn_of(ledger, numbers), None
    for number in set(numbers).difference(left):
        reason = why_nothing_left(definition, slot=number, observations=observations)
        if reason is None:
            left.append(number)
        why = reason or why
    return sorted(left), why


def draw_for(
    slot: Slot,
    settings: Settings,
    definition: SweepDefinition,
    data: PreparedData,
    observed: Observed,
    *,
    largest_rank: int | None,
    should_stop: Callable[[], None],
) -> Drawn | None:
    """Ask the engine for the slot's parameters and freeze them; None if it has no more.

    `observed` is what the other slots say. Whoever freezes first wins: what is returned is what
    stands in the bucket.
    """
    observations, step_0_loss = observed
    freeze = partial(freeze_spec, slot, settings, data, observations, definition=definition)
    if settings.wandb_sweep_id is not None:
        return _draw_from_wandb(slot, settings, definition, freeze, should_stop)
    identity = slot.ledger.identity()
    warm_start = identity.warm_start if identity else None
    params = suggest(
        definition,
        slot=slot.number,
        sweep=slot.ledger.sweep,
        observations=observations,
        step0_loss=step_0_loss,
        defaults=settings.hyperparameters,
        largest_rank=largest_rank,
        warm_start=warm_start.params if warm_start else None,
    )
    if params is None:
        return None
    num_ended = sum(other.status != "running" for other in observations)
    log.info("slot %d: drawn by %s, results so far: %d", slot.number, definition.method, num_ended)
    return Drawn(freeze(params, run_id=uuid.uuid4().hex[:8]))


def _draw_from_wandb(
    slot: Slot,
    settings: Settings,
    definition: SweepDefinition,
    freeze: Callable[..., Spec],
    should_stop: Callable[[], None],
) -> Drawn | None:
    def begin(params: Mapping[str, Any], run_id: str, path: SweepPath) -> bool:
        frozen = freeze(params, run_id=run_id, wandb_sweep=str(path))
        return frozen.wandb_run_id == run_id

    agent_run = draw(settings, definition, begin, should_stop=should_stop)
    spec = slot.spec()
    if spec is None:
        return None
    if agent_run is not None:
        log.info("slot %d: drawn by W&B sweep %s", slot.number, agent_run.path)
    return Drawn(spec, agent_run)


def freeze_spec(
    slot: Slot,
    settings: Settings,
    data: PreparedData,
    observations: Sequence[Observation],
    params: Mapping[str, Any],
    *,
    definition: SweepDefinition,
    run_id: str,
    wandb_sweep: str | None = None,
) -> Spec:
    """Write the slot's spec once, whoever drew its parameters; return the one that holds.

    It measures the untrained model as well, unless one of the `observations` has, in its precision;
    and in 16 bits, unless a slot does so or the sweep draws them anyway.
    """
    values = params_in_one_spelling({**settings.hyperparameters, **params})
    asked = values["quantization"]
    if asked == "mixed":
        identity = slot.ledger.identity()
        values["quantization"] = (identity and identity.mixed) or asked
    spec = Spec(
        params=dict(params),
        recipe=_recipe(settings, len(data.train), values),
        **_untuned(settings, definition, observations, asked),
        data_digest=data.digest,
        wandb_run_id=run_id,
        code_version=job.__version__,
        created_at=now(),
    )
    if wandb_sweep is not None:
        spec = spec.changed(wandb_sweep=wandb_sweep)
    return slot.specify(spec)


def _recipe(settings: Settings, num_rows: int, values: Mapping[str, Any]) -> Recipe:
    """The recipe of a trial with these hyper-parameters on so many rows."""
    planned_steps = plan_steps(
        num_rows,
        settings.per_device_train_batch_size * values["gradient_accumulation_steps"],
        max_steps=settings.max_steps,
        num_epochs=settings.num_epochs,
    )
    return Recipe(
        **values,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        seed=settings.seed,
        planned_steps=planned_steps,
        eval_steps=plan_evaluations(planned_steps, settings.evals_per_trial),
        patience=settings.patience,
    )


def _untuned(
    settings: Settings,
    definition: SweepDefinition,
    observations: Sequence[Observation],
    quantization: str,
) -> dict[str, Any]:
    """What a new slot's spec says of the untuned base: what to measure, and what is known."""
    known = {
        o.params.get("quantization", settings.quantization): o.untrained_loss
        for o in observations
        if o.untrained_loss is not None
    }
    in_16 = (o.untrained_16bit for o in observations if o.untrained_16bit is not None)
    in_16_anyway = "none" in quantizations(settings, definition)
    return {
        "measure_step_0": quantization not in known,
        "measure_16bit": not (in_16_anyway or any(o.measures_16bit for o in observations)),
        "untuned": known.get(quantization),
        "untuned_16bit": next(in_16, known.get("none")),
    }


def observe(ledger: Ledger, num_trials: int, *, but: int | None = None) -> Observed:
    """What the slots say to the engine, all but the one that is to be drawn.

    Where the untuned model's loss is known in several precisions, it is the highest: no loss below
    it is cut off. A damaged slot says nothing, and ends no other slot's trial.
    """

    def read(slot: Slot) -> tuple[Spec, Result | None, bool] | None:
        if (spec := slot.spec()) is None:
            return None
        result = slot.result()
        return spec, result, slot.failure() is not None or slot.exclusion() is not None

    observations = []
    numbers = [number for number in range(num_trials) if number != but]
    for number, found in ledger.read_slots(numbers, read):
        if isinstance(found, SlotError):
            log.warning("the engine is not told of a damaged slot: %s", found)
            continue
        if found is None:
            continue
        spec, result, is_closed = found
        if not is_closed:
            observations.append(_observation(number, spec, result))
    known = [o.untrained_loss for o in observations if o.untrained_loss is not None]
    return observations, max(known, default=None)


def _observation(number: int, spec: Spec, result: Result | None) -> Observation:
    """What a slot that was drawn says to the engine: how it ended, or that it runs."""
    if result is None:
        return Observation(number, spec.params, "running", None, measures_16bit=spec.measure_16bit)
    untrained = next((loss for step, loss in result.curve[:1] if step == 0), None)
    in_16 = result.untuned_16bit
    # One that did not fit may have ended before it came to measure.
    measures = spec.measure_16bit and (in_16 is not None or result.status != "infeasible")
    return Observation(
        number, spec.params, result.status, result.eval_loss, untrained, in_16, measures
    )
