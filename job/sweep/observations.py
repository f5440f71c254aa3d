"""What is known of a sweep's slots, and what the engine is told of their losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from job.sweep.distributions import ParamValue


@dataclass(frozen=True)
class Observation:
    """What is known so far of another slot of the sweep."""

    slot: int
    params: Mapping[str, ParamValue]
    status: str  # completed | truncated | stopped | diverged | infeasible | running
    eval_loss: float | None
    untrained_loss: float | None = None  # the base's, if this trial measured it at step 0
    untrained_16bit: float | None = None  # the same with its weights in 16 bits
    measures_16bit: bool = False  # whether it has measured that, or is the one to do so


@dataclass(frozen=True)
class Told:
    """What the engine is told of a slot that has ended."""

    params: Mapping[str, ParamValue]
    loss: float  # nats a token
    is_sure: bool  # not of a trial that failed or was stopped early


def tell(observations: Sequence[Observation], step0_loss: float | None) -> list[Told]:
    """What the engine is told of each slot that has ended.

    A loss is no worse than the untrained adapter's: how far above it a bad learning rate ends says
    nothing about the good ones, and would flatten them for the GP. A diverged or infeasible slot
    counts as that loss; while it is unknown, as the worst loss told, or it is left out.
    """
    ended = [o for o in observations if o.status != "running"]
    limit = math.inf if step0_loss is None else step0_loss
    measured = [_loss(o) for o in ended]
    known = [min(loss, limit) for loss in measured if loss is not None]
    worst = step0_loss if step0_loss is not None else max(known, default=None)
    told = []
    for observation, loss in zip(ended, measured, strict=True):
        is_sure = loss is not None and observation.status not in {"stopped"}
        value = worst if loss is None else min(loss, limit)
        if value is not None:
            told.append(Told(observation.params, value, is_sure))
    return told


def _loss(observation: Observation) -> float | None:
    if observation.status in {"diverged", "infeasible"} or observation.eval_loss is None:
        return None
    return observation.eval_loss if math.isfinite(observation.eval_loss) else None


def is_better(observation: Observation, step0_loss: float | None) -> bool:
    """Whether the trial learned something: it ended below the untrained adapter's loss."""
    loss = _loss(observation)
    return (
        loss is not None
        and observation.status != "running"
        and (step0_loss is None or loss < step0_loss)
    )
