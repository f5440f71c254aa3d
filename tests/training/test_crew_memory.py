"""Ranks that wait for each other, and those that run out of memory between two messages.

`pytest tests/training/test_crew_memory.py`
"""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from job.errors import ExitCode, GpuError, PreemptedError
from tests.tiny_model import make_recipe, make_table

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NO_ROOM = "1 GPUs of this node ran out of memory"


def test_rank_0_waits_for_every_rank_and_hears_a_sigterm_meanwhile(tmp_path: Path) -> None:
    """Ranks that still load a model; in a collective rank 0 would hear nothing for 30 minutes."""
    import torch

    from job.training.crew import TASK_FILE, Crew, CrewPlan, ready_file

    looks, ended = [], threading.Event()

    def should_stop() -> None:
        looks.append((tmp_path / TASK_FILE).exists())
        if len(looks) == 1:
            (tmp_path / ready_file(1)).touch()
        if len(looks) == 3:
            raise PreemptedError("told to end")

    def gather() -> None:
        plan, tables = CrewPlan(tmp_path, 3, "base", None), (make_table(2, 1), make_table(2, 2))
        with pytest.raises(PreemptedError):
            Crew.gather(plan, make_recipe(), tables, torch.device("cpu"), should_stop)
        ended.set()

    threading.Thread(target=gather, daemon=True).start()
    assert ended.wait(10), "rank 0 waits where it hears nothing"
    assert looks == [True, True, True], "rank 2 is not ready, and all know what to load"


def _order(seed: int) -> Any:
    from job.training.crew import Order

    return Order("step", [[0], [1]], 64, "none", seed)


def _follower(meeting: Path, act: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.short_of_memory", str(meeting), act],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_dismissed_rank_leaves_no_connection_to_its_exit(tmp_path: Path) -> None:
    """Its threads may abort the process there, and a trial that was done would fail."""
    from job.training.crew import Crew, join
    from tests.training.short_of_memory import CPU

    follower = _follower(tmp_path, "be dismissed")
    limit = threading.Timer(60, follower.kill)
    limit.start()
    try:
        join(tmp_path, rank=0, size=2, device=CPU)
        Crew(2).dismiss()
        said, _ = follower.communicate(timeout=30)
    finally:
        limit.cancel()
        follower.kill()
        follower.wait()
    assert (said, follower.returncode) == ("None False\n", 0)


def test_a_rank_without_room_at_the_last_moment_keeps_all_in_step(tmp_path: Path) -> None:
    import torch

    from job.training.crew import Crew, join
    from tests.training.short_of_memory import CPU, NoRoomToFlatten, summed, two_parameters

    follower = _follower(tmp_path, "run out of memory")
    limit = threading.Timer(60, follower.kill)  # ranks out of step would wait for each other
    limit.start()
    try:
        join(tmp_path, rank=0, size=2, device=CPU)
        parameters, total = two_parameters(1.0), torch.tensor(2.0)
        assert summed(parameters, total) == NO_ROOM, "the follower has none"
        assert (float(total), parameters[0].grad.tolist()) == (2.0, [1.0, 1.0])
        with NoRoomToFlatten():
            assert summed(parameters, total) == NO_ROOM
        assert (float(total), parameters[0].grad.tolist()) == (2.0, [1.0, 1.0])
        assert summed(parameters, total) == "summed"
        assert float(total) == 7.0
        assert [p.grad.tolist() for p in parameters] == [[11.0, 11.0], [0.0, 0.0, 0.0]]
        crew = Crew(2)
        with NoRoomToFlatten(), pytest.raises(torch.OutOfMemoryError):
            crew.give(_order(1), parameters)
        parameters[0].data.fill_(4.0)
        crew.give(_order(2), parameters)
        with pytest.raises(GpuError, match="another process of this trial is gone"):
            crew.give(_order(3), parameters)
        said, _ = follower.communicate(timeout=30)
    finally:
        limit.cancel()
        follower.kill()
        follower.wait()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert said.splitlines() == [
        NO_ROOM,
        NO_ROOM,
        "summed",
        "2 [4.0, 4.0]",  # nothing was said of order 1
        "no room on this GPU for a copy of the adapter's weights",
    ]
    assert follower.returncode == ExitCode.GPU, "and no abort at its exit"
