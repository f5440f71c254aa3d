"""Which errors stand for a full volume. `pytest tests/test_errors.py`"""

from __future__ import annotations

import errno

from job.errors import ExitCode, OutageError, is_volume_full
from job.process.stop import Stop


def _outage(cause: Exception) -> OutageError:
    try:
        try:
            raise cause
        except Exception as error:
            raise OutageError("a line") from error
    except OutageError as outage:
        return outage


def test_a_full_volume_is_found_behind_what_it_was_translated_to() -> None:
    assert is_volume_full(_outage(OSError(errno.ENOSPC, "No space left on device")))
    assert is_volume_full(_outage(ValueError("Error: No space left on device (os error 28)")))
    assert is_volume_full(OSError(errno.EDQUOT, "quota"))


def test_after_sigterm_only_a_full_volume_is_no_preemption() -> None:
    stop = Stop(15)
    failing = _outage(ConnectionError("reset"))
    assert stop.on_the_way_down(failing) is failing
    stop.set()
    assert stop.on_the_way_down(failing).exit_code == ExitCode.PREEMPTED
    full = _outage(OSError(errno.ENOSPC, "No space left on device"))
    assert stop.on_the_way_down(full) is full


def test_a_failing_store_is_no_full_volume() -> None:
    assert not is_volume_full(_outage(ConnectionError("reset")))
    assert not is_volume_full(None)
