"""Uploads in the background while training goes on: best adapters and checkpoints, in order.

A checkpoint counts once the lease names it; the lease keeps the newest two, and what it no longer
names is deleted right after the renewal that left it out.
"""

from __future__ import annotations

import queue
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.errors import JobError, SlotError, StoreError
from job.ledger.folders import (
    PublishedFolder,
    delete_folder,
    fetch_folder,
    seal_folder,
    upload_folder,
)
from job.ledger.lease import HeldLease
from job.ledger.records import Checkpoint
from job.log import log
from job.progress import size

KEPT_CHECKPOINTS = 2
RATED_BYTES = 1_000_000  # a smaller upload tells how long a request takes, not the line's rate


@dataclass(frozen=True)
class _Upload:
    folder: Path
    sealed: PublishedFolder
    checkpoint_step: int | None = None  # None: a best adapter
    best: str | None = None  # key of the best adapter that the checkpoint refers to
    clock_seconds: float = 0.0  # training clock in the checkpoint


class Uploads:
    """The uploads of one attempt, by one thread, under its lease."""

    def __init__(
        self,
        lease: HeldLease,
        *,
        interval_seconds: float,
        seconds_left: Callable[[], float | None],
        clock_of: Callable[[Path], float],
        on_report: Callable[[dict[str, Any]], None] = lambda _: None,
        resume_dir: Path | None = None,
    ) -> None:
        """`clock_of` reads a checkpoint's training clock; `on_report` is told of progress, too."""
        self.resume_dir = resume_dir
        self._clock_of = clock_of
        self._on_report = on_report
        self._interval_seconds = interval_seconds
        self._seconds_left = seconds_left
        self._last_checkpoint = time.monotonic()
        self._store, self._slot = lease.slot.store, lease.slot
        self._lease = lease
        self._queue: queue.Queue[_Upload | None] = queue.Queue()
        self._error: BaseException | None = None
        self._bytes_per_second: float | None = None
        self._under_way = (0, 0.0)  # bytes of the present upload, and when it began
        self._thread = threading.Thread(target=self._run, daemon=True, name="uploads")
        self._bests = {c.best for c in lease.record.checkpoints if c.best is not None}

    def start(self) -> None:
        """Begin to upload in the background."""
        self._thread.start()

    def is_due(self) -> bool:
        """Whether a checkpoint is due: the last one is old enough, and no upload is pending."""
        self.raise_errors()
        old_enough = time.monotonic() - self._last_checkpoint >= self._interval_seconds
        return old_enough and not self._queue.unfinished_tasks

    def raise_errors(self) -> None:
        """Raise what ended the background thread, if anything did."""
        if self._error is not None:
            raise self._error

    def put_best(self, folder: Path) -> PublishedFolder:
        """Queue an adapter that became the best; the folder is deleted once it is uploaded."""
        sealed = seal_folder(self._slot.key("adapter"), folder)
        self._queue.put(_Upload(folder, sealed))
        return sealed

    def put_checkpoint(self, folder: Path, step: int, best: str | None) -> None:
        """Queue a checkpoint, behind the best adapter it refers to.

        When the process was told to end and the upload would not end in time at the rate measured
        so far, nothing is queued: the last published checkpoint stands.
        """
        name = f"checkpoints/{self._lease.epoch}-{step}"
        sealed = seal_folder(self._slot.key(name), folder)
        needed, left = self._seconds_to_upload(sealed.size_bytes), self._seconds_left()
        if needed is not None and left is not None and needed > left:
            log.warning(
                "step %d is not saved: uploading takes %.0f s, %.0f s are left; the checkpoint"
                " before stands",
                step,
                needed,
                left,
            )
            return
        self._last_checkpoint = time.monotonic()
        self._queue.put(_Upload(folder, sealed, step, best, self._clock_of(folder)))

    def report(self, **progress: Any) -> None:
        """Note progress for the lease's next renewal."""
        self._lease.report(**progress)
        self._on_report(progress)

    def _seconds_to_upload(self, num_bytes: int) -> float | None:
        if self._bytes_per_second is None:
            return None
        queued = sum(u.sealed.size_bytes for u in list(self._queue.queue) if u is not None)
        under_way, since = self._under_way
        done = self._bytes_per_second * (time.monotonic() - since)
        ahead = queued + max(0.0, under_way - done)
        return float((ahead + num_bytes) / self._bytes_per_second)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all is uploaded; False if that takes longer than `timeout` seconds."""
        self._queue.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        self.raise_errors()
        return True

    def _run(self) -> None:
        try:
            while (upload := self._queue.get()) is not None:
                self._publish(upload)
                self._queue.task_done()
        except (JobError, OSError) as error:
            self._error = error

    def _publish(self, upload: _Upload) -> None:
        self._lease.ensure_held()
        started = time.monotonic()
        self._under_way = (upload.sealed.size_bytes, started)
        upload_folder(self._store, upload.sealed, upload.folder)
        self._under_way = (0, started)
        seconds = max(1e-3, time.monotonic() - started)
        if upload.sealed.size_bytes >= RATED_BYTES:
            self._bytes_per_second = upload.sealed.size_bytes / seconds
        shutil.rmtree(upload.folder, ignore_errors=True)
        if upload.checkpoint_step is None:
            self._bests.add(upload.sealed.key)
            return
        newest = Checkpoint(
            key=upload.sealed.key,
            sha256=upload.sealed.sha256,
            step=upload.checkpoint_step,
            best=upload.best,
            clock_seconds=round(upload.clock_seconds, 1),
        )
        known = (newest, *self._lease.record.checkpoints)
        kept = known[:KEPT_CHECKPOINTS]
        self._lease.report(published_step=upload.checkpoint_step)
        self._lease.renew(checkpoints=kept)
        for old in known[KEPT_CHECKPOINTS:]:
            delete_folder(self._store, old.key)
        # The best adapters that a kept or a queued checkpoint refers to stay.
        queued = [u for u in list(self._queue.queue) if u is not None]
        needed = {c.best for c in kept} | {u.best or u.sealed.key for u in queued}
        for key in sorted(self._bests - needed):
            delete_folder(self._store, key)
            self._bests.discard(key)
        log.info(
            "checkpoint at step %d: %s in %.1f s",
            upload.checkpoint_step,
            size(upload.sealed.size_bytes),
            seconds,
        )

    def discard(self, *, keep: str | None) -> None:
        """Delete the slot's checkpoints, after its commit, and all best adapters but `keep`."""
        for checkpoint in self._lease.record.checkpoints:
            delete_folder(self._store, checkpoint.key)
        for key in sorted(self._bests - {keep}):
            delete_folder(self._store, key)


def restore(
    lease: HeldLease, work_dir: Path, readable: Callable[[Path], str | None]
) -> Path | None:
    """Fetch the newest checkpoint of the lease whose every byte holds; return its folder, or None.

    `readable` says why a verified checkpoint cannot be used by this version of the code, or None.
    With none that holds, the trial starts again, which costs time but changes no result. Raises
    `SlotError` if the newest that holds was written by another version of the code.
    """
    slot = lease.slot
    for number, checkpoint in enumerate(lease.record.checkpoints):
        folder = work_dir / f"restored-{number}"
        try:
            fetch_folder(slot.store, checkpoint.key, checkpoint.sha256, folder)
        except StoreError as error:
            log.warning("checkpoint at step %d is not used: %s", checkpoint.step, error)
            continue
        if (reason := readable(folder)) is not None:
            raise SlotError(f"slot {slot.number}: {checkpoint.key} {reason}")
        log.info("going on from the checkpoint at step %d", checkpoint.step)
        return folder
    return None
