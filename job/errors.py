"""Everything that can end a run on purpose, and the exit code it ends with.

The exit codes are a contract with `podFailurePolicy` in k8s/sweep-job.yaml:

    JobError
    ├── SettingsError          64  settings, or settings that differ from the sweep's
    │   └── SweepError         64  the sweep file
    ├── DataError              65  data unusable for every trial
    ├── SlotError              69  this slot makes no progress, or is damaged
    ├── GpuError               72  no GPU, GPU fault or too old a driver on this node
    ├── OutageError            74  store, W&B or network still failing; a hang; volume full
    │   └── StoreError         74  the store
    │       └── DamagedError   74  what it holds is not what was written
    ├── PreemptedError         75  state saved, or another attempt owns the slot
    │   └── HeldError          75  another attempt held the slot before this one began
    └── CredentialsError       77  credentials refused

Any other exception is a bug of ours: it ends with 70 and a traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    """Exit codes of `python -m job`; the comment is the Job's reaction."""

    OK = 0  # Complete: the slot is committed, or nothing is left to do
    SETTINGS = 64  # FailJob
    DATA = 65  # FailJob
    SLOT = 69  # FailIndex
    BUG = 70  # Count against backoffLimitPerIndex
    GPU = 72  # Count
    OUTAGE = 74  # Count
    PREEMPTED = 75  # Ignore
    CREDENTIALS = 77  # FailJob


class JobError(Exception):
    """The user's or the world's fault; the message says what, where, the limit and the way out."""

    exit_code = ExitCode.BUG


class SettingsError(JobError):
    """Settings that cannot work, or that differ from those the sweep was started with."""

    exit_code = ExitCode.SETTINGS


class SweepError(SettingsError):
    """A sweep file that cannot be read or asks for something unknown."""


class DataError(JobError):
    """Data that no trial could train on."""

    exit_code = ExitCode.DATA


class SlotError(JobError):
    """A slot that is damaged, or that makes no progress."""

    exit_code = ExitCode.SLOT


class GpuError(JobError):
    """No usable GPU on this node."""

    exit_code = ExitCode.GPU


class OutageError(JobError):
    """The store, W&B or the network fails for too long, this process hangs, or a volume is full."""

    exit_code = ExitCode.OUTAGE


class StoreError(OutageError):
    """The store failed for too long, or does not hold what was written."""


class DamagedError(StoreError):
    """The store answers, and what it holds is not what was written: no other try mends that."""


class PreemptedError(JobError):
    """This attempt ends here; the slot's state is saved or belongs to a newer attempt."""

    exit_code = ExitCode.PREEMPTED


class HeldError(PreemptedError):
    """Living attempts hold all slots that are asked for; a queue has others to go on with."""


class CredentialsError(JobError):
    """The store, W&B or the Hugging Face hub refused our credentials."""

    exit_code = ExitCode.CREDENTIALS


VOLUME_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # EFBIG: a limit on one file


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what caused it or came before it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_volume_full(error: BaseException | None) -> bool:
    """Whether a full volume caused the error; safetensors tells the system's one in words only."""
    return any(
        (isinstance(cause, OSError) and cause.errno in VOLUME_FULL)
        or f"os error {errno.ENOSPC}" in str(cause)
        for cause in causes(error)
    )


def is_network_failure(error: BaseException | None) -> bool:
    """Whether the network caused the error; the hub's HTTP client is httpx or httpx2."""
    return any(
        type(cause).__module__.startswith("httpx")
        or isinstance(cause, ConnectionError | TimeoutError)
        for cause in causes(error)
    )


# A folder that is not this user's to write. A file system that turns read-only later is a node's.
_NOT_OURS = frozenset({errno.EACCES, errno.EPERM, errno.ENOTDIR})


def work_dir_error(path: Path, error: OSError, *, at_start: bool = False) -> JobError:
    """Make the error for a failed write below `JOB_WORK_DIR`: a wrong setting (64), or 74.

    `at_start`: before anything was written there, whatever but a full volume is a wrong setting.
    """
    is_full = error.errno in VOLUME_FULL
    if not is_full and (at_start or error.errno in _NOT_OURS):
        reason = "it is a file" if error.errno == errno.EEXIST else error.strerror
        return SettingsError(
            f"JOB_WORK_DIR: {path} cannot be written ({reason}); give a folder that this user may"
            " write"
        )
    way_out = "free disk space" if is_full else "this node's disk fails"
    return OutageError(f"JOB_WORK_DIR: {path} cannot be written ({error}): {way_out}")
