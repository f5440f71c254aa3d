"""The best adapter, fetched and verified, or merged into its base."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from job.base_model import resolve_base_model
from job.errors import DamagedError, JobError, OutageError, SettingsError, SlotError, is_volume_full
from job.ledger.folders import MANIFEST, fetch_folder
from job.ledger.records import Result
from job.log import log
from job.store.base import Store

_MERGE = "best --merge"


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


def merge(store: Store, slot: int, result: Result, folder: Path, *, work_dir: Path) -> None:
    """Write the base with the adapter added to its weights, in fp16, as a model of its own.

    Raises as `download` does, and then leaves nothing in `folder`.
    """
    make_new(folder, _MERGE)
    try:
        base = _merge(store, slot, result, folder, work_dir)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # it was new or empty before
        raise
    log.info("slot %d merged into %s: %s", slot, base, folder)


def _merge(store: Store, slot: int, result: Result, folder: Path, work_dir: Path) -> str:
    """Merge the adapter into `folder`; return the name of the base."""
    from job.training.merging import merge_adapter  # imports torch

    base = resolve_base_model(result.base_model, result.base_model_revision, cache_dir=work_dir)
    with tempfile.TemporaryDirectory(prefix="adapter-") as name:
        adapter = Path(name) / "adapter"
        download(store, slot, result, adapter, option=_MERGE)
        try:
            merge_adapter(
                base.location,
                base.hub_revision,
                adapter,
                folder,
                quantization=result.quantization,
            )
        except Exception as error:  # safetensors and tokenizers have errors of their own for it
            # If no file was written yet, it is the volume of the base that is full.
            if is_volume_full(error) and any(folder.iterdir()):
                raise unwritable(_MERGE, folder, error) from error
            raise
    return base.name


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
    reason = "is a file" if isinstance(error, FileExistsError) else error.strerror
    return SettingsError(f"{option}: {path}: {reason}; give a folder that this user may write")
