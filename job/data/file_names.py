"""Tells files of rows by their names, alike in folders, globs, buckets and prefixes."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

from job.data.rows import SUPPORTED, unusable

_KINDS = {
    ".jsonl": "JSONL",
    ".ndjson": "JSONL",
    ".json": "JSON",
    ".csv": "CSV",
    ".parquet": "Parquet",
}
_COMPRESSED = (".gz", ".gzip", ".zst", ".zstd")


def kind_of(name: str) -> str | None:
    """The kind of rows that a file's name promises, compressed or not."""
    name = name.lower()
    name = next((name.removesuffix(end) for end in _COMPRESSED if name.endswith(end)), name)
    return next((kind for end, kind in _KINDS.items() if name.endswith(end)), None)


def folder_files(names: Iterable[str], where: object) -> list[str]:
    """The names in a folder, at any depth, that are files of its one kind of rows.

    Hidden files and those that begin with an underscore (`_SUCCESS`) are left out. Raises
    `DataError` for none, and for two kinds, which may hold the same rows twice.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        if any(part.startswith((".", "_")) for part in name.split("/")):
            continue
        if kind := kind_of(name):
            found.setdefault(kind, []).append(name)
    if len(found) > 1:
        found.pop("JSON", None)  # dataset_info.json and the like, beside the rows
    if len(found) > 1:
        kinds = " and ".join(sorted(found))
        raise unusable(where, f"holds both {kinds} files", "name one kind with a glob")
    if not found:
        raise unusable(where, "holds no .jsonl, .json, .csv or .parquet file", f"give {SUPPORTED}")
    return next(iter(found.values()))


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
