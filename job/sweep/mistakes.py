"""Finds and words the mistakes of a sweep file: numbers that are texts, names that are near."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from difflib import get_close_matches

# complain(key, text) collects a mistake, so that all of a file are told at once.
Complain = Callable[[str, str], None]

_NUMBER = re.compile(r"([+-]?)(\d*)\.?(\d*)(?:[eE]([+-]?)(\d+))?")


def nearest_name(name: object, names: tuple[str, ...]) -> str:
    """A hint such as `"; nearest: learning_rate"`; "" when no name is near."""
    near = get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    return f"; nearest: {near[0]}" if near else ""


def one_of(names: tuple[str, ...]) -> str:
    """The allowed names in words: `allowed: bayes, random, grid`."""
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
    """The value if it is a finite number; else None, with a complaint made."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        complain(key, not_a_number(value))
        return None
    return value


def not_a_number(value: object) -> str:
    """The complaint about a value that is no number; how to write it, if it looks like one."""
    better = as_yaml_number(value) if isinstance(value, str) else None
    return f"is the text {value!r}: write {better}" if better else f"is {value!r}, not a number"
