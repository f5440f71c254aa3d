"""Folders below `JOB_WORK_DIR`: an attempt's own, what killed ones left, and shared ones."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from job.errors import VOLUME_FULL, work_dir_error
from job.log import log

PREFIX = "attempt-"
WAIT_SECONDS = 0.2  # between two looks at a lock
LOCK = "lock"  # held as long as the attempt lives; the kernel frees it with the process


@contextlib.contextmanager
def attempt_folder(work_dir: Path) -> Iterator[Path]:
    """A folder for this attempt alone, removed with it; those whose process is gone are swept.

    Raises `OutageError` if the volume is full, whoever notices it in the folder.
    """
    sweep(work_dir)
    try:
        # Locked before it has the name that is swept: no other worker ever sees it unlocked.
        new = Path(tempfile.mkdtemp(dir=work_dir, prefix=f"new-{PREFIX}"))
        lock = _open(new / LOCK)
        _try_lock(lock)
        top = new.rename(work_dir / new.name.removeprefix("new-"))
    except OSError as error:
        raise work_dir_error(work_dir, error) from error
    try:
        (top / "files").mkdir()
        yield top / "files"
    except OSError as error:
        if error.errno in VOLUME_FULL:
            raise work_dir_error(work_dir, error) from error
        raise
    finally:
        shutil.rmtree(top, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def filling(
    folder: Path, *, limit_seconds: float, should_stop: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Make a shared folder and hold it: of the workers on this disk one fills it, others wait.

    The kernel frees the lock with its holder, killed or not. Who waited for `limit_seconds`, or is
    on a volume without locks, goes on unheld, so what is written has to be put in place whole.
    Raises `SettingsError` or `OutageError` if it cannot be made, and what `should_stop` raises.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise work_dir_error(folder, error) from error
    deadline, is_told = time.monotonic() + limit_seconds, False
    try:
        while not _try_lock(lock, without_locks=True) and time.monotonic() < deadline:
            if not is_told:
                log.info("%s: another worker is fetching it; waiting for that", folder)
                is_told = True
            should_stop()
            time.sleep(WAIT_SECONDS)
        yield
    finally:
        os.close(lock)


def use_for_temporaries(work_dir: Path) -> None:
    """Let libraries put temporary files below `work_dir` where the system has no place for them.

    On a read-only root without a TMPDIR of its own. A work folder that cannot be written, either,
    is told by those who need one.
    """
    with contextlib.suppress(FileNotFoundError):
        tempfile.gettempdir()
        return
    with contextlib.suppress(OSError):
        work_dir.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = str(work_dir)  # for our children, too
    tempfile.tempdir = None  # looked for again


def sweep(work_dir: Path) -> None:
    """Remove the folders of attempts whose process is gone; a frozen process still holds its."""
    for folder in sorted(work_dir.glob(f"{PREFIX}*")):
        try:
            lock = _open(folder / LOCK)
        except OSError:  # swept by another worker meanwhile, or another user's
            continue
        try:
            if _try_lock(lock):
                shutil.rmtree(folder, ignore_errors=True)
                log.info("work folder: removed %s, whose attempt is gone", folder)
        finally:
            os.close(lock)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _try_lock(descriptor: int, *, without_locks: bool = False) -> bool:
    """Lock an open file; False if another process holds it.

    `without_locks` is the answer where the file system has none.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return without_locks
    return True
