"""Looks at other tools' variables once: mends what is plainly meant, refuses what cannot be.

A secret made from a file ends with a newline, an env file keeps its quotes, a manifest sets empty
values. Each library takes them as they are and fails minutes later, in words of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, MutableMapping
from typing import NamedTuple

_FOREIGN = re.compile(r"(AWS|AZURE|GOOGLE|HF|HUGGING_FACE_HUB|WANDB)_\w+|STORAGE_EMULATOR_HOST")


def _is_number(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


class _Rule(NamedTuple):
    """What the values of some variables must be like."""

    names: str  # a regular expression
    fits: Callable[[str], object]
    needed: str


def _of(names: str, values: str, needed: str) -> _Rule:
    return _Rule(names, re.compile(values).fullmatch, needed)


_RULES = (
    _of(
        r"AWS_ENDPOINT_URL(_\w+)?|AZURE_STORAGE_SERVICE_ENDPOINT|WANDB_BASE_URL"
        r"|HF_ENDPOINT|STORAGE_EMULATOR_HOST",
        r"(?i:https?)://[^/\s]\S*",
        "an address that begins with https:// or http://",
    ),
    _of(  # botocore's own rule (utils.py, validate_region_name)
        r"AWS_(DEFAULT_)?REGION",
        r"(?![0-9]+$)(?!-)[a-zA-Z0-9-]{1,63}(?<!-)",
        "the name of a region, such as eu-west-1",
    ),
    _of(  # wandb's own rule (wandb_settings.py, validate_project)
        "WANDB_PROJECT",
        r"[^/\\#?%:]{1,128}",
        "a project's name alone: at most 128 characters, none of / \\ # ? % : (WANDB_ENTITY names"
        " the team)",
    ),
    _of("WANDB_ENTITY", r"[^/\s]+", "a user's or team's name alone (WANDB_PROJECT is another)"),
    _Rule(
        r"WANDB_\w*(TIMEOUT|TIMEOUT_SECONDS|INTERVAL|SERVICE_WAIT)",
        _is_number,
        "a number of seconds, without a unit",
    ),
    _of(
        r"HF_HUB_(ETAG|DOWNLOAD)_TIMEOUT|AWS_METADATA_SERVICE_TIMEOUT",
        "[0-9]+",
        "a whole number of seconds, without a unit",
    ),
    _of(r"AWS_MAX_ATTEMPTS|AWS_METADATA_SERVICE_NUM_ATTEMPTS", "[0-9]+", "a whole number"),
    _of(
        "AWS_REQUEST_CHECKSUM_CALCULATION|AWS_RESPONSE_CHECKSUM_VALIDATION",
        "(?i:when_(supported|required))",
        "when_supported or when_required",
    ),
    _of("AWS_RETRY_MODE", "legacy|standard|adaptive", "legacy, standard or adaptive"),
    _of(  # they are sent in a header, or sign one
        r"HF_TOKEN|HUGGING_FACE_HUB_TOKEN|WANDB_API_KEY"
        r"|AWS_(ACCESS_KEY_ID|SECRET_ACCESS_KEY|SESSION_TOKEN)",
        "[!-~]+",
        "one word of printable ASCII characters, without blanks or line breaks",
    ),
    _of(
        "AZURE_STORAGE_ACCOUNT",
        r"[\w-]{3,32}",
        "an account's name alone, no address",
    ),
    _of(
        "AZURE_STORAGE_SAS_TOKEN",
        r"\??(?=.*\bsig=)[!-~]+",
        "what Azure shows behind the question mark, such as sv=...&sig=...",
    ),
    _of("AZURE_STORAGE_KEY", "[A-Za-z0-9+/=]+", "an access key of the account, in base64"),
    _of(
        "AZURE_STORAGE_CONNECTION_STRING",
        r"(?=.*=)[!-~ ]+",
        "parts such as AccountName=...;AccountKey=...",
    ),
    _of("GOOGLE_APPLICATION_CREDENTIALS", r"[^{\n]+", "the path of a key file, not the key itself"),
)


def mend(environ: MutableMapping[str, str]) -> tuple[list[str], list[str]]:
    """Mend other tools' variables in `environ`; return a warning for each, and what cannot be.

    Blanks, line breaks and quotes around a value go; an empty variable is removed. All libraries
    and all processes that are started later see the mended values. No value is in the texts.
    """
    warnings, errors = [], []
    for name in sorted(filter(_FOREIGN.fullmatch, environ)):
        value, changes = _mended(environ[name])
        if not value:
            del environ[name]
            warnings.append(f"{name}: is empty and counts as unset")
            continue
        if changes:
            environ[name] = value
            warnings.append(f"{name}: {' and '.join(changes)} around the value removed")
        errors += [
            f"{name}: its value (not shown) cannot be; needed: {rule.needed}"
            for rule in _RULES
            if re.fullmatch(rule.names, name) and not rule.fits(value)
        ]
    return warnings, errors


def _mended(value: str) -> tuple[str, list[str]]:
    """The value without what stands around it, and what that was."""
    changes = []
    bare = value.strip()
    if bare != value:
        changes.append("white space")
    if len(bare) >= 2 and bare[0] == bare[-1] and bare[0] in "\"'":
        changes.append("quotes")
        bare = bare[1:-1].strip()
    return bare, changes
