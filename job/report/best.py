"""`job best`: which adapter to take, fetched and verified, or merged into its base."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from job.base_model import resolve_base_model
from job.checkpoint import MANIFEST, fetch_folder
from job.errors import DamagedError, JobError, OutageError, SettingsError, SlotError, is_volume_full
from job.log import log
from job.report.overview import Overview, SlotView
from job.store.base import Store

_MERGE = "best --merge"


def best_of(overview: Overview) -> SlotView:
    """The best committed trial. Raises `SlotError` if none has an adapter yet."""
    if (best := overview.best) is None or best.adapter_key is None:
        raise SlotError(
            f"sweep {overview.sweep} in {overview.uri}: no committed trial has an adapter yet;"
            " `job status` shows its slots"
        )
    return best


def download(
    store: Store, best: SlotView, folder: Path, *, option: str = "best --download"
) -> None:
    """Fetch the adapter to `folder`, which must be new or empty, and check every byte of it.

    Raises `SettingsError`, which names `option`, for a folder in use, `SlotError` for bytes that
    are not those written.
    """
    make_new(folder, option)
    assert best.adapter_key is not None
    assert best.result is not None
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
            arriving = Path(name) / "adapter"
            arriving.mkdir()
            folder.rmdir()  # it is made again by the move, or not at all
            fetch_folder(store, best.adapter_key, best.result["adapter_sha256"], arriving)
            (arriving / MANIFEST).unlink()
            shutil.move(arriving, folder)
    except DamagedError as error:
        raise SlotError(
            f"slot {best.slot}'s adapter is damaged: {error}; `job redo {best.slot}` begins it"
            f" again, `job exclude {best.slot} --reason TEXT` leaves it out of `best`"
        ) from error
    except (OSError, OutageError) as error:
        if isinstance(error, OutageError) and not is_volume_full(error):
            raise
        raise unwritable(option, folder, error) from error
    log.info("slot %d's adapter: %s, every sha256 holds", best.slot, folder)


def merge(store: Store, best: SlotView, folder: Path, *, work_dir: Path) -> None:
    """Write the base with the adapter added to its weights, in fp16, as a model of its own.

    Raises as `download`; then nothing of it stays.
    """
    make_new(folder, _MERGE)
    try:
        base = _merge(store, best, folder, work_dir)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # it was new or empty
        raise
    log.info("slot %d merged into %s: %s", best.slot, base, folder)


def _merge(store: Store, best: SlotView, folder: Path, work_dir: Path) -> str:
    """The base's name."""
    from job.training.merging import merge_adapter  # torch

    assert best.result is not None
    base = resolve_base_model(
        best.result["base_model"], best.result["base_model_revision"], cache_dir=work_dir
    )
    with tempfile.TemporaryDirectory(prefix="adapter-") as name:
        adapter = Path(name) / "adapter"
        download(store, best, adapter, option=_MERGE)
        try:
            merge_adapter(base.location, base.hub_revision, adapter, folder)
        except Exception as error:  # safetensors and tokenizers have errors of their own for it
            # Before the first file, it is the volume of the base that is full.
            if is_volume_full(error) and any(folder.iterdir()):
                raise unwritable(_MERGE, folder, error) from error
            raise
    return base.name


def describe_best(overview: Overview, best: SlotView) -> dict[str, Any]:
    """What `job best` prints."""
    assert best.result is not None
    return {
        "slot": best.slot,
        "eval_loss": best.eval_loss,
        "params": dict(best.params),
        "adapter": f"{overview.uri}/{best.adapter_key}",
        "adapter_sha256": best.result["adapter_sha256"],
        "base_model": best.result["base_model"],
        "base_model_revision": best.result["base_model_revision"],
    }


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
    """What it means that a file or folder which a person named cannot be written."""
    if is_volume_full(error):
        return OutageError(f"{option}: {path}: no space left; free some, or give another folder")
    assert isinstance(error, OSError)
    reason = "is a file" if isinstance(error, FileExistsError) else error.strerror
    return SettingsError(f"{option}: {path}: {reason}; give a folder that this user may write")


def as_json(description: dict[str, Any]) -> str:
    return json.dumps(description, indent=1)
