"""Token tables prepared once per sweep, kept in the store and on disk under a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from uuid import uuid4

from job.data.build import DataSettings, build_tables
from job.data.rows import Source
from job.data.samples import SampleTable
from job.data.sources import open_source
from job.data.table_files import (
    SCHEMA_VERSION,
    Counts,
    Manifest,
    TableFile,
)
from job.data.table_parquet import read_table
from job.data.tokenisation import Facts, Tokenisation
from job.errors import StoreError, work_dir_error
from job.log import log
from job.store.base import Store, Stored, file_sha256

__all__ = ["Counts", "DataSettings", "PreparedData", "data_digest", "prepare", "stored_tables"]

_PUBLISH_ATTEMPTS = 3  # each is lost only to another pod's manifest, which the next one reads


@dataclass(frozen=True)
class PreparedData:
    """The tables that every trial of a sweep trains on and is judged by."""

    digest: str
    train: SampleTable
    eval: SampleTable
    counts: Counts
    vocabulary: str = ""  # a sha256 of the tokenizer's own tokens and their ids


def prepare(
    settings: DataSettings,
    *,
    tokenisation: Tokenisation,
    store: Store,
    cache_dir: Path,
    should_stop: Callable[[], None],
    frozen_digest: str | None = None,
    outage_seconds: float = 1200,
) -> PreparedData:
    """The prepared data from the store, else from this disk, else built and published.

    `should_stop` is called about once a second while rows are built and raises to end the work.
    What the store's manifest names is the truth: a pod that built the same digest at the same
    time takes the winner's tables. A damaged file is never used: it is built and published again.
    `frozen_digest` is that of the tables which the sweep began with: where an earlier version made
    them of the same rows and settings, they are used as they are.
    Raises `DataError`, `SettingsError`, `OutageError` for a full disk, and `StoreError` where the
    store's tables are damaged and these rows give other ones, or an earlier version's are gone.
    """
    source = open_source(
        settings.dataset_uri, cache_dir, outage_seconds=outage_seconds, should_stop=should_stop
    )
    identity = _identity(settings, source, tokenisation.facts)
    if frozen_digest is not None and frozen_digest == _digest_of_schema_1(settings, identity):
        found = _earlier_tables(store, frozen_digest, cache_dir)
    else:
        digest = _sha256(identity)
        build = partial(
            _build,
            settings,
            source,
            tokenisation,
            folder=cache_dir / "prepared" / digest,
            should_stop=should_stop,
        )
        found = _tables(store, digest, cache_dir, build, should_stop)
    return replace(found, vocabulary=tokenisation.facts.vocabulary)


def _tables(
    store: Store,
    digest: str,
    cache_dir: Path,
    build: Callable[[], Manifest],
    should_stop: Callable[[], None],
) -> PreparedData:
    """The tables from the store, else from this disk, else built; those not from it are published.

    Raises what `build` raises, and `StoreError`.
    """
    folder = cache_dir / "prepared" / digest
    prefix = f"prepared/{digest}"
    own: Manifest | None = None
    for _ in range(_PUBLISH_ATTEMPTS):
        should_stop()
        stored = store.get(f"{prefix}/manifest.json")
        if (found := _from_store(store, stored, prefix, folder)) is not None:
            log.info("data: %s from the store", _summary(found))
            return found
        if own is None:
            own = _from_disk(folder) or build()
        _publish(store, own, stored, prefix, folder)
    raise StoreError(f"{store.uri}/{prefix}: what was published there does not come back whole")


def data_digest(settings: DataSettings, source: Source, facts: Facts) -> str:
    """A sha256 of all that decides the tables, and of nothing that a machine adds (no paths)."""
    return _sha256(_identity(settings, source, facts))


def _digest_of_schema_1(settings: DataSettings, identity: dict[str, object]) -> str | None:
    """The digest under which version 0.1 kept these rows; None with settings it did not have."""
    if settings.prompt_template is not None or settings.system_prompt is not None:
        return None
    earlier = {name: value for name, value in identity.items() if name != "layout"}
    columns = settings.prompt_column and (settings.prompt_column, settings.completion_column)
    return _sha256({**earlier, "schema": 1, "columns": columns})


def _identity(settings: DataSettings, source: Source, facts: Facts) -> dict[str, object]:
    return {
        "schema": SCHEMA_VERSION,
        "sources": source.versions(),
        "layout": settings.layout,
        "tokenizer": facts.fingerprint,
        "template": facts.template,
        "max_seq_length": settings.max_seq_length,
        "seed": settings.seed,
        "subsample_fraction": float(settings.subsample_fraction),
        "eval_fraction": float(settings.eval_fraction),
    }


def _sha256(identity: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def stored_tables(store: Store, digest: str, cache_dir: Path) -> PreparedData | None:
    """The tables that a sweep names, from the store alone; None if they are gone or damaged."""
    prefix = f"prepared/{digest}"
    return _from_store(store, store.get(f"{prefix}/manifest.json"), prefix, cache_dir / prefix)


def _earlier_tables(store: Store, digest: str, cache_dir: Path) -> PreparedData:
    """The tables of a sweep that version 0.1 began; this version would make other ones."""
    found = stored_tables(store, digest, cache_dir)
    if found is None:
        raise StoreError(
            f"{store.uri}/prepared/{digest} is gone or damaged, and this version prepares rows "
            "otherwise than the one that began the sweep: go on with the image that began it, or "
            "start another sweep with another JOB_SWEEP_NAME"
        )
    log.info("data: %s from the store, as the sweep began with them", _summary(found))
    return found


def _from_store(
    store: Store, stored: Stored | None, prefix: str, folder: Path
) -> PreparedData | None:
    """The tables that the store's manifest names; None if they are absent or damaged."""
    manifest = _parse(stored, folder.name)
    if manifest is None:
        return None
    for file in (manifest.train, manifest.eval):
        if not _is_whole(folder / file.name, file) and not _download(store, prefix, file, folder):
            log.warning("data: %s/%s/%s is absent or damaged", store.uri, prefix, file.name)
            return None
    return _load(manifest, folder)


def _parse(stored: Stored | None, digest: str) -> Manifest | None:
    if stored is None:
        return None
    try:
        return Manifest.from_bytes(stored.data, digest=digest)
    except ValueError as error:
        log.warning("data: the manifest of %s is damaged (%s)", digest[:12], error)
        return None


def _download(store: Store, prefix: str, file: TableFile, folder: Path) -> bool:
    temporary = folder / f"{file.name}.{uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        store.download(f"{prefix}/{file.name}", temporary)
        if not _is_whole(temporary, file):
            return False
        temporary.replace(folder / file.name)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise work_dir_error(folder, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _is_whole(path: Path, file: TableFile) -> bool:
    return path.is_file() and file_sha256(path) == file.sha256


def _load(manifest: Manifest, folder: Path) -> PreparedData:
    train, held_out = (read_table(folder / f.name) for f in (manifest.train, manifest.eval))
    return PreparedData(manifest.digest, train, held_out, manifest.counts)


def _from_disk(folder: Path) -> Manifest | None:
    """The manifest that an earlier process left here, if every byte it names is still there."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    manifest = _parse(Stored(path.read_bytes(), ""), folder.name)
    if manifest is None:
        return None
    if not all(_is_whole(folder / file.name, file) for file in (manifest.train, manifest.eval)):
        return None
    return manifest


def _build(
    settings: DataSettings,
    source: Source,
    tokenisation: Tokenisation,
    *,
    folder: Path,
    should_stop: Callable[[], None],
) -> Manifest:
    template = tokenisation.load()
    train_file, eval_file, counts = build_tables(
        settings,
        source,
        tokenizer=template.tokenizer,
        template=template,
        work_dir=folder,
        should_stop=should_stop,
    )
    manifest = Manifest(folder.name, train_file, eval_file, counts)
    _write_bytes(folder / "manifest.json", manifest.to_bytes())
    return manifest


def _write_bytes(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{uuid4().hex}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise work_dir_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _publish(
    store: Store, manifest: Manifest, damaged: Stored | None, prefix: str, folder: Path
) -> None:
    """Upload the files, then the manifest. To lose to another pod is no failure: its one stands."""
    theirs = _parse(damaged, manifest.digest)
    for file, their in zip(
        (manifest.train, manifest.eval),
        (theirs.train, theirs.eval) if theirs else (None, None),
        strict=True,
    ):
        if their is not None and their.content_sha256 != file.content_sha256:
            raise StoreError(
                f"{store.uri}/{prefix} is damaged and cannot be rebuilt with these package "
                "versions: trials under other tables cannot be compared; delete that folder and "
                "start a new sweep"
            )
        store.upload(f"{prefix}/{file.name}", folder / file.name)
    key = f"{prefix}/manifest.json"
    if damaged is None:
        store.put_if_absent(key, manifest.to_bytes())
    else:
        store.put_if_version(key, manifest.to_bytes(), damaged.version)


def _summary(data: PreparedData) -> str:
    return (
        f"{len(data.train)} train and {len(data.eval)} eval rows, "
        f"{len(data.train.input_ids)} train tokens"
    )
