"""Trying again, for as long as it makes sense: what failed decides how long, and how it ends."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, NoReturn, TypeVar

from job.errors import CredentialsError, SettingsError, StoreError
from job.log import log

T = TypeVar("T")
_LONGEST_PAUSE_SECONDS = 30.0


@dataclass(frozen=True)
class Limits:
    """How long everything may take. Each wait of a cloud store ends by one of these."""

    outage_seconds: float = 1200  # of retries of one operation: JOB_OUTAGE_MINUTES
    credentials_seconds: float = 180  # a cold node has no identity in its first minutes
    connect_seconds: float = 5
    read_seconds: float = 30  # between two bytes of an answer
    # Of one request inside the SDK, where it retries by itself. boto3's default of 3 dies on four
    # 503 in a row.
    attempts: int = 10
    pause_seconds: float = 1  # before our first retry; doubles up to half a minute


class FaultKind(Enum):
    """What a failed request means for the next one."""

    OUTAGE = "outage"  # may pass: retry for outage_seconds, then 74
    CREDENTIALS = "credentials"  # may pass: retry for credentials_seconds, then 77
    SETTING = "setting"  # will not pass: 64 at once
    REFUSED = "refused"  # will not pass and is nobody's setting: 74 at once


class Fault(NamedTuple):
    """Why a request failed, in words without secrets."""

    kind: FaultKind
    reason: str


class Retries:
    """Runs attempts under one store's limits; remembers whether it ever accepted us."""

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
        self._accepted = False

    def run(self, where: str, attempt: Callable[[], T]) -> T:
        """The result of the first attempt that succeeds.

        Raises `SettingsError`, `CredentialsError` or `StoreError`, in one line that names `where`.
        """
        pause = self._limits.pause_seconds
        first_seen: dict[FaultKind, float] = {}
        while True:
            try:
                result = attempt()
            except Exception as error:
                fault = self._diagnose(error)
                if fault is None:
                    raise
                kind = self._effective_kind(fault.kind)
                waited = time.monotonic() - first_seen.setdefault(kind, time.monotonic())
                if waited + pause > self._seconds(kind):
                    self._give_up(where, fault.reason, kind, error)
                if len(first_seen) == 1 and waited == 0:
                    log.warning("%s: %s; trying again", where, fault.reason)
                if fault.kind is FaultKind.CREDENTIALS:
                    self._renew()
                time.sleep(pause * random.uniform(0.5, 1))  # noqa: S311  # not all pods at once
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            else:
                self._accepted = True
                return result

    def _effective_kind(self, kind: FaultKind) -> FaultKind:
        """Credentials that worked a moment ago are the service's trouble: that passes, or is 74."""
        if kind is FaultKind.CREDENTIALS and self._accepted:
            return FaultKind.OUTAGE
        return kind

    def _seconds(self, kind: FaultKind) -> float:
        return {
            FaultKind.OUTAGE: self._limits.outage_seconds,
            FaultKind.CREDENTIALS: self._limits.credentials_seconds,
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
        if kind is FaultKind.REFUSED:
            raise StoreError(f"{where}: {reason}") from error
        raise StoreError(
            f"{where}: still failing after {span}: {reason}; run again when the service is back,"
            " or raise JOB_OUTAGE_MINUTES"
        ) from error
