"""The domains a parameter of a sweep can have, and the operations every engine needs on them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

ParamValue: TypeAlias = bool | int | float | str
Params: TypeAlias = dict[str, ParamValue]  # of one trial, by name

# Suggested floats keep 6 significant digits: 9.28688e-05 reads well in a table, and the last bits,
# in which the log, exp and BLAS of two machines may differ, are gone.
SIGNIFICANT_DIGITS = 6


@dataclass(frozen=True)
class Constant:
    """One value: nothing to search."""

    value: ParamValue


@dataclass(frozen=True)
class Choice:
    """Listed values, in the file's order; `probabilities` sum to 1 and hold no zero."""

    values: tuple[ParamValue, ...]
    probabilities: tuple[float, ...] | None = None


@dataclass(frozen=True)
class FloatRange:
    """All floats from `min` to `max`, both included."""

    min: float
    max: float
    log: bool = False


@dataclass(frozen=True)
class SteppedFloats:
    """The floats min, min + step, …, max; `max` lies on the grid."""

    min: float
    max: float
    step: float


@dataclass(frozen=True)
class IntRange:
    """The ints min, min + step, …, max; `max` lies on the grid; `log` only with step 1."""

    min: int
    max: int
    step: int = 1
    log: bool = False


Distribution: TypeAlias = Constant | Choice | FloatRange | SteppedFloats | IntRange


def num_points(domain: Distribution) -> int | None:
    """How many values the domain holds; None when they cannot be counted."""
    match domain:
        case Constant():
            return 1
        case Choice():
            return len(domain.values)
        case FloatRange():
            return None
        case SteppedFloats():
            return round((domain.max - domain.min) / domain.step) + 1
        case IntRange():
            return (domain.max - domain.min) // domain.step + 1


def point(domain: Distribution, index: int) -> ParamValue:
    """The `index`-th value of a countable domain, in the file's or rising order."""
    match domain:
        case Constant():
            return domain.value
        case Choice():
            return domain.values[index]
        case SteppedFloats():
            # 3 * 0.05 is 0.15000000000000002: what a user means has at most 12 digits.
            return float(f"{domain.min + index * domain.step:.12g}")
        case IntRange():
            return domain.min + index * domain.step
        case FloatRange():
            raise AssertionError("a float range cannot be counted")


def quantile(domain: Distribution, share: float) -> ParamValue:
    """The value below which `share` (0 <= share < 1) of the domain's probability lies.

    Drawing `share` uniformly draws from the domain (inverse transform sampling).
    """
    match domain:
        case FloatRange(log=True):
            low, high = math.log(domain.min), math.log(domain.max)
            return rounded(domain, math.exp(low + share * (high - low)))
        case FloatRange():
            return rounded(domain, domain.min + share * (domain.max - domain.min))
        case IntRange(log=True):
            # Every whole number owns the half to either side of it, as W&B's rounding does, but
            # the first and the last are not halved.
            low, high = math.log(domain.min - 0.5), math.log(domain.max + 0.5)
            value = round(math.exp(low + share * (high - low)))
            return min(max(value, domain.min), domain.max)
        case Choice(probabilities=tuple() as probabilities):
            sums = list(accumulate(probabilities))
            index = bisect_right(sums, share * sums[-1])
            return domain.values[min(index, len(domain.values) - 1)]
        case _:
            count = num_points(domain)
            assert count is not None
            return point(domain, int(share * count))


def rounded(domain: FloatRange, value: float) -> float:
    """`value` with 6 significant digits, or as it is where rounding would leave the domain."""
    short = float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    return short if contains(domain, short) else min(max(value, domain.min), domain.max)


def contains(domain: Distribution, value: object) -> bool:
    """Whether `value` is one that the domain can give; True is not 1, but 8.0 is 8."""
    if isinstance(domain, Constant):
        return _equal(domain.value, value)
    if isinstance(domain, Choice):
        return any(_equal(allowed, value) for allowed in domain.values)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if not domain.min <= value <= domain.max:
        return False
    if isinstance(domain, FloatRange):
        return True
    steps = (value - domain.min) / domain.step
    return abs(steps - round(steps)) < 1e-6


def nearest(domain: Distribution, value: object) -> ParamValue:
    """`value` if the domain holds it, else the nearest number (the lower of two), else the first.

    The result is always spelt as the domain spells it: 8.0 in `values: [8, 16]` gives 8.
    """
    number = _as_number(value)
    if isinstance(domain, FloatRange):
        return domain.min if number is None else float(min(max(number, domain.min), domain.max))
    count = num_points(domain)
    assert count is not None
    if isinstance(domain, SteppedFloats | IntRange):
        steps = 0.0 if number is None else (number - domain.min) / domain.step
        return point(domain, min(max(math.ceil(steps - 0.5), 0), count - 1))
    values: Sequence[ParamValue] = [point(domain, index) for index in range(count)]
    for allowed in values:
        if _equal(allowed, value):
            return allowed
    numbers = [allowed for allowed in values if _as_number(allowed) is not None]
    if number is None or not numbers:
        return values[0]
    return min(numbers, key=lambda allowed: (abs(float(allowed) - number), float(allowed)))


def describe(domain: Distribution) -> str:
    """The domain in a person's words: `1e-06 to 0.1, log scale`."""
    match domain:
        case Constant():
            return str(domain.value)
        case Choice():
            return ", ".join(str(value) for value in domain.values)
        case FloatRange():
            return f"{domain.min:g} to {domain.max:g}" + (", log scale" if domain.log else "")
        case SteppedFloats():
            return f"{domain.min:g} to {domain.max:g} in steps of {domain.step:g}"
        case IntRange():
            step = f" in steps of {domain.step}" if domain.step > 1 else ""
            return f"{domain.min} to {domain.max}{step}" + (", log scale" if domain.log else "")


def _equal(left: object, right: object) -> bool:
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def _as_number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)
