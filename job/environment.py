"""Reads the settings from the environment: every mistake at once, one line each."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from typing import get_args

from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from job.errors import SettingsError
from job.settings import PREFIX, Settings, variable

_OUT_OF_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def load_settings(**given: str) -> tuple[Settings, list[str]]:
    """Read the environment; return the settings and warnings about unknown variables.

    `given` fields win over the environment: a verb that reads no rows needs no JOB_DATASET_URI.
    Raises `SettingsError` with one line for every mistake in the environment.
    """
    strict = os.environ.get("JOB_STRICT", "").strip().lower() in {
        "1",
        "true",
        "yes",
        "on",
        "t",
        "y",
    }
    errors, warnings = _unknown_variables(os.environ, strict=strict)
    try:
        settings = Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        errors = [*_describe(error), *errors]
    if errors:
        raise SettingsError("\n".join(errors))
    return settings, warnings


def _unknown_variables(environ: Mapping[str, str], *, strict: bool) -> tuple[list[str], list[str]]:
    known = [variable(field) for field in Settings.model_fields]
    errors, warnings = [], []
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name in known:
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if close:
            errors.append(f"{name}: unknown variable; did you mean {close[0]}?")
        elif strict:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            errors.append(
                f"{name}: unknown variable, refused under JOB_STRICT=1; the nearest is {nearest}"
            )
        else:
            warnings.append(f"{name}: unknown variable, ignored")
    return errors, warnings


def _describe(error: ValidationError) -> Iterable[str]:
    for mistake in error.errors(include_url=False):
        message = mistake["msg"].removeprefix("Value error, ")
        if not mistake["loc"]:  # of _check_together: names its variables itself
            yield message
            continue
        field = str(mistake["loc"][0])
        field = next((f for f in Settings.model_fields if field in (f, variable(f))), field)
        if mistake["type"] == "missing":
            needed = Settings.model_fields[field].description
            yield f"{variable(field)}: not set; required: {needed}"
        else:
            yield f"{variable(field)}: {_in_words(mistake, Settings.model_fields[field])}"


def _in_words(mistake: ErrorDetails, info: FieldInfo) -> str:
    """What is wrong with a value, and what is allowed, each said once."""
    if mistake["type"] == "value_error":  # our own words; a URI that is refused may hold a secret
        return mistake["msg"].removeprefix("Value error, ")
    is_secret = SecretStr in (info.annotation, *get_args(info.annotation))
    given = "is *** (a secret)" if is_secret else f"is {mistake['input']!r:.80}"
    allowed = _allowed(info)
    if allowed and mistake["type"] in _OUT_OF_BOUNDS:
        return f"{given}{allowed}"
    needed = mistake["msg"].removeprefix("Input should be ").partition(", unable to ")[0]
    return f"{given}, must be {needed}{allowed}"


def _allowed(info: FieldInfo) -> str:
    """'; allowed: …' in words, from a numeric field's own bounds; pydantic says the rest."""
    annotations = [info, *get_args(info.annotation)]
    metadata = [
        m for a in annotations for m in getattr(a, "__metadata__", getattr(a, "metadata", []))
    ]
    flat = [m for item in metadata for m in (getattr(item, "metadata", None) or [item])]
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [
        f"{sign} {getattr(m, name)}"
        for m in flat
        for name, sign in signs.items()
        if getattr(m, name, None) is not None
    ]
    return f"; allowed: {' and '.join(bounds)}" if bounds else ""
