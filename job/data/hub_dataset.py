"""Rows of a Hugging Face data set, at exactly one commit, through the `datasets` library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from job.data.readers import table_rows
from job.data.rows import Row, SourceVersion, unusable
from job.errors import JobError, is_network_failure, is_volume_full
from job.hub import FULL_COMMIT, cached_commit, explained, is_offline, waited_out

SPLIT = "train"
_BATCH_ROWS = 1000


@dataclass(frozen=True)
class HubDataset:
    """The `Source` protocol on one configuration of a data set; its train split is read."""

    name: str  # owner/name
    config: str | None  # None: the only one, or the one named "default"
    commit: str
    outage_seconds: float = 1200  # how long a hub that fails is asked again

    def versions(self) -> list[SourceVersion]:
        return [SourceVersion(f"{self.name}:{self.config or ''}:{SPLIT}", 0, self.commit)]

    def rows(self, should_stop: Callable[[], None]) -> Iterator[Row]:
        should_stop()
        number = 0
        # Arrow tables instead of rows: images and sounds stay the bytes they are.
        split = waited_out(self._load, self.outage_seconds, should_stop)
        for table in split.with_format("arrow").iter(batch_size=_BATCH_ROWS):
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
            except Exception:
                if unreachable is None:
                    raise
                # What the disk's cache lacks must not pass for what is wrong with the data set.
                raise ConnectionError(str(unreachable)) from unreachable
            if builder.hash != self.commit:
                # Where the hub does not answer, `datasets` takes any commit that it has on disk.
                raise ConnectionError(f"only commit {builder.hash} is on this disk")
            builder.download_and_prepare()
            return builder.as_dataset(split=SPLIT)


def find_dataset(
    name: str,
    *,
    config: str | None,
    revision: str | None,
    outage_seconds: float = 1200,
    should_stop: Callable[[], None] = lambda: None,
) -> HubDataset:
    """Find the data set's commit; `revision` needs no network where it is a commit in full.

    Offline (`HF_HUB_OFFLINE`) the commit is the one in the cache. Raises `SettingsError` if the hub
    does not know it, `CredentialsError` if it refuses us, and `OutageError` if it cannot be reached
    for `outage_seconds`.
    """
    if revision is not None and FULL_COMMIT.fullmatch(revision):
        return HubDataset(name, config, revision, outage_seconds)

    def ask() -> str | None:
        from huggingface_hub import HfApi  # 0.4 s to import, and not for files

        with _explained(name, revision):
            return HfApi().dataset_info(name, revision=revision, timeout=30).sha

    commit = cached_commit(name, revision, kind="dataset") if is_offline() else None
    commit = commit or waited_out(ask, outage_seconds, should_stop)
    assert commit is not None
    return HubDataset(name, config, commit, outage_seconds)


@contextmanager
def _explained(where: str, revision: str | None) -> Iterator[None]:
    """Tell the hub's failures apart, which `datasets` wraps in errors of its own."""
    try:
        yield
    except JobError:
        raise
    except Exception as error:  # `datasets` lets everything through that its readers raise
        if told := explained(error, "JOB_DATASET_URI", where, revision):
            raise told from error
        said = " ".join(str(error).split())[:300]
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
