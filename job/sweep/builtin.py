"""The built-in engine: the parameters for a slot, from what the sweep's other slots have said.

Pure functions: the same (definition, sweep, slot, observations) give the same point, in whatever
process and whatever order the observations come in. Another CPU may differ in a float's last bits;
points have 6 significant digits, gains are compared by as many, and a slot's first written spec
decides anyway.

`bayes` goes through an opening (a ladder of learning rates, and a probe of small adapters), then
asks a Gaussian process which untried point is expected to improve most on the best.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence

from job.sweep.definition import SweepDefinition
from job.sweep.distributions import (
    Distribution,
    Params,
    ParamValue,
    contains,
    num_points,
    point,
    quantile,
)
from job.sweep.observations import Observation, is_better, tell
from job.sweep.opening import Opening

MIN_TOLD_FOR_GP = 2  # one loss says nothing of the scale of losses


def suggest(
    definition: SweepDefinition,
    *,
    slot: int,
    sweep: str,
    observations: Sequence[Observation],
    step0_loss: float | None,
    defaults: Mapping[str, ParamValue],
    largest_rank: int | None = None,
    warm_start: Mapping[str, ParamValue] | None = None,
) -> Params | None:
    """The parameters for `slot`; None when the sweep has nothing left to try.

    `sweep` is the sweep's name and seeds every draw together with `slot`; `step0_loss` is the
    eval/loss of the untrained adapter, nats a token; `defaults` are the settings' values, used by
    the opening for what the sweep names besides rate, rank and alpha. No adapter of a higher
    `lora_r` than `largest_rank` may be uploaded. `warm_start` is another sweep's best point.

    Nothing is left past `run_cap`, past the last point of a grid, or when another slot has every
    point of a countable space: a repeated trial costs hours and says little.
    """
    others = _by_slot(observations, but=slot)
    if why_nothing_left(definition, slot=slot, observations=others) is not None:
        return None
    domains = _domains(definition)
    if definition.method == "grid":
        return _point_at(domains, slot)
    taken = {_key(domains, o.params) for o in others}
    if definition.method == "bayes":
        limit = _feasible_rank(others, largest_rank)
        opening = Opening(domains, defaults, largest_rank=limit, warm_start=warm_start)
        wanted = opening.point(slot, others, step0_loss)
        if wanted is not None and _key(domains, wanted) not in taken:
            return wanted
        best = _most_promising(domains, others, step0_loss, seed=_hash(sweep, slot))
        if best is not None:
            return best[0]
    return _fresh_point(domains, sweep, slot, taken)


def why_nothing_left(
    definition: SweepDefinition, *, slot: int, observations: Sequence[Observation]
) -> str | None:
    """Say why `suggest` has nothing for `slot`; None if it has something."""
    if definition.run_cap is not None and slot >= definition.run_cap:
        return _cap_told(definition.run_cap)
    domains = _domains(definition)
    if (size := _size(domains)) is None:
        return None
    if definition.method == "grid":
        return _size_told(definition, size) if slot >= size else None
    taken = {_key(domains, other.params) for other in _by_slot(observations, but=slot)}
    is_taken = (_key(domains, _point_at(domains, index)) in taken for index in range(size))
    return _size_told(definition, size) if all(is_taken) else None


def most_trials(definition: SweepDefinition) -> tuple[int, str] | None:
    """The number of trials that the sweep can draw, and what limits it; None: any number."""
    size, cap = _size(_domains(definition)), definition.run_cap
    if cap is not None and (size is None or cap <= size):
        return cap, _cap_told(cap)
    return None if size is None else (size, _size_told(definition, size))


def _cap_told(run_cap: int) -> str:
    return f"the sweep's run_cap is {run_cap}"


def _size_told(definition: SweepDefinition, size: int) -> str:
    kind = "grid" if definition.method == "grid" else "sweep"
    return f"the {kind} has {size} {'point' if size == 1 else 'points'}"


def expected_gain(
    definition: SweepDefinition,
    *,
    sweep: str,
    observations: Sequence[Observation],
    step0_loss: float | None,
) -> float | None:
    """The nats of eval/loss that one more trial is expected to gain: the most of any untried point.

    None where the engine cannot say: a sweep that is not `bayes`, too few trials that have ended,
    none that is better than the untrained adapter, or no point left. It overstates the gain by far,
    since the highest of thousands of guesses is one that flatters (benchmarks/sweep.md).
    """
    if definition.method != "bayes":
        return None
    others = _by_slot(observations)
    seed = _hash(sweep, "gain", len(others))
    best = _most_promising(_domains(definition), others, step0_loss, seed=seed)
    return None if best is None else best[1]


def _feasible_rank(others: Sequence[Observation], largest_rank: int | None) -> int | None:
    """The largest `lora_r` that may be feasible: below all that were not."""
    ranks = (o.params.get("lora_r") for o in others if o.status == "infeasible")
    limits = [int(rank) - 1 for rank in ranks if rank is not None]
    return min([*limits, *([] if largest_rank is None else [largest_rank])], default=None)


def _most_promising(
    domains: Mapping[str, Distribution],
    others: Sequence[Observation],
    step0_loss: float | None,
    *,
    seed: int,
) -> tuple[Params, float] | None:
    """The untried point that is expected to gain most, and how much, nats.

    None while the losses say nothing: fewer than two, or none below the untrained adapter's.
    """
    known = [o for o in others if all(contains(d, o.params.get(n)) for n, d in domains.items())]
    told = tell(known, step0_loss)
    if len(told) < MIN_TOLD_FOR_GP or not any(is_better(o, step0_loss) for o in known):
        return None
    from job.sweep.search import most_promising  # numpy and scipy, 0.3 s

    return most_promising(
        domains,
        told,
        running=[o.params for o in known if o.status == "running"],
        tried=[o.params for o in others],
        infeasible=[o.params for o in known if o.status == "infeasible"],
        seed=seed,
    )


def _domains(definition: SweepDefinition) -> dict[str, Distribution]:
    """The parameters by name: W&B sorts them too, and JSON may have changed their order."""
    return dict(sorted(definition.parameters.items()))


def _by_slot(observations: Sequence[Observation], *, but: int | None = None) -> list[Observation]:
    return sorted((o for o in observations if o.slot != but), key=lambda o: o.slot)


def _fresh_point(
    domains: Mapping[str, Distribution],
    sweep: str,
    slot: int,
    taken: set[tuple[ParamValue | None, ...]],
) -> Params:
    """A random point that no other slot has, of a space that has one left."""
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
    points = (_point_at(domains, (start + index) % size) for index in range(size))
    return next(found for found in points if _key(domains, found) not in taken)


def _point_at(domains: Mapping[str, Distribution], index: int) -> Params:
    """The `index`-th point of a countable space, the last name turning fastest."""
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
