"""Which files of a folder are its rows: those of one kind and, where it has splits, of train."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import yaml

from job.data.file_names import glob_matches, kind_of
from job.data.rows import SUPPORTED, unusable
from job.log import log

CARD = "README.md"  # of a hub data set: its front matter may say which files are which split
CARD_LIMIT_BYTES = 2**20
TRAIN = "train"
_WORDS = {
    "train": TRAIN,
    "training": TRAIN,
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
_WORD = re.compile(rf"(?<![a-z])({'|'.join(_WORDS)})(?![a-z])")
# What `datasets` writes beside the rows of save_to_disk.
_SAVED_SPLITS = "dataset_dict.json"
_BESIDE = re.compile(r"(^|/)((dataset_dict|dataset_info|state)\.json|cache-[^/]*\.arrow)$")
_INDICES = re.compile(r"(^|/)indices[^/]*\.arrow$")
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)


def folder_files(names: Iterable[str], where: object, card: str | None = None) -> list[str]:
    """The names in a folder, at any depth, that are the rows of its train split, of one kind.

    `card` is the text of the folder's README.md. Hidden files, those that begin with an underscore
    (`_SUCCESS`), and what `datasets` keeps beside rows are left out. Raises `DataError` for none,
    for no train split, and for two kinds, which may hold the same rows twice.
    """
    names = list(names)
    shown = [name for name in names if not _is_hidden(name)]
    if any(_INDICES.search(name) for name in shown):
        raise unusable(
            where,
            "chooses its rows by an index file (indices.arrow)",
            "save it again with save_to_disk of datasets 2 or later",
        )
    rows = [name for name in shown if kind_of(name) and not _BESIDE.search(name)]
    if any(kind_of(name) != "JSON" for name in rows):  # .json files beside others are no rows
        rows = [name for name in rows if kind_of(name) != "JSON"]
    if not rows:
        what = "holds no .jsonl, .json, .csv, .parquet or .arrow file"
        what += "" if names else " (it is empty: copy the rows there first)"
        raise unusable(where, what, f"give {SUPPORTED}")
    files = _train_files(rows, shown, where, card)
    if len(kinds := {str(kind_of(name)) for name in files}) > 1:
        what = f"holds both {' and '.join(sorted(kinds))} files"
        raise unusable(where, what, "name one kind with a glob")
    return files


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _train_files(rows: list[str], shown: list[str], where: object, card: str | None) -> list[str]:
    """Those of the rows' files that are the train split; all of them if there are no splits.

    What `save_to_disk` wrote decides, else a data set's card, else a word in a file's name or in
    a folder's. The other splits are named in the log. Raises `DataError` if none is train.
    """
    splits = (
        _splits_of_saved(rows, shown)
        or _splits_of_card(rows, where, card)
        or _splits_of_names(rows)
    )
    others = {split: len(files) for split, files in splits.items() if split != TRAIN}
    if not splits.get(TRAIN):
        raise unusable(
            where,
            f"has no train split, only {', '.join(sorted(others))}",
            "name the files to train on with a glob",
        )
    if others:
        told = ", ".join(
            f"{split} ({count} file{'s' if count > 1 else ''})"
            for split, count in sorted(others.items())
        )
        log.info("data: only the train split of %s is read, not: %s", where, told)
    return sorted(splits[TRAIN])


def _splits_of_saved(rows: list[str], shown: list[str]) -> dict[str, list[str]] | None:
    """Files by split, where `save_to_disk` of several splits made a folder of each."""
    tops = [name[: -len(_SAVED_SPLITS)] for name in shown if name.endswith(_SAVED_SPLITS)]
    if len(tops) != 1:
        return None
    splits: dict[str, list[str]] = {}
    for name in rows:
        if name.startswith(tops[0]):
            splits.setdefault(name[len(tops[0]) :].partition("/")[0], []).append(name)
    return splits


def _splits_of_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Files by split; a name without a split's word is train where no other one is."""
    splits: dict[str, list[str]] = {}
    for name in names:
        found = _WORD.findall(name.lower())
        splits.setdefault(_WORDS[found[-1]] if found else "", []).append(name)
    unnamed = splits.pop("", [])
    if unnamed and TRAIN in splits:
        splits["other"] = unnamed
    elif unnamed:
        splits[TRAIN] = unnamed
    return splits


def _splits_of_card(
    names: list[str], where: object, card: str | None
) -> dict[str, list[str]] | None:
    """Files by split, as a data set's card names them; None if it names none that are here.

    Raises `DataError` if files of several configurations are here and none is the default.
    """
    found = [(config, _splits_of_config(names, config)) for config in _configs(card)]
    found = [(config, splits) for config, splits in found if splits]
    if len(found) > 1:
        choices = ", ".join(str(config.get("config_name")) for config, _ in found)
        found = [(c, s) for c, s in found if c.get("default") or c.get("config_name") == "default"]
        if len(found) != 1:
            way_out = "name the files of one of them with a glob"
            raise unusable(where, f"has several configurations ({choices})", way_out)
        name = found[0][0].get("config_name")
        log.info("data: of the configurations %s of %s %s is read", choices, where, name)
    return found[0][1] if found else None


def _configs(card: str | None) -> list[dict[str, Any]]:
    front = _FRONT_MATTER.search(card or "")
    try:
        matter = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return []
    configs = matter.get("configs") if isinstance(matter, dict) else None
    return [c for c in configs if isinstance(c, dict)] if isinstance(configs, list) else []


def _splits_of_config(names: list[str], config: dict[str, Any]) -> dict[str, list[str]]:
    folder = f"{config['data_dir'].strip('/')}/" if isinstance(config.get("data_dir"), str) else ""
    if "data_files" not in config:
        return _splits_of_names(n for n in names if n.startswith(folder)) if folder else {}
    splits: dict[str, list[str]] = {}
    for split, patterns in _patterns(config["data_files"]):
        wanted = [folder + pattern.removeprefix("./") for pattern in patterns]
        if files := [name for name in names if any(glob_matches(glob, name) for glob in wanted)]:
            splits.setdefault(split, []).extend(files)
    return splits


def _patterns(data_files: object) -> list[tuple[str, list[str]]]:
    """Splits with their globs; files without a split are train."""
    if isinstance(data_files, str):
        return [(TRAIN, [data_files])]
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    found = []
    for item in data_files if isinstance(data_files, list) else []:
        split, path = (
            (item.get("split"), item.get("path")) if isinstance(item, dict) else (TRAIN, item)
        )
        paths = path if isinstance(path, list) else [path]
        found.append((str(split), [str(each) for each in paths]))
    return found
