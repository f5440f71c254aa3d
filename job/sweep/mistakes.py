"""How the mistakes of a sweep file are found and worded: numbers that are texts, near names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from difflib import get_close_matches

# complain(key, text): collects, so that every mistake of a file is told at once.
Complain = Callable[[str, str], None]

_NUMBER = re.compile(r"([+-]?)(\d*)\.?(\d*)(?:[eE]([+-]?)(\d+))?")


def nearest_name(name: object, names: tuple[str, ...]) -> str:
    """`"; nearest: learning_rate"`, or nothing when no name is near."""
    near = get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    return f"; nearest: {near[0]}" if near else ""


def one_of(names: tuple[str, ...]) -> str:
    """`allowed: bayes, random, grid`."""
    return "allowed: " + ", ".join(names)


def as_yaml_number(text: str) -> str | None:
    """How to write the number that `text` looks like, so that YAML reads it as one.

    YAML 1.1, which PyYAML and so W&B read, wants a point in the mantissa and a sign in the
    exponent: `5e-6` and `5.0e6` are texts, `5.0e-6` and `5.0e+6` are numbers.
    """
    match = _NUMBER.fullmatch(text.strip())
    if match is None or not (match[2] or match[3]):
        return None
    sign, whole, fraction, exponent_sign, exponent = match.groups()
    mantissa = f"{sign}{whole or 0}"
    if exponent is None:
        return f"{mantissa}.{fraction}" if "." in text else mantissa
    return f"{mantissa}.{fraction or 0}e{exponent_sign or '+'}{exponent}"


def number_at(key: str, value: object, complain: Complain) -> int | float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        complain(key, not_a_number(value))
        return None
    return value


def not_a_number(value: object) -> str:
    better = as_yaml_number(value) if isinstance(value, str) else None
    return f"is the text {value!r}: write {better}" if better else f"is {value!r}, not a number"
