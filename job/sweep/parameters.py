"""One entry under `parameters:` of a sweep file: from W&B's spelling to a checked domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from job.sweep.distributions import (
    Choice,
    Constant,
    Distribution,
    FloatRange,
    IntRange,
    ParamValue,
    SteppedFloats,
)
from job.sweep.hyperparameters import Hyperparameter
from job.sweep.mistakes import (
    Complain,
    as_yaml_number,
    nearest_name,
    not_a_number,
    number_at,
    one_of,
)

# W&B's schema: what each distribution needs; `q` may always be left out.
DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = {
    "constant": ("value",),
    "categorical": ("values",),
    "categorical_w_probabilities": ("values", "probabilities"),
    "uniform": ("min", "max"),
    "int_uniform": ("min", "max"),
    "q_uniform": ("min", "max"),
    "log_uniform": ("min", "max"),
    "log_uniform_values": ("min", "max"),
    "q_log_uniform_values": ("min", "max"),
}
KEYS = ("distribution", "value", "values", "probabilities", "min", "max", "q")

# A longer list of numbers than this is a mistake.
MAX_POINTS = 10_000


def parse_parameter(
    key: str, spec: object, *, hyperparameter: Hyperparameter | None, complain: Complain
) -> Distribution | None:
    """The domain that `spec` describes; None, with a complaint made, where it describes none.

    Every value is checked against the hyper-parameter, when that is known.
    """
    if not isinstance(spec, Mapping):
        word = "values" if isinstance(spec, list) else "value"
        complain(key, f"is {spec!r}, not a mapping: write {word}: {spec!r} under it")
        return None
    name = _distribution_name(key, spec, complain)
    if name is None or not _keys_are_right(key, spec, name, complain):
        return None
    spelt = hyperparameter.spelt if hyperparameter else _as_it_is
    if name == "constant":
        domain: Distribution | None = Constant(spelt(spec["value"]))
    elif name.startswith("categorical"):
        domain = _choice(key, spec, spelt, complain)
    else:
        domain = _range(key, spec, name, complain)
    if domain is None or hyperparameter is None:
        return domain
    if isinstance(domain, Constant | Choice):
        return domain if _values_fit(key, domain, hyperparameter, complain) else None
    return domain if _ends_fit(key, domain, name, hyperparameter, complain) else None


def _as_it_is(value: Any) -> Any:
    return value


def _distribution_name(key: str, spec: Mapping[str, Any], complain: Complain) -> str | None:
    """The `distribution:` of the entry, or the one W&B infers without it."""
    if "distribution" in spec:
        name = spec["distribution"]
        if isinstance(name, str) and name in DISTRIBUTIONS:
            return name
        names = tuple(DISTRIBUTIONS)
        near = nearest_name(name, names)
        complain(f"{key}.distribution", f"{name!r} is not supported{near}; {one_of(names)}")
        return None
    if "value" in spec:
        return "constant"
    if "values" in spec:
        return "categorical_w_probabilities" if "probabilities" in spec else "categorical"
    if "min" in spec and "max" in spec:
        return "int_uniform" if _is_int(spec["min"]) and _is_int(spec["max"]) else "uniform"
    unknown = "".join(
        f"; {found} is not a key{nearest_name(found, KEYS)}" for found in spec if found not in KEYS
    )
    complain(key, f"says no value: give value, values, or min and max{unknown}")
    return None


def _keys_are_right(key: str, spec: Mapping[str, Any], name: str, complain: Complain) -> bool:
    needed = DISTRIBUTIONS[name]
    allowed = (*needed, "q") if name.startswith("q_") else needed
    missing = [wanted for wanted in needed if wanted not in spec]
    extra = [found for found in spec if found not in (*allowed, "distribution")]
    for wanted in missing:
        complain(f"{key}.{wanted}", f"is missing: {name} needs {' and '.join(needed)}")
    for found in extra:
        if found not in KEYS:
            complain(f"{key}.{found}", f"is not a key{nearest_name(found, KEYS)}; {one_of(KEYS)}")
        elif found == "q":
            complain(f"{key}.q", "goes with distribution: q_uniform or q_log_uniform_values only")
        else:
            complain(f"{key}.{found}", f"does not go with {name}, which takes {', '.join(allowed)}")
    return not missing and not extra


def _choice(
    key: str, spec: Mapping[str, Any], spelt: Callable[[Any], Any], complain: Complain
) -> Choice | None:
    given = spec["values"]
    if not isinstance(given, list) or not given:
        complain(f"{key}.values", f"is {given!r}: write a list of at least one value, as [4, 8]")
        return None
    values = [spelt(value) for value in given]
    twice = [index for index, value in enumerate(values) if value in values[:index]]
    for index in twice:
        value, first = given[index], given[values.index(values[index])]
        told = "stands there twice" if value == first else f"means the same as {first!r}"
        complain(f"{key}.values", f"{value!r} {told}: keep one")
    if "probabilities" not in spec:
        return None if twice else Choice(tuple(values))
    chances = spec["probabilities"]
    if not isinstance(chances, list) or len(chances) != len(values):
        complain(f"{key}.probabilities", f"must be a list of {len(values)} numbers, one a value")
        return None
    numbers = [number_at(f"{key}.probabilities", chance, complain) for chance in chances]
    sound = [number for number in numbers if number is not None]
    if len(sound) < len(numbers):
        return None
    if min(sound) <= 0 or not math.isclose(sum(sound), 1, abs_tol=1e-6):
        complain(f"{key}.probabilities", f"{chances} must each be above 0 and sum to 1")
        return None
    return None if twice else Choice(tuple(values), tuple(float(number) for number in sound))


def _range(key: str, spec: Mapping[str, Any], name: str, complain: Complain) -> Distribution | None:
    low = number_at(f"{key}.min", spec["min"], complain)
    high = number_at(f"{key}.max", spec["max"], complain)
    step = number_at(f"{key}.q", spec.get("q", 1), complain)
    if low is None or high is None or step is None:
        return None
    if low >= high:
        complain(key, f"min {low} is not below max {high}: swap them, or write value: {high}")
        return None
    if name in {"log_uniform_values", "q_log_uniform_values"} and low <= 0:
        complain(f"{key}.min", f"is {low}: {name} needs a min above 0")
        return None
    if name == "log_uniform":
        return _exponents(key, low, high, complain)
    if name in {"uniform", "log_uniform_values"}:
        return FloatRange(float(low), float(high), log=name != "uniform")
    return _stepped(key, name, ends=(low, high), step=step, complain=complain)


def _exponents(key: str, low: float, high: float, complain: Complain) -> FloatRange | None:
    if max(abs(low), abs(high)) > 700:  # e^710 overflows, e^-745 is 0
        complain(key, "log_uniform takes base-e exponents; they must lie between -700 and 700")
        return None
    return FloatRange(math.exp(low), math.exp(high), log=True)


def _stepped(
    key: str, name: str, *, ends: tuple[float, float], step: float, complain: Complain
) -> IntRange | SteppedFloats | None:
    low, high = ends
    if name == "q_log_uniform_values" and step != 1:
        complain(f"{key}.q", f"is {step}: q_log_uniform_values is supported with q: 1 only")
        return None
    if step <= 0 or (high - low) / step > MAX_POINTS:
        complain(key, f"gives too many values: {MAX_POINTS} at most, with q above 0")
        return None
    # W&B rounds draws to multiples of q, its grid counts up from min: alike only on multiples.
    if name != "int_uniform" and not all(_is_multiple(end, step) for end in (low, high)):
        complain(key, f"min {low} and max {high} must be multiples of q, {step}")
        return None
    if _is_int(low) and _is_int(high) and (_is_int(step) or name == "q_log_uniform_values"):
        return IntRange(int(low), int(high), int(step), log=name == "q_log_uniform_values")
    if name != "q_uniform":
        complain(key, f"{name} needs ints: write min {low} and max {high} without a point")
        return None
    return SteppedFloats(float(low), float(high), float(step))


def _values_fit(
    key: str, domain: Constant | Choice, hyperparameter: Hyperparameter, complain: Complain
) -> bool:
    values: tuple[ParamValue, ...]
    values, word = (
        ((domain.value,), "value") if isinstance(domain, Constant) else (domain.values, "values")
    )
    wrong = [value for value in values if not hyperparameter.accepts(value)]
    for value in wrong:
        if hyperparameter.kind is not str and isinstance(value, str) and as_yaml_number(value):
            complain(f"{key}.{word}", not_a_number(value))
        else:
            complain(f"{key}.{word}", f"is {value!r}; must be {hyperparameter.text}")
    return not wrong


def _ends_fit(
    key: str,
    domain: FloatRange | SteppedFloats | IntRange,
    name: str,
    hyperparameter: Hyperparameter,
    complain: Complain,
) -> bool:
    if hyperparameter.kind is str:
        complain(key, f"cannot be a range: write values, each {hyperparameter.text}")
        return False
    if hyperparameter.kind is int and not isinstance(domain, IntRange):
        complain(key, f"{name} gives fractions: write values or int_uniform; {hyperparameter.text}")
        return False
    wrong = [end for end in ("min", "max") if not hyperparameter.accepts(getattr(domain, end))]
    hint = ""
    if name == "log_uniform":  # the classic slip: log_uniform with min: 5.0e-6
        hint = "; log_uniform takes base-e exponents, log_uniform_values the values themselves"
    for end in wrong:
        value = getattr(domain, end)
        complain(f"{key}.{end}", f"gives {value!r}; must be {hyperparameter.text}{hint}")
    return not wrong


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_multiple(value: float, step: float) -> bool:
    return abs(value / step - round(value / step)) < 1e-6
