"""The Hugging Face hub: what its client's errors mean, and waiting for what passes.

The client, `datasets` and `transformers` wrap each other's errors; what happened stands among the
causes. Its statuses: https://huggingface.co/docs/hub/rate-limits and the client's `errors.py`.
"""

from __future__ import annotations

import contextlib
import email.utils
import errno
import random
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from job.errors import (
    CredentialsError,
    JobError,
    OutageError,
    SettingsError,
    causes,
    is_network_failure,
    is_volume_full,
)
from job.log import log

T = TypeVar("T")
_LONGEST_PAUSE_SECONDS = 60.0
FULL_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubOutageError(OutageError):
    """The hub does not answer, or fails in a way that passes."""

    pause_seconds: float | None = None  # what it asked us to wait


def waited_out(
    attempt: Callable[[], T], outage_seconds: float, should_stop: Callable[[], None] = lambda: None
) -> T:
    """Call `attempt` again while it raises `HubOutageError`, for so long; then raise the last one.

    A pause that the hub asks for is kept; one that is longer than what is left is not begun.
    `should_stop` is called twice a second in a pause, and raises to end it.
    """
    deadline, own_pause = time.monotonic() + outage_seconds, 1.0
    while True:
        try:
            return attempt()
        except HubOutageError as error:
            pause = error.pause_seconds or own_pause * random.uniform(0.5, 1)  # noqa: S311
            if time.monotonic() + pause > deadline:
                raise
            log.warning("%s; trying again in %.0f s", error, pause)
        pause_ends = time.monotonic() + pause
        while (left := pause_ends - time.monotonic()) > 0:
            should_stop()
            time.sleep(min(left, 0.5))
        own_pause = min(2 * own_pause, _LONGEST_PAUSE_SECONDS)


def is_offline() -> bool:
    """Whether the hub's client was told to ask nothing: `HF_HUB_OFFLINE=1`."""
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def cached_commit(name: str, revision: str | None, *, kind: str) -> str | None:
    """The commit of a `model` or `dataset` that lies in the client's cache on this disk, if any.

    The client notes what a branch stood for only if it was asked by the branch's name; a single
    commit on the disk counts as the main branch's.
    """
    folder = _cache_folder(name, kind)
    with contextlib.suppress(OSError):
        return (folder / "refs" / (revision or "main")).read_text().strip()
    snapshots = sorted(path.name for path in folder.glob("snapshots/*"))
    return snapshots[0] if revision in (None, "main") and len(snapshots) == 1 else None


def cached_snapshot(name: str, commit: str) -> Path | None:
    """The folder of what the client's cache on this disk holds of a model; None if nothing."""
    folder = _cache_folder(name, "model") / "snapshots" / commit
    return folder if folder.is_dir() else None


def _cache_folder(name: str, kind: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}")


def explained(
    error: BaseException, setting: str, name: str, revision: str | None = None
) -> JobError | None:
    """What an error of the hub's client means for `setting`; None if it is none of the hub's.

    `name` and `revision` are what was asked for.
    """
    from huggingface_hub import errors as hub

    behind = list(causes(error))
    at = f"{setting}: {name}" + ("" if revision is None else f" at revision {revision}")
    status, said = _answer(behind)
    if volume := _volume_error(behind, at):
        return volume
    if _any(behind, hub.GatedRepoError) or "a gated" in str(error):
        return CredentialsError(
            f"{setting}: {name} is gated: accept its licence and set HF_TOKEN ({said})"
        )
    if _any(behind, hub.DisabledRepoError):
        return SettingsError(f"{at}: the hub has disabled it ({said}); choose another")
    if status in (401, 403):
        return CredentialsError(
            f"{at}: the hub refuses us ({said}); set HF_TOKEN to a token that may read {name}, or"
            " check the spelling"
        )
    if _any(behind, hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError):
        return SettingsError(
            f"{at} is neither a path here nor on the Hugging Face hub; check the spelling, or set"
            " HF_TOKEN if it is private"
        )
    return _outage(behind, at, status, said)


def _outage(behind: list[BaseException], at: str, status: int, said: str) -> JobError | None:
    """The error if the hub failed, does not answer or may not be asked; None if none of them."""
    from huggingface_hub import errors as hub

    absent = (hub.LocalEntryNotFoundError, hub.FileMetadataError, hub.XetDownloadError)
    silent = _any(behind, *absent) or any(map(is_network_failure, behind))
    if not (status in (408, 429) or status >= 500 or (silent and not status)):
        return None
    if is_offline():
        return OutageError(
            f"{at}: the Hugging Face hub cannot be reached or read, because HF_HUB_OFFLINE is set,"
            f" and HF_HOME does not hold all of it ({said}); fetch it first, or give files"
        )
    if _any(behind, hub.FileMetadataError):  # a portal's page, a proxy's
        said = f"what answers is no hub, look at HF_ENDPOINT and HTTPS_PROXY: {said}"
    outage = HubOutageError(
        f"{at}: the Hugging Face hub cannot be reached or read ({said}); run again when it is back,"
        " raise JOB_OUTAGE_MINUTES, or give files"
    )
    outage.pause_seconds = _asked_pause(behind)
    return outage


def _volume_error(behind: Iterable[BaseException], at: str) -> JobError | None:
    """The error of a cache that cannot be written, or that is full."""
    from huggingface_hub import constants

    for cause in behind:
        if is_volume_full(cause):
            return OutageError(
                f"{at}: no space left in HF_HOME ({constants.HF_HOME}): enlarge its volume"
            )
        unwritable = (PermissionError, NotADirectoryError, FileExistsError)
        if isinstance(cause, unwritable) or getattr(cause, "errno", None) == errno.EROFS:
            assert isinstance(cause, OSError)
            return SettingsError(
                f"HF_HOME: {cause.filename or constants.HF_HOME} cannot be written"
                f" ({cause.strerror or cause}); give a folder that this user may write"
            )
    return None


def _any(behind: Iterable[BaseException], *types: type[BaseException]) -> bool:
    return any(isinstance(cause, types) for cause in behind)


def _answer(behind: list[BaseException]) -> tuple[int, str]:
    """The status of the hub's answer, 0 if it gave none, and the innermost words, in one line."""
    for cause in behind:
        response = getattr(cause, "response", None)
        if status := int(getattr(response, "status_code", 0) or 0):
            words = getattr(cause, "server_message", None)
            shown = f"{type(cause).__name__}, HTTP {status}"
            return status, shown + (f": {_in_one_line(words)}" if words else "")
    told = next((cause for cause in reversed(behind) if str(cause).strip()), behind[0])
    return 0, f"{type(told).__name__}: {_in_one_line(told)}"


def _in_one_line(words: object) -> str:
    return " ".join(str(words).split())[:300]


def _asked_pause(behind: Iterable[BaseException]) -> float | None:
    """How long the hub asks us to wait, in seconds: Retry-After, or RateLimit's t=."""
    for cause in behind:
        headers = getattr(getattr(cause, "response", None), "headers", {})
        after = str(headers.get("Retry-After", ""))
        if after.strip().isdecimal():
            return float(after)
        with contextlib.suppress(ValueError, TypeError):
            return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
        if reset := re.search(r";\s*t=(\d+)", str(headers.get("RateLimit", ""))):
            return float(reset[1]) + 1
    return None
