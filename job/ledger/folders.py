"""Folders in the bucket under the hash of their content: published, and verified before use."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from job.errors import DamagedError
from job.ledger.slot import Slot
from job.store.base import Store, file_sha256

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class PublishedFolder:
    """A folder in the store; `sha256` is that of its manifest, which holds every file's."""

    key: str
    sha256: str
    size_bytes: int


def seal_folder(prefix: str, folder: Path) -> PublishedFolder:
    """Write the manifest of `folder`; it will be called `<prefix>-<sha256>` once it is uploaded."""
    paths = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths
    }
    manifest = json.dumps({"files": files}, indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(manifest)
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    size_bytes = sum(path.stat().st_size for path in paths)
    return PublishedFolder(f"{prefix}-{digest}", digest, size_bytes)


def upload_folder(store: Store, sealed: PublishedFolder, folder: Path) -> None:
    """Upload a sealed folder, its manifest last."""
    paths = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    for path in (*paths, folder / MANIFEST):
        store.upload(f"{sealed.key}/{path.name}", path)


def fetch_folder(store: Store, key: str, sha256: str, folder: Path) -> None:
    """Download a published folder and check every byte; `DamagedError` if any is not the one sent.

    A file that does not hold is not left in `folder`.
    """
    try:
        store.download(f"{key}/{MANIFEST}", folder / MANIFEST)
        manifest = (folder / MANIFEST).read_bytes()
        if hashlib.sha256(manifest).hexdigest() != sha256:
            raise DamagedError(
                f"{store.uri}/{key}/{MANIFEST}: is not the manifest that was written"
            )
        for name, expected in json.loads(manifest)["files"].items():
            if name != PurePosixPath(name).name or name.startswith("."):
                raise DamagedError(f"{store.uri}/{key}/{MANIFEST}: names a file {name!r}")
            store.download(f"{key}/{name}", folder / name)
            if file_sha256(folder / name) != expected["sha256"]:
                (folder / name).unlink()
                raise DamagedError(f"{store.uri}/{key}/{name}: corrupt, its sha256 is another")
    except FileNotFoundError as error:
        raise DamagedError(f"{store.uri}/{key}: incomplete, {error.filename} is missing") from error


def delete_folder(store: Store, key: str) -> None:
    """Remove a published folder, its manifest first, without which the rest counts for nothing."""
    store.delete(f"{key}/{MANIFEST}")
    for name in list(store.list(f"{key}/")):
        store.delete(name)


def publish_file(slot: Slot, path: Path) -> str:
    """Upload a trial's file, `name.ext`, as `name-<sha256 of its content>.ext`; return its key."""
    key = slot.key(f"{path.stem}-{file_sha256(path)}{path.suffix}")
    slot.store.upload(key, path)
    return key
