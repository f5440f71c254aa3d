"""Tells files of rows by their names, alike in folders, globs, buckets and prefixes."""

from __future__ import annotations

import fnmatch
import re

_KINDS = {
    ".jsonl": "JSONL",
    ".ndjson": "JSONL",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "CSV",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
}
_COMPRESSED = (".gz", ".gzip", ".zst", ".zstd")


def kind_of(name: str) -> str | None:
    """The kind of rows that a file's name promises, compressed or not."""
    name = name.lower()
    name = next((name.removesuffix(end) for end in _COMPRESSED if name.endswith(end)), name)
    return next((kind for end, kind in _KINDS.items() if name.endswith(end)), None)


def is_glob(text: str) -> bool:
    """Whether `text` has a wildcard."""
    return any(character in text for character in "*?[")


def glob_folder(pattern: str) -> str:
    """The folders before the first wildcard, with their slash; may be empty."""
    literal = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    return literal[: literal.rfind("/") + 1]


def glob_matches(pattern: str, name: str) -> bool:
    """Whether a name fits: `*` and `?` stay within a folder, a whole part `**` spans any number."""
    return _parts_match(pattern.split("/"), name.split("/"))


def _parts_match(patterns: list[str], parts: list[str]) -> bool:
    if not patterns or not parts:
        return not patterns and not parts
    first, *others = patterns
    if first != "**":
        return fnmatch.fnmatchcase(parts[0], first) and _parts_match(others, parts[1:])
    return not others or any(_parts_match(others, parts[k:]) for k in range(len(parts)))
