"""An attempt's work folder and what killed ones leave. `pytest tests/process/test_workspace.py`"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path

import pytest

from job.process.workspace import attempt_folder, filling


def _child(work_dir: Path) -> int:
    """Start a process that has an attempt's folder, says so and waits for its end."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        with attempt_folder(work_dir) as folder:
            (folder / "checkpoint-1").mkdir()
            (folder / "checkpoint-1" / "adapter.safetensors").write_bytes(bytes(1000))
            os.write(told, b".")
            signal.alarm(60)  # whatever becomes of the test
            signal.pause()
        os._exit(0)
    assert os.read(ready, 1) == b"."
    os.close(ready)
    os.close(told)
    return pid


def _folders(work_dir: Path) -> list[Path]:
    return sorted(work_dir.glob("*attempt-*"))


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_the_folder_of_a_killed_attempt_is_swept_and_a_living_ones_is_not(tmp_path: Path) -> None:
    killed, frozen = _child(tmp_path), _child(tmp_path)
    try:
        os.kill(frozen, signal.SIGSTOP)
        assert len(_folders(tmp_path)) == 2
        _kill(killed)
        (tmp_path / "attempt-older").mkdir()  # killed before it had a lock
        with attempt_folder(tmp_path) as own:
            assert own.is_dir()
            assert len(_folders(tmp_path)) == 2, "its own, and that of the frozen process"
            assert len(list(tmp_path.glob("attempt-*/files/checkpoint-1/*"))) == 1
        assert len(_folders(tmp_path)) == 1
    finally:
        _kill(frozen)
    with attempt_folder(tmp_path):
        assert len(_folders(tmp_path)) == 1
    assert _folders(tmp_path) == []


def test_other_files_in_the_work_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "prepared").mkdir()
    (tmp_path / "attempt-notes.txt").write_text("a file, no folder")
    with attempt_folder(tmp_path):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["attempt-notes.txt", "prepared"]


def test_who_waited_long_enough_for_a_shared_folder_goes_on(tmp_path: Path) -> None:
    looks: list[None] = []
    with (
        filling(tmp_path / "base", limit_seconds=60),
        filling(tmp_path / "base", limit_seconds=0.3, should_stop=lambda: looks.append(None)),
    ):
        assert looks, "asked while it waited"
    looks.clear()
    with filling(tmp_path / "base", limit_seconds=60, should_stop=lambda: looks.append(None)):
        assert not looks, "free again"


def test_a_volume_without_locks_is_no_reason_to_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with filling(tmp_path / "base", limit_seconds=60, should_stop=lambda: pytest.fail("waits")):
        assert (tmp_path / "base").is_dir()
