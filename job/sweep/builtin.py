"""The built-in engine: the parameters for a slot, from what the sweep's other slots have said.

Pure functions: the same (definition, sweep, slot, observations) give the same point, in whatever
process. Optuna's GP may differ between CPUs in last bits; 6 significant digits hide nearly all of
that, and a slot's first written spec decides anyway.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from job.sweep.definition import SweepDefinition
from job.sweep.distributions import (
    Distribution,
    FloatRange,
    ParamValue,
    contains,
    nearest,
    num_points,
    point,
    quantile,
    rounded,
)
from job.sweep.gaussian_process import gp_point

Params: TypeAlias = dict[str, ParamValue]

# A GP fitted to one loss knows nothing of its scale.
MIN_TOLD_FOR_GP = 2


@dataclass(frozen=True)
class Observation:
    """What is known so far of another slot of the sweep."""

    slot: int
    params: Mapping[str, ParamValue]
    status: str  # completed | truncated | stopped | diverged | infeasible | running
    eval_loss: float | None


def suggest(
    definition: SweepDefinition,
    *,
    slot: int,
    sweep: str,
    observations: Sequence[Observation],
    step0_loss: float | None,
    defaults: Mapping[str, ParamValue],
    largest_rank: int | None = None,  # noqa: ARG001
    warm_start: Params | None = None,
) -> Params | None:
    """The parameters for `slot`; None when the sweep has nothing left to try.

    `sweep` is the sweep's name and seeds every draw together with `slot`; `step0_loss` is the
    eval/loss of the untrained adapter, nats a token; `defaults` are the settings' values, used by
    the learning-rate ladder for what the sweep names besides the rate.

    Nothing is left past `run_cap`, past the last point of a grid, or when another slot has every
    point of a countable space: a repeated trial costs hours and says little.
    """
    if definition.run_cap is not None and slot >= definition.run_cap:
        return None
    # W&B sorts the names too; and a mapping that has been through JSON may have changed its order.
    domains = dict(sorted(definition.parameters.items()))
    if definition.method == "grid":
        return _point_at(domains, slot)
    others = sorted((o for o in observations if o.slot != slot), key=lambda o: o.slot)
    wanted: Params | None = None
    if definition.method == "bayes":
        ladder = learning_rate_ladder(domains, defaults)
        if warm_start is not None:
            ladder[1:2] = [warm_start]
        if slot < len(ladder):
            wanted = ladder[slot]
        elif slot > len(ladder):  # the slot just after the ladder is drawn at random
            wanted = _learned_point(domains, others, step0_loss, seed=_hash(sweep, slot) % 2**32)
    taken = {_key(domains, o.params) for o in others}
    if wanted is not None and _key(domains, wanted) not in taken:
        return wanted
    return _fresh_point(domains, sweep, slot, taken)


def expected_gain(
    definition: SweepDefinition,
    *,
    sweep: str,  # noqa: ARG001
    observations: Sequence[Observation],
    step0_loss: float | None,
    defaults: Mapping[str, ParamValue],  # noqa: ARG001
    largest_rank: int | None = None,  # noqa: ARG001
    warm_start: Params | None = None,  # noqa: ARG001
) -> float | None:
    """Nats of eval/loss that one more trial is expected to gain.

    None where the engine does not say: not `bayes`, a sweep with too few ended trials for a GP, or
    no point left.
    """
    losses = [loss for _, loss in told_losses(observations, step0_loss)]
    if definition.method != "bayes" or len(losses) < MIN_TOLD_FOR_GP:
        return None
    return statistics.pstdev(losses) / 10  # stands in for the expected improvement


def learning_rate_ladder(
    domains: Mapping[str, Distribution], defaults: Mapping[str, ParamValue]
) -> list[Params]:
    """The first trials of `bayes`: a third, all and a ninth of the highest learning rate.

    The rate decides most of a LoRA trial's loss, so three rates, the other hyper-parameters at
    their defaults, tell a GP more than random points do. Rates below the range are dropped; there
    is no ladder where `learning_rate` is not searched on a log scale.
    """
    rate = domains.get("learning_rate")
    if not (isinstance(rate, FloatRange) and rate.log):
        return []
    usual = {name: nearest(domain, defaults.get(name)) for name, domain in domains.items()}
    rates = [rate.max / share for share in (3, 1, 9) if rate.max / share >= rate.min]
    return [usual | {"learning_rate": rounded(rate, value)} for value in rates]


def told_losses(
    observations: Sequence[Observation], step0_loss: float | None
) -> list[tuple[Observation, float]]:
    """The loss the GP is told for each slot that has ended.

    It is no worse than the untrained adapter's loss: how far above it a bad learning rate ends says
    nothing about the good ones, and would flatten them for the GP. A diverged or infeasible slot
    counts as that loss; while it is unknown, as the worst loss told, or it is left out.
    """
    ended = [o for o in observations if o.status != "running"]
    limit = math.inf if step0_loss is None else step0_loss
    measured = {o.slot: _loss(o) for o in ended}
    told = {slot: min(loss, limit) for slot, loss in measured.items() if loss is not None}
    worst = step0_loss if step0_loss is not None else max(told.values(), default=None)
    losses = ((o, told.get(o.slot, worst)) for o in ended)
    return [(o, loss) for o, loss in losses if loss is not None]


def _loss(observation: Observation) -> float | None:
    if observation.status in {"diverged", "infeasible"} or observation.eval_loss is None:
        return None
    return observation.eval_loss if math.isfinite(observation.eval_loss) else None


def _learned_point(
    domains: Mapping[str, Distribution],
    others: Sequence[Observation],
    step0_loss: float | None,
    *,
    seed: int,
) -> Params | None:
    """The GP's suggestion; None while too few slots have ended to fit one."""
    known = [o for o in others if all(contains(d, o.params.get(n)) for n, d in domains.items())]
    told = told_losses(known, step0_loss)
    if len(told) < MIN_TOLD_FOR_GP:
        return None
    return gp_point(
        domains,
        ended=[(o.params, loss) for o, loss in told],
        running=[o.params for o in known if o.status == "running"],
        seed=seed,
    )


def _fresh_point(
    domains: Mapping[str, Distribution],
    sweep: str,
    slot: int,
    taken: set[tuple[ParamValue | None, ...]],
) -> Params | None:
    """A random point that no other slot has; None when a countable space has none left."""
    for draw in range(100):
        drawn = {
            name: quantile(domain, (_hash(sweep, slot, name, draw) >> 11) / 2**53)  # below 1
            for name, domain in domains.items()
        }
        if _key(domains, drawn) not in taken:
            return drawn
    size = _size(domains)
    if size is None:
        return drawn  # floats: 100 draws that are all taken do not happen
    start = _hash(sweep, slot)
    for index in range(len(taken) + 1):  # of one point more than are taken, one is free
        found = _point_at(domains, (start + index) % size) if index < size else None
        if found is not None and _key(domains, found) not in taken:
            return found
    return None


def _point_at(domains: Mapping[str, Distribution], index: int) -> Params | None:
    """The `index`-th point of the grid, the last name turning fastest; None past the last."""
    size = _size(domains)
    assert size is not None, "the definition lets only countable domains into a grid"
    if index >= size:
        return None
    found: Params = {}
    for name in reversed(list(domains)):
        index, remainder = divmod(index, num_points(domains[name]) or 1)
        found[name] = point(domains[name], remainder)
    return {name: found[name] for name in domains}


def _size(domains: Mapping[str, Distribution]) -> int | None:
    counts = [num_points(domain) for domain in domains.values()]
    return None if None in counts else math.prod(count or 1 for count in counts)


def _key(
    domains: Mapping[str, Distribution], params: Mapping[str, ParamValue]
) -> tuple[ParamValue | None, ...]:
    return tuple(params.get(name) for name in domains)


def _hash(*parts: str | int) -> int:
    """64 bits that are the same in every process, unlike Python's own hash of a text."""
    text = json.dumps(parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
