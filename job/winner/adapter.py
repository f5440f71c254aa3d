"""The best adapter, fetched and verified."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from job.errors import DamagedError, JobError, OutageError, SettingsError, SlotError, is_volume_full
from job.ledger.folders import MANIFEST, fetch_folder
from job.ledger.records import Result
from job.log import log
from job.store.base import Store


def download(
    store: Store, slot: int, result: Result, folder: Path, *, option: str = "best --download"
) -> None:
    """Fetch the adapter to `folder`, which must be new or empty, and check every byte of it.

    Raises `SettingsError`, which names `option`, for a folder in use, `SlotError` for bytes that
    are not those written.
    """
    key, sha256 = result.adapter_key, result.adapter_sha256
    assert key is not None
    assert sha256 is not None
    make_new(folder, option)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
            arriving = Path(name) / "adapter"
            arriving.mkdir()
            folder.rmdir()  # the move makes it again
            fetch_folder(store, key, sha256, arriving)
            (arriving / MANIFEST).unlink()
            shutil.move(arriving, folder)
    except DamagedError as error:
        raise SlotError(
            f"slot {slot}'s adapter is damaged: {error}; `job redo {slot}` begins it"
            f" again, `job exclude {slot} --reason TEXT` leaves it out of `best`"
        ) from error
    except (OSError, OutageError) as error:
        if isinstance(error, OutageError) and not is_volume_full(error):
            raise
        raise unwritable(option, folder, error) from error
    log.info("slot %d's adapter: %s, every sha256 holds", slot, folder)


def make_new(folder: Path, option: str) -> None:
    """Make the folder that a person named, before anything is fetched. Raises `SettingsError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise SettingsError(
                f"{option}: {folder} is not empty, and nothing is written over; give a new or an"
                " empty folder"
            )
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise unwritable(option, folder, error) from error


def unwritable(option: str, path: Path, error: Exception) -> JobError:
    """The error for a file or folder that a person named and that cannot be written."""
    if is_volume_full(error):
        return OutageError(f"{option}: {path}: no space left; free some, or give another folder")
    assert isinstance(error, OSError)
    reason = _in_the_way(path, error) if isinstance(error, FileExistsError) else error.strerror
    return SettingsError(f"{option}: {path}: {reason}; give a folder that this user may write")


def _in_the_way(path: Path, error: FileExistsError) -> str:
    """What is there instead of a folder, at the path or above it."""
    there = Path(error.filename or path)
    if there.is_symlink() and not there.exists():
        where = "" if there == path else f"{there} "
        return f"{where}is a link to {there.readlink()}, which does not exist"
    return "is a file"
