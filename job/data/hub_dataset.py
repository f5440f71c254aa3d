"""Rows of a Hugging Face data set, at exactly one commit, through the `datasets` library."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from job.data.readers import table_rows
from job.data.rows import Row, SourceVersion, unusable
from job.errors import (
    CredentialsError,
    JobError,
    OutageError,
    SettingsError,
    causes,
    is_network_failure,
    is_volume_full,
)

SPLIT = "train"
_BATCH_ROWS = 1000
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubDataset:
    """The `Source` protocol on one configuration of a data set; its train split is read."""

    name: str  # owner/name
    config: str | None  # None: the only one, or the one named "default"
    commit: str

    def versions(self) -> list[SourceVersion]:
        return [SourceVersion(f"{self.name}:{self.config or ''}:{SPLIT}", 0, self.commit)]

    def rows(self, should_stop: Callable[[], None]) -> Iterator[Row]:
        should_stop()
        number = 0
        # Arrow tables instead of rows: images and sounds stay the bytes they are.
        for table in self._load().with_format("arrow").iter(batch_size=_BATCH_ROWS):
            for batch in table.to_batches():
                for columns in table_rows(batch):
                    number += 1
                    place, problem = f"{self.name}:{number}", "" if columns else "not readable"
                    yield Row(place, columns or {}, problem)

    def _load(self) -> Any:
        """The whole split, in the hub library's own cache on disk."""
        from datasets import disable_progress_bars, load_dataset_builder

        disable_progress_bars()
        with _explained(self.name, self.commit):
            unreachable = _unreachable(self.name, self.commit)
            try:
                builder = load_dataset_builder(self.name, self.config, revision=self.commit)
            except Exception as error:
                if unreachable is None:
                    raise
                # What the disk's cache lacks must not pass for what is wrong with the data set.
                raise ConnectionError(str(unreachable)) from error
            if builder.hash != self.commit:
                # Where the hub does not answer, `datasets` takes any commit that it has on disk.
                raise ConnectionError(f"only commit {builder.hash} is on this disk")
            builder.download_and_prepare()
            return builder.as_dataset(split=SPLIT)


def find_dataset(name: str, *, config: str | None, revision: str | None) -> HubDataset:
    """Find the data set's commit; `revision` needs no network where it is a commit in full.

    Raises `SettingsError` if the hub does not know it, `CredentialsError` if it is gated, and
    `OutageError` if the hub cannot be reached.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return HubDataset(name, config, revision)
    from huggingface_hub import HfApi  # 0.4 s to import, and not for files

    with _explained(name, revision):
        commit = HfApi().dataset_info(name, revision=revision, timeout=30).sha
    assert commit is not None
    return HubDataset(name, config, commit)


@contextmanager
def _explained(where: str, revision: str | None) -> Iterator[None]:
    """Tell the hub's failures apart, which `datasets` wraps in errors of its own."""
    from huggingface_hub import errors

    try:
        yield
    except JobError:
        raise
    except Exception as error:  # `datasets` lets everything through that its readers raise
        behind = list(causes(error))
        said = " ".join(str(error).split())[:300]
        if any(isinstance(cause, errors.GatedRepoError) for cause in behind) or "a gated" in said:
            raise CredentialsError(
                f"JOB_DATASET_URI: {where} is gated: accept its licence and set HF_TOKEN"
            ) from error
        missing = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
        if any(isinstance(cause, missing) for cause in behind):
            at = "" if revision is None else f" at revision {revision}"
            raise SettingsError(
                f"JOB_DATASET_URI: {where}{at} is neither a path here nor on the Hugging Face hub; "
                "check the spelling, or set HF_TOKEN if it is private"
            ) from error
        if is_network_failure(error) or is_volume_full(error):
            raise OutageError(
                f"JOB_DATASET_URI: {where} is no path here, and the Hugging Face hub cannot be "
                f"reached or read ({type(error).__name__}: {said}); try again, or give files"
            ) from error
        way_out = f"give owner/name:config of a data set with a split {SPLIT!r}"
        raise unusable(where, f"cannot be loaded ({said})", way_out) from error


def _unreachable(name: str, commit: str) -> Exception | None:
    """Why the hub does not answer (`datasets` then looks at its own disk); None if it does."""
    from huggingface_hub import HfApi, errors

    try:
        HfApi().dataset_info(name, revision=commit, timeout=30)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except Exception as error:
        if is_network_failure(error) or is_volume_full(error):
            return error
        raise
    return None
