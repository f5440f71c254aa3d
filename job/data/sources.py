"""Where rows come from: `JOB_DATASET_URI` as a path, a bucket or a Hugging Face data set."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from job.data.bucket_files import BucketFiles, list_bucket
from job.data.file_names import kind_of
from job.data.hub_dataset import HubDataset, find_dataset
from job.data.local_files import LocalFiles, list_files
from job.data.rows import SUPPORTED
from job.errors import SettingsError
from job.file_uri import path_of

# owner/name, owner/name:config, owner/name@revision, owner/name:config@revision
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:@([\w./-]+))?", re.ASCII)


def open_source(
    uri: str,
    cache_dir: Path,
    *,
    outage_seconds: float = 1200,
    should_stop: Callable[[], None] = lambda: None,
) -> LocalFiles | BucketFiles | HubDataset:
    """List the data set's files; nothing is read or downloaded yet.

    A bucket's objects come to `cache_dir` when they are read. Raises `SettingsError` for a URI
    that is not supported, `DataError` if there is nothing to read, and what the bucket or the hub
    raises.
    """
    scheme, separator, _ = uri.partition("://")
    if not uri or "\0" in uri:
        raise SettingsError(f"JOB_DATASET_URI is not a path: give {SUPPORTED}")
    if separator and scheme.lower() in ("s3", "gs", "az"):
        return list_bucket(uri, cache_dir, outage_seconds)
    if match := hub_id(uri):
        name, config, revision = match.groups()
        return find_dataset(
            name,
            config=config,
            revision=revision,
            outage_seconds=outage_seconds,
            should_stop=should_stop,
        )
    return list_files(_local_path(uri))


def hub_id(uri: str) -> re.Match[str] | None:
    """The parts of a data set's id; None for anything that is, or looks like, a path.

    What exists here is a path, and so is what names a kind of file: `data/rows.jsonl` is a
    mistyped path rather than a data set of that name.
    """
    match = _HUB_ID.fullmatch(uri)
    looks_like_path = uri.startswith((".", "~")) or kind_of(uri) or os.path.lexists(uri)
    return None if looks_like_path else match


def _local_path(uri: str) -> Path:
    scheme, separator, _ = uri.partition("://")
    if not separator:
        return Path(uri)
    try:
        path = path_of(uri)
    except ValueError as error:
        raise SettingsError(f"JOB_DATASET_URI: {uri} {error}") from error
    if path is None:  # only the scheme is shown: the rest may hold a password
        raise SettingsError(f"JOB_DATASET_URI: {scheme}:// is not supported: give {SUPPORTED}")
    return path
