"""A hub's base model, copied once into the output bucket, from where every later worker takes it.

It lies in `bases/<digest>/`, the digest of its name and commit. The manifest comes last and is
created once; it holds every file's size and sha256. The base stays the hub's in all that a sweep
freezes: workers may take it from either place.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel as Schema
from pydantic import ValidationError

from job.base_model import (
    MODEL_FILE,
    BaseModel,
    Check,
    CheckDigest,
    check_weights,
    is_hub_name,
    no_weights,
    read_config,
    resolve_base_model,
)
from job.errors import DamagedError, SettingsError, SlotError, work_dir_error
from job.hub import FULL_COMMIT, explained, waited_out
from job.log import log
from job.process.workspace import filling
from job.progress import size
from job.store.base import Store, check_key, file_sha256
from job.store.documents import create_document, read_document

CONFIG = "config.json"
_MANIFEST = "manifest.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class StagedFile(Schema):
    """A file of a staged base."""

    bytes: int
    sha256: str


class Staged(Schema):
    """`bases/<digest>/manifest.json`."""

    base_model: str
    revision: str  # full commit on the hub
    files: dict[str, StagedFile]

    @property
    def size_bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    def only(self, name: str) -> Staged:
        """Of all files just this one, if it is there."""
        return self.model_copy(update={"files": {n: f for n, f in self.files.items() if n == name}})


class HubFile(NamedTuple):
    """A file of a hub's model that belongs to the base."""

    name: str
    size_bytes: int
    sha256: str | None  # the hub knows it of large files only


def staged_key(name: str, commit: str) -> str:
    """The folder of a base in the bucket."""
    identity = f"{name}\n{commit}"
    return f"bases/{hashlib.sha256(identity.encode()).hexdigest()}"


def _folder(cache_dir: Path, name: str, commit: str) -> Path:
    """The folder of a base on this disk."""
    return cache_dir / "models" / staged_key(name, commit).rpartition("/")[2]


def resolve_base(
    store: Store,
    name: str,
    revision: str,
    cache_dir: Path,
    *,
    outage_seconds: float,
    should_stop: Callable[[], None] = lambda: None,
    check: Check = lambda _name, _config: None,
    check_digest: CheckDigest = lambda _revision: None,
) -> BaseModel:
    """The base as `resolve_base_model` finds it, its files from the bucket where they are staged.

    A full commit that is staged needs no hub at all. What the hub's own cache on this disk holds in
    full, and what the bucket does not hold as it was written, is left to the hub. `check` is given
    the config, and `check_digest` a folder's or a bucket's revision, before any weight moves.
    """
    waiting: dict[str, Any] = {"outage_seconds": outage_seconds, "should_stop": should_stop}
    from_elsewhere = partial(
        resolve_base_model,
        name, revision, cache_dir, check=check, check_digest=check_digest, **waiting,
    )  # fmt: skip
    commit, model = revision, None
    if not (is_hub_name(name) and FULL_COMMIT.fullmatch(revision)):
        model = from_elsewhere()
        commit = model.hub_revision or ""
    if commit and (staged := _to_take(store, name, commit)) is not None:
        folder = _folder(cache_dir, name, commit)
        try:
            _take(store, staged.only(CONFIG), folder, **waiting)
            config = read_config(name, folder / CONFIG)
            check(name, config)
            _take(store, staged, folder, **waiting)
            return BaseModel(name, str(folder), commit, config)
        except DamagedError as error:
            log.warning("%s; the hub is asked instead, `job stage` mends it", error)
    return model or from_elsewhere()


def fetch_weights(
    base: BaseModel, cache_dir: Path, *, outage_seconds: float, should_stop: Callable[[], None]
) -> None:
    """Bring a hub's weights to this disk, one worker on it for all; other bases are there.

    The hub's client has locks of its own, but who waits for them gives no sign of life, and a
    worker that waits for gigabytes would be ended as hung. Raises what `explained` makes of the
    client's errors, and `SettingsError` without weights.
    """
    commit = base.hub_revision
    if commit is None or _is_cached(base.name, commit):
        return
    folder = _folder(cache_dir, base.name, commit)
    with filling(folder, limit_seconds=outage_seconds, should_stop=should_stop):
        if _is_cached(base.name, commit):  # by another worker
            return
        listed = waited_out(partial(hub_files, base.name, commit), outage_seconds, should_stop)
        for file in listed:
            should_stop()
            fetch = partial(_download, base.name, commit, file.name)
            waited_out(fetch, outage_seconds, should_stop)


def _is_cached(name: str, commit: str) -> bool:
    """Whether the hub's cache holds the weights that transformers loads, at this commit."""
    from huggingface_hub import try_to_load_from_cache

    def cached(file: str) -> Path | None:
        path = try_to_load_from_cache(name, file, revision=commit)
        return Path(path) if isinstance(path, str) else None

    if cached(_SINGLE):
        return True
    index = cached(_INDEX)
    return index is not None and all(map(cached, _shards(index)))


def find_staged(store: Store, name: str, commit: str) -> Staged | None:
    """What the bucket holds of a base; None if it is not staged, or damaged, which is told."""
    key = f"{staged_key(name, commit)}/{_MANIFEST}"
    try:
        document = read_document(store, key)
        staged = None if document is None else Staged.model_validate(document.content)
        if staged and (staged.base_model, staged.revision) != (name, commit):
            raise ValueError(f"is of {staged.base_model} at {staged.revision}")
        for file in staged.files if staged else ():
            if not MODEL_FILE.fullmatch(check_key(file)):
                raise ValueError(f"names a file {file!r}")
    except (SlotError, ValidationError, ValueError) as error:
        log.warning(
            "%s/%s is damaged (%s): left alone", store.uri, key, " ".join(str(error).split())
        )
        return None
    return staged


def _to_take(store: Store, name: str, commit: str) -> Staged | None:
    """What is staged of a base, unless the hub's cache on this disk holds it already."""
    from huggingface_hub import try_to_load_from_cache

    if (staged := find_staged(store, name, commit)) is None:
        return None
    for file, expected in staged.files.items():
        path = try_to_load_from_cache(name, file, revision=commit)
        if not isinstance(path, str) or Path(path).stat().st_size != expected.bytes:
            return staged
    return None


def _take(
    store: Store,
    staged: Staged,
    folder: Path,
    *,
    outage_seconds: float,
    should_stop: Callable[[], None],
) -> None:
    """Bring the files to this disk, each under its name only once its sha256 holds."""
    key = staged_key(staged.base_model, staged.revision)

    def missing() -> dict[str, StagedFile]:
        files = staged.files.items()
        return {file: has for file, has in files if not _has_size(folder / file, has.bytes)}

    if not missing():
        return
    try:
        with filling(folder, limit_seconds=outage_seconds, should_stop=should_stop):
            if left := missing():  # by another worker on this disk
                told = size(sum(expected.bytes for expected in left.values()))
                log.info("base model: %d files, %s, from %s/%s", len(left), told, store.uri, key)
            for file, expected in left.items():
                should_stop()
                _fetch_checked(store, f"{key}/{file}", expected.sha256, folder / file)
    except OSError as error:
        raise work_dir_error(folder, error) from error


def _has_size(path: Path, size_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == size_bytes


def _fetch_checked(store: Store, key: str, sha256: str, path: Path) -> None:
    """Download an object and put it in its place. Raises `DamagedError` if it is not as written."""
    part = path.with_name(f".part-{uuid.uuid4().hex}")
    try:
        store.download(key, part)
        if file_sha256(part) != sha256:
            raise DamagedError(f"{store.uri}/{key}: corrupt, its sha256 is another")
        part.replace(path)
    except FileNotFoundError as error:
        raise DamagedError(f"{store.uri}/{key}: is missing") from error
    finally:
        part.unlink(missing_ok=True)


class StagedNow(NamedTuple):
    """What `stage` left in the bucket."""

    base_model: str
    revision: str
    uri: str
    bytes: int
    files: int
    files_sent: int  # the others were there

    @property
    def summary(self) -> str:
        """All of it in a line."""
        return (
            f"{self.base_model}: {size(self.bytes)} in {self.uri}, {self.files_sent} files sent,"
            f" {self.files - self.files_sent} were there, every sha256 holds; with"
            f" JOB_BASE_MODEL_REVISION={self.revision} workers need no hub"
        )


def stage(
    store: Store, name: str, revision: str, work_dir: Path, outage_seconds: float
) -> StagedNow:
    """Copy a hub's base into the bucket, or check and mend the copy there; say what was done.

    What an earlier call left is read back and kept where every byte holds. Raises `SettingsError`
    for a base that is no hub's, and what the hub and the store raise.
    """
    if not is_hub_name(name):
        raise SettingsError(
            f"JOB_BASE_MODEL: {name} is no model of the Hugging Face hub, and only those are"
            " staged: copy the folder to the bucket yourself and name its URI"
        )
    commit = resolve_base_model(name, revision, work_dir, outage_seconds=outage_seconds).revision
    listed = waited_out(partial(hub_files, name, commit), outage_seconds)
    key, known = staged_key(name, commit), find_staged(store, name, commit)
    there, files, num_sent = set(store.list(f"{key}/")), {}, 0
    for file in listed:
        where = f"{key}/{file.name}"
        expected = known.files.get(file.name) if known and where in there else None
        if expected is None or not _holds(store, where, expected.sha256, work_dir):
            path, sha256 = waited_out(partial(_from_hub, name, commit, file), outage_seconds)
            is_there = where in there and expected is None
            if not is_there or not _holds(store, where, sha256, work_dir):
                log.info("staging %s, %s", file.name, size(path.stat().st_size))
                store.upload(where, path)
                num_sent += 1
            expected = StagedFile(bytes=path.stat().st_size, sha256=sha256)
        files[file.name] = expected
    staged = Staged(base_model=name, revision=commit, files=files)
    create_document(store, f"{key}/{_MANIFEST}", staged.model_dump())
    if find_staged(store, name, commit) != staged:
        raise DamagedError(f"{store.uri}/{key}: holds another manifest; delete it and run again")
    uri = f"{store.uri}/{key}"
    return StagedNow(name, commit, uri, staged.size_bytes, len(files), num_sent)


def _holds(store: Store, key: str, sha256: str, work_dir: Path) -> bool:
    """Read an object back; whether it is as written."""
    with tempfile.TemporaryDirectory(prefix="stage-", dir=work_dir) as folder:
        try:
            _fetch_checked(store, key, sha256, Path(folder) / "back")
        except DamagedError as error:
            log.warning("%s: sent again", error)
            return False
    return True


def hub_files(name: str, commit: str) -> list[HubFile]:
    """The files of a hub's model that loading reads: one copy of the weights, and the small ones.

    Raises what `explained` makes of the client's errors, and `SettingsError` without weights.
    """
    from huggingface_hub import HfApi

    try:
        siblings = HfApi().model_info(name, revision=commit, files_metadata=True).siblings or []
        found = {
            sibling.rfilename: HubFile(
                sibling.rfilename, sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else None
            )
            for sibling in siblings
            if MODEL_FILE.fullmatch(sibling.rfilename) and sibling.rfilename[0].isalnum()
        }
        weights = _needed_weights(name, commit, found)
    except Exception as error:  # the client's HTTP library has errors of its own
        if told := explained(error, "JOB_BASE_MODEL", name, commit):
            raise told from error
        raise
    if not weights:
        raise no_weights(name, (sibling.rfilename for sibling in siblings))
    return [
        file
        for file in found.values()
        if file.name in weights or not file.name.endswith(".safetensors")
    ]


def _shards(index: Path) -> set[str]:
    """The files that an index names. Raises `SettingsError` for one that is damaged."""
    try:
        weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        return set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(
            f"JOB_BASE_MODEL: {index}: names no weights ({type(error).__name__}: {error}); delete"
            " it and run again, or take a whole model"
        ) from error


def _needed_weights(name: str, commit: str, found: dict[str, HubFile]) -> set[str]:
    """The weight files that transformers loads; some models hold the same weights twice."""
    if _SINGLE in found:
        return {_SINGLE}
    if _INDEX in found:
        return _shards(_download(name, commit, _INDEX))
    return {file for file in found if file.endswith(".safetensors")}


def _from_hub(name: str, commit: str, file: HubFile) -> tuple[Path, str]:
    """A file of the hub on this disk and its sha256, checked as far as hub and format tell."""
    path = _download(name, commit, file.name)
    sha256 = file_sha256(path)
    if file.sha256 not in (None, sha256):
        raise SettingsError(
            f"JOB_BASE_MODEL: {path}: its sha256 is not the hub's; delete it and run again"
        )
    if file.name.endswith(".safetensors"):
        check_weights(path)
    return path, sha256


def _download(name: str, commit: str, file: str) -> Path:
    """A file of the hub on this disk, as the hub's client keeps it."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, revision=commit))
    except Exception as error:
        if told := explained(error, "JOB_BASE_MODEL", name, commit):
            raise told from error
        raise
