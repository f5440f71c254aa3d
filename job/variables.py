"""The environment read into `Settings`: every mistake in it at once, a line for each."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import get_args

from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from job.environment import mend
from job.errors import SettingsError
from job.settings import PREFIX, Settings, variable

# Settings of earlier versions, each with what to use instead.
GONE = {
    "JOB_NUM_GPUS": "a trial trains on one GPU; `job queue` with JOB_WORKERS=auto runs one on each",
}

# One pair of quotes around all of a text: in it only escaped ones, and those within a word.
_IN_QUOTES = re.compile(r"""(["'])(?:\\.|\b\1\b|(?!\1)[^\\])+\1""", re.DOTALL)
_OUT_OF_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def load_settings(**given: str) -> tuple[Settings, list[str]]:
    """Read the environment; return the settings and warnings about its variables.

    Other tools' variables are mended in the environment itself (`job/environment.py`): all who
    look at it later see what is meant. `given` fields win over the environment: a verb that reads
    no rows needs no JOB_DATASET_URI.
    Raises `SettingsError` with one line for every mistake in the environment.
    """
    said = os.environ.get("JOB_STRICT", "").strip().lower()
    strict = said in ("1", "true", "yes", "on", "t", "y")
    warnings, errors = mend(os.environ)
    wrong, unknown = _unknown_variables(os.environ, strict=strict)
    errors, warnings = [*wrong, *_doubled(os.environ), *errors], [*unknown, *warnings]
    try:
        settings = Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        errors = [*_describe(error), *errors]
    if errors:
        raise SettingsError("\n".join(errors))
    if settings.use_full_dataset and "subsample_fraction" in settings.model_fields_set:
        warnings.append("JOB_SUBSAMPLE_FRACTION: not used, JOB_USE_FULL_DATASET takes all rows")
    warnings += _quoted(settings)
    return settings, warnings


def _quoted(settings: Settings) -> Iterator[str]:
    """A warning for each text of the prompts that stands in quotes: they may be meant."""
    for field in ("prompt_template", "system_prompt"):
        text = (getattr(settings, field) or "").strip()
        if _IN_QUOTES.fullmatch(text):
            yield (
                f"{variable(field)}: begins and ends with {text[0]}, which is kept and stands in"
                " every prompt (docker --env-file and kubectl --from-env-file remove no"
                " quotes); if the model is not to read them, give the text without them"
            )


def _doubled(environ: Mapping[str, str]) -> Iterator[str]:
    """Settings that are set twice, in capitals and not: which of them counts would be chance."""
    known = {variable(field) for field in Settings.model_fields}
    for name in sorted(environ):
        capitals = name.upper()
        if capitals != name and capitals in known and capitals in environ:
            yield f"{name}: {capitals} is set as well; unset one of them"


def _unknown_variables(environ: Mapping[str, str], *, strict: bool) -> tuple[list[str], list[str]]:
    known = [variable(field) for field in Settings.model_fields]
    errors, warnings = [], []
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name in known:
            continue
        if name in GONE:
            errors.append(f"{name}: is gone: {GONE[name]}")
            continue
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        misspelt = [setting for setting in known if _is_misspelt(name, setting)]
        if misspelt:
            errors.append(f"{name}: unknown variable; did you mean {misspelt[0]}?")
        elif strict:
            errors.append(
                f"{name}: unknown variable, refused under JOB_STRICT=1; the nearest is {nearest}"
            )
        else:
            is_near = difflib.SequenceMatcher(None, name, nearest).ratio() >= 0.8
            hint = f"; the nearest setting is {nearest}" if is_near else ""
            warnings.append(f"{name}: unknown variable, ignored{hint}")
    return errors, warnings


def _is_misspelt(name: str, setting: str) -> bool:
    """Whether a slip of the hand made `name` of `setting`: one edit, or two in a long name.

    Jenkins sets JOB_NAME, JOB_BASE_NAME and JOB_URL, Grid Engine JOB_ID and JOB_SCRIPT (two edits
    from JOB_STRICT), and Kubernetes variables such as JOB_PORT for a service that is called job.
    """
    given, meant = (text.removeprefix(PREFIX).replace("_", "") for text in (name, setting))
    return _edits(given, meant) <= (1 if len(meant) < 8 else 2)


def _edits(first: str, second: str) -> int:
    """How many letters to insert, drop, replace or swap with their neighbour (Damerau's distance,
    https://en.wikipedia.org/wiki/Damerau-Levenshtein_distance, each letter edited once)."""
    rows = [list(range(len(second) + 1))]
    for i, a in enumerate(first, 1):
        row = [i]
        for j, b in enumerate(second, 1):
            row.append(min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (a != b)))
            if i > 1 and j > 1 and (a, b) == (second[j - 2], first[i - 2]):
                row[-1] = min(row[-1], rows[-2][j - 2] + 1)
        rows.append(row)
    return rows[-1][-1]


def _describe(error: ValidationError) -> Iterable[str]:
    for mistake in error.errors(include_url=False):
        message = mistake["msg"].removeprefix("Value error, ")
        if not mistake["loc"]:  # of `Settings._check_together`, which names its variables itself
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
