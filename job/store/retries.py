"""Tries again for as long as it makes sense: what failed decides how long, and how it ends."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, NoReturn, TypeVar

from job.errors import CredentialsError, DataError, SettingsError, StoreError, causes
from job.log import log
from job.store.pace import MINIMUM_PACE, MinimumPace

T = TypeVar("T")
_LONGEST_PAUSE_SECONDS = 30.0
_LINE_SECONDS = 60.0  # between two log lines about one operation


@dataclass(frozen=True)
class Limits:
    """How long a cloud store may take: each wait for one ends by one of these."""

    outage_seconds: float = 1200  # one operation is tried again so long: JOB_OUTAGE_MINUTES
    credentials_seconds: float = 180  # a cold node has no identity in its first minutes
    connect_seconds: float = 5
    read_seconds: float = 30  # of silence between two bytes of an answer
    pace: MinimumPace = MINIMUM_PACE
    # How often the SDK tries one request by itself. boto3's default of 3 dies on four 503 in a row.
    attempts: int = 10
    sdk_seconds: float = 120  # the SDK's tries together may take so long; then ours begin anew
    pause_seconds: float = 1  # before our first retry; doubles up to half a minute

    @property
    def seconds_in_sdk(self) -> float:
        """How long the SDK may try one request again by itself."""
        return min(self.sdk_seconds, self.outage_seconds)


class FaultKind(Enum):
    """What a failed request means for the next one."""

    OUTAGE = "outage"  # may pass: retry for outage_seconds, then 74
    CREDENTIALS = "credentials"  # we are not known: retry for credentials_seconds, then 77
    PERMISSION = "permission"  # we are known, this action is not allowed: the same
    NODE = "node"  # this node's own, a wrong clock say: retry for credentials_seconds, then 74
    ARCHIVED = "archived"  # must be restored first: 65 at once for rows, 64 for what is ours
    SETTING = "setting"  # will not pass: 64 at once
    REFUSED = "refused"  # will not pass and is nobody's setting: 74 at once


_REFUSALS = (FaultKind.CREDENTIALS, FaultKind.PERMISSION)
SKEW_HINT = (
    "this node's clock is wrong: set it by NTP, or take the node away; other nodes are not meant"
)


def is_bad_header(error: BaseException) -> bool:
    """Whether a secret with a line break kept an HTTP library from sending; its words show it."""
    return any(
        "Invalid header value" in str(cause) or type(cause).__name__ == "InvalidHeader"
        for cause in causes(error)
    )


def in_one_line(words: object) -> str:
    """A service's own sentence, as a part of a line of ours."""
    return " ".join(str(words or "").split())[:300].rstrip(". ")


class Fault(NamedTuple):
    """Why a request failed, in words without secrets."""

    kind: FaultKind
    reason: str


class Action(Enum):
    """What a request needs permission for."""

    READ = "read"
    WRITE = "write"
    LIST = "list"
    DELETE = "delete"


class Retries:
    """Runs attempts under one store's limits; remembers which actions the store ever accepted."""

    def __init__(
        self,
        limits: Limits,
        setting: str,
        *,
        diagnose: Callable[[Exception], Fault | None],
        renew: Callable[[], None],
    ) -> None:
        """`diagnose` returns None for what is no fault of the store and must fly.

        `renew` is called after a refusal, to look for credentials again.
        """
        self._limits = limits
        self._setting = setting
        self._diagnose = diagnose
        self._renew = renew
        self._accepted: set[Action] = set()

    def run(self, where: str, action: Action, attempt: Callable[[], T]) -> T:
        """The result of the first attempt that succeeds.

        Raises `SettingsError`, `DataError`, `CredentialsError` or `StoreError`, in one line that
        names `where`.
        """
        pause = self._limits.pause_seconds
        first_seen: dict[FaultKind, float] = {}
        last_line = float("-inf")
        while True:
            try:
                result = attempt()
            except Exception as error:
                fault = self._diagnose(error)
                if fault is None:
                    raise
                kind = self._effective_kind(fault.kind, action)
                now = time.monotonic()
                waited = now - first_seen.setdefault(kind, now)
                if waited + pause > self._seconds(kind):
                    self._give_up(f"{where}: {action.value}", fault.reason, kind, error)
                if now - last_line >= _LINE_SECONDS:
                    log.warning("%s: %s: %s; trying again", where, action.value, fault.reason)
                    last_line = now
                if fault.kind in _REFUSALS:
                    self._renew()
                time.sleep(pause * random.uniform(0.5, 1))  # noqa: S311  # not all pods at once
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            else:
                self._accepted.add(action)
                return result

    def _effective_kind(self, kind: FaultKind, action: Action) -> FaultKind:
        """The kind that decides how long to try again.

        A refusal of what was accepted before is the service's trouble: it passes, or is 74. A role
        that may read and not write is refused at its first write, whatever it read before.
        """
        if kind is FaultKind.PERMISSION:
            return FaultKind.OUTAGE if action in self._accepted else FaultKind.CREDENTIALS
        if kind is FaultKind.CREDENTIALS and self._accepted:
            return FaultKind.OUTAGE
        return kind

    def _seconds(self, kind: FaultKind) -> float:
        return {
            FaultKind.OUTAGE: self._limits.outage_seconds,
            FaultKind.CREDENTIALS: self._limits.credentials_seconds,
            FaultKind.NODE: self._limits.credentials_seconds,
        }.get(kind, 0)

    def _give_up(self, where: str, reason: str, kind: FaultKind, error: Exception) -> NoReturn:
        seconds = self._seconds(kind)
        span = f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} seconds"
        if kind is FaultKind.SETTING:
            raise SettingsError(f"{self._setting}: {where}: {reason}") from error
        if kind is FaultKind.CREDENTIALS:
            raise CredentialsError(
                f"{self._setting}: {where}: credentials refused for {span}: {reason}"
            ) from error
        if kind is FaultKind.ARCHIVED:
            raise (DataError if self._setting == "JOB_DATASET_URI" else SettingsError)(
                f"{self._setting}: {where}: {reason}"
            ) from error
        if kind in (FaultKind.REFUSED, FaultKind.NODE):
            raise StoreError(f"{where}: {reason}") from error
        raise StoreError(
            f"{where}: still failing after {span}: {reason}; run again when the service is back,"
            " or raise JOB_OUTAGE_MINUTES"
        ) from error
