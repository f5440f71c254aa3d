"""Bars on a terminal, lines in a pod. `pytest tests/test_progress.py`"""

from __future__ import annotations

import io
import logging
import sys
import threading

import pytest

from job.progress import CountProgress, StepProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> None:
    """All lines of our logger; under pytest stderr is no terminal."""
    caplog.set_level(logging.INFO, "job")


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """From here to the end of the test; pytest puts its own stderr back after a fixture."""
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def test_a_pod_gets_a_line_every_half_minute(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with CountProgress("upload of x", "bytes", total=200_000_000, clock=clock) as progress:
        for _ in range(100):
            clock.now += 1
            progress.advance(2_000_000)
    assert caplog.messages == [
        "upload of x: 60 MB of 200 MB, 2 MB/s",
        "upload of x: 120 MB of 200 MB, 2 MB/s",
        "upload of x: 180 MB of 200 MB, 2 MB/s",
        "upload of x: done, 200 MB of 200 MB, 2 MB/s in 100 s",
    ]


def test_what_is_quick_or_fails_says_nothing_more(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with CountProgress("quick", "bytes", clock=clock) as progress:
        clock.now += 20
        progress.advance(1)

    def fail() -> None:
        with CountProgress("reading", "rows", clock=clock) as rows:
            clock.now += 40
            rows.advance(80_000)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert caplog.messages == ["reading: 80,000 rows, 2,000 rows/s"]


def test_a_try_that_starts_over_takes_back_what_it_counted(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with CountProgress("x", "rows", clock=clock) as progress:
        progress.expect(10)
        progress.advance(8)
        progress.advance(-8)
        clock.now += 40
        progress.advance(4)
    assert caplog.messages[0] == "x: 4 of 10 rows, 0 rows/s"


def test_steps_have_a_note(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with StepProgress("training", 5, clock=clock) as progress:
        progress.update(1, "loss 2")
        clock.now += 31
        progress.update(2, "loss 1", total=6)
    assert caplog.messages == ["training: 2/6, loss 1"]


def test_a_terminal_shows_bars_of_work_in_several_threads(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    terminal = open_terminal(monkeypatch)
    with StepProgress("training", 10, clock=clock) as steps:
        clock.now += 2
        steps.update(3, "loss 1")

        def upload() -> None:
            with CountProgress("upload of [/x]", "bytes", total=4_000_000, clock=clock) as progress:
                clock.now += 2
                progress.advance(1_000_000)

        thread = threading.Thread(target=upload)
        thread.start()
        thread.join(timeout=10)
        steps.update(4, "loss 0")
    shown = terminal.getvalue()
    assert "4/10, loss 0" in shown
    assert "upload of [/x]" in shown  # no markup of rich, which would be a closing tag here
    assert "1 MB of 4 MB, 500 kB/s" in shown
    assert sys.stderr is terminal, "the live display gave stderr back"


def test_a_terminal_shows_no_bar_of_what_takes_no_time(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    terminal = open_terminal(monkeypatch)
    with CountProgress("x", "bytes", total=10, clock=clock) as progress:
        progress.advance(10)
    assert terminal.getvalue() == ""
