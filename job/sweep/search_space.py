"""A sweep's search space as the engine sees it: axes to measure along, points to choose from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from job.sweep.distributions import (
    Choice,
    Distribution,
    FloatRange,
    IntRange,
    Params,
    ParamValue,
    num_points,
    point,
    quantile,
)
from job.sweep.gaussian_process import Array, LengthPrior
from job.sweep.opening import RATE

DOUBLED = {"lora_r", "lora_alpha", "gradient_accumulation_steps"}  # a step is a factor of two
RATE_LENGTH = LengthPrior((0.6, 0.6), 0.5)  # decades
# Steps of a listed value. Most parameters but the rate matter little, so half of the draws have
# long lengths; the other half guards against the sweeps where they do matter.
STEP_LENGTH = LengthPrior((5.0, 1.0), 0.8)
STEPS_OF_A_RANGE = 4.0  # a range is as long as a list of five values

FINE_CELLS = 48  # of the learning rate, or of the first range where it is not searched
COARSE_CELLS = 8  # of every further range
MAX_LISTED = 10  # whole numbers up to this many are all candidates
MAX_COMBINATIONS = 128  # of all but the finest axis; more are sampled


@dataclass(frozen=True)
class Axis:
    """A searched parameter as a length: its values in steps; unordered ones are a step apart."""

    name: str
    place: Callable[[ParamValue], float]
    is_ordered: bool = True
    length: LengthPrior = STEP_LENGTH


def axes(domains: Mapping[str, Distribution]) -> list[Axis]:
    """The axes of the parameters that can take more than one value, in the order of `domains`."""
    return [_axis(name, d) for name, d in domains.items() if num_points(d) != 1]


def places(along: Sequence[Axis], points: Sequence[Mapping[str, ParamValue]]) -> Array:
    """Where points lie: (points, axes), in steps."""
    found = [[axis.place(params[axis.name]) for axis in along] for params in points]
    return np.array(found, dtype=np.float64).reshape(len(points), len(along))


def gaps(along: Sequence[Axis], left: Array, right: Array) -> Array:
    """How far apart points (n, axes) and (m, axes) lie along each axis: (n, m, axes), in steps."""
    distance = np.abs(left[:, None, :] - right[None, :, :])
    ordered = np.array([axis.is_ordered for axis in along], dtype=bool)
    return np.where(ordered, distance, distance > 0)


def candidates(
    domains: Mapping[str, Distribution],
    *,
    tried: Sequence[Mapping[str, ParamValue]],
    around: Sequence[Mapping[str, ParamValue]],
    seed: int,
) -> list[Params]:
    """Points to choose the next one from, none of them `tried`; `seed` moves those within ranges.

    Every combination of the values of all axes; of a range, one value out of each of its cells and
    both ends. Where there are too many combinations, a sample of them, with those of the points
    `around` which to look and their neighbours along one axis.
    """
    random = np.random.default_rng(seed)
    fine = _finest(domains)
    values = {
        name: _values(d, FINE_CELLS if name == fine else COARSE_CELLS, random)
        for name, d in domains.items()
    }
    others = [name for name in domains if name != fine]
    rests = _combinations(others, values, around, random)
    taken = {_key(domains, params) for params in tried}
    found = []
    for rest in rests:
        for value in values[fine] if fine is not None else [None]:
            params = rest if value is None else rest | {str(fine): value}
            if _key(domains, params) not in taken:
                found.append({name: params[name] for name in domains})
    return found


def _combinations(
    names: Sequence[str],
    values: Mapping[str, Sequence[ParamValue]],
    around: Sequence[Mapping[str, ParamValue]],
    random: np.random.Generator,
) -> list[Params]:
    if math.prod(len(values[name]) for name in names) <= MAX_COMBINATIONS:
        every = itertools.product(*(values[name] for name in names))
        return [dict(zip(names, combination, strict=True)) for combination in every]
    found: dict[tuple[ParamValue, ...], None] = {}  # an ordered set
    for params in around:
        at = tuple(params[name] for name in names)
        found[at] = None
        for index, name in enumerate(names):
            for value in values[name]:
                found[(*at[:index], value, *at[index + 1 :])] = None
    for _ in range(MAX_COMBINATIONS):
        drawn = (values[name][int(random.random() * len(values[name]))] for name in names)
        found[tuple(drawn)] = None
    return [dict(zip(names, combination, strict=True)) for combination in found]


def _finest(domains: Mapping[str, Distribution]) -> str | None:
    ranges = [name for name, domain in domains.items() if not _is_listed(domain)]
    return RATE if RATE in ranges else next(iter(ranges), None)


def _is_listed(domain: Distribution) -> bool:
    count = num_points(domain)
    return isinstance(domain, Choice) or (count is not None and count <= MAX_LISTED)


def _values(domain: Distribution, cells: int, random: np.random.Generator) -> list[ParamValue]:
    if _is_listed(domain):
        return [point(domain, index) for index in range(num_points(domain) or 0)]
    shares = (np.arange(cells) + random.random(cells)) / cells
    ends = (domain.min, domain.max)  # type: ignore[union-attr]
    return list(dict.fromkeys([ends[0], *(quantile(domain, s) for s in shares.tolist()), ends[1]]))


def _axis(name: str, domain: Distribution) -> Axis:
    if isinstance(domain, Choice):
        return _listed_axis(name, domain.values)
    assert not isinstance(domain, FloatRange) or domain.min < domain.max
    low, high = float(domain.min), float(domain.max)  # type: ignore[union-attr]
    if name == RATE and low > 0:
        return Axis(name, _log(10), length=RATE_LENGTH)
    if name in DOUBLED and low > 0:
        return Axis(name, _log(2))
    count = num_points(domain)
    steps = STEPS_OF_A_RANGE if count is None else min(count - 1.0, STEPS_OF_A_RANGE)
    if isinstance(domain, FloatRange | IntRange) and domain.log:
        return Axis(name, _between(math.log(low), math.log(high), steps, math.log))
    return Axis(name, _between(low, high, steps, float))


def _listed_axis(name: str, values: Sequence[ParamValue]) -> Axis:
    if any(isinstance(value, str | bool) for value in values):
        return Axis(name, lambda value: float(values.index(value)), is_ordered=False)
    if name == RATE and min(values) > 0:  # type: ignore[operator]
        return Axis(name, _log(10), length=RATE_LENGTH)
    if name in DOUBLED and min(values) > 0:  # type: ignore[operator]
        return Axis(name, _log(2))
    rising = sorted(float(value) for value in values)
    return Axis(name, lambda value: float(rising.index(float(value))))


def _log(base: int) -> Callable[[ParamValue], float]:
    return lambda value: math.log(float(value), base)


def _between(
    low: float, high: float, steps: float, scale: Callable[[float], float]
) -> Callable[[ParamValue], float]:
    return lambda value: steps * (scale(float(value)) - low) / (high - low)


def _key(
    domains: Mapping[str, Distribution], params: Mapping[str, ParamValue]
) -> tuple[ParamValue | None, ...]:
    return tuple(params.get(name) for name in domains)
