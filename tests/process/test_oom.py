"""The kernel's OOM killer, by the counts of control groups. `pytest tests/process/test_oom.py`

The files are laid out as the kernel's documents say (admin-guide/cgroup-v2, cgroup-v1/memory) and
as containers show them; nothing is killed for want of memory here.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from job.process.oom import available_memory, memory_limit, oom_kills, oom_words

V2 = "low 0\nhigh 0\nmax 5\noom 1\noom_kill {}\noom_group_kill 0\n"
V1 = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"
LIMIT = 8 * 2**30


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _v2(root: Path, kills: int, *, group: str = "/", limit: str = str(LIMIT)) -> None:
    _write(root / "proc/self/cgroup", f"0::{group}\n")
    folder = root / "sys/fs/cgroup" / group.lstrip("/")
    _write(folder / "memory.events", V2.format(kills))
    _write(folder / "memory.max", f"{limit}\n")


def _v1(root: Path, kills: int, *, shown: str = "", limit: str = str(LIMIT)) -> None:
    """`shown` is the group's folder as this container sees it; the path is the node's."""
    groups = "12:cpu,cpuacct:/kubepods/x\n5:memory:/kubepods/x\n1:name=systemd:/kubepods/x\n"
    _write(root / "proc/self/cgroup", groups)
    _write(root / "sys/fs/cgroup/memory" / shown / "memory.oom_control", V1.format(kills))
    _write(root / "sys/fs/cgroup/memory" / shown / "memory.limit_in_bytes", f"{limit}\n")


def test_version_2_is_read_in_a_container_and_on_a_node(tmp_path: Path) -> None:
    _v2(tmp_path, 3)
    assert (oom_kills(tmp_path), memory_limit(tmp_path)) == (3, LIMIT)
    _v2(tmp_path, 4, group="/system.slice/job.service", limit="max")
    assert (oom_kills(tmp_path), memory_limit(tmp_path)) == (4, LIMIT), "the one above counts"


@pytest.mark.parametrize("shown", ["", "kubepods/x"])
def test_version_1_is_read_wherever_it_is_shown(tmp_path: Path, shown: str) -> None:
    _v1(tmp_path, 2, shown=shown)
    assert (oom_kills(tmp_path), memory_limit(tmp_path)) == (2, LIMIT)


def test_no_limit_and_no_control_groups_are_no_error(tmp_path: Path) -> None:
    assert (oom_kills(tmp_path), memory_limit(tmp_path)) == (0, None)
    _v1(tmp_path, 0, limit="9223372036854771712")
    assert memory_limit(tmp_path) is None
    assert "at this node's memory" in oom_words(tmp_path)
    _v2(tmp_path, 0)
    assert "the limit of 8 GiB" in oom_words(tmp_path)


def test_this_machines_own_files_can_be_read() -> None:
    assert oom_kills() >= 0


def test_what_can_still_be_taken_is_the_nodes_or_up_to_the_limit(tmp_path: Path) -> None:
    _v2(tmp_path, 0)
    _write(tmp_path / "proc/meminfo", "MemTotal: 99 kB\nMemAvailable:    4194304 kB\n")
    assert available_memory(tmp_path) == 4 * 2**30
    _write(tmp_path / "proc/meminfo", "MemTotal: 99 kB\nMemAvailable:   33554432 kB\n")
    assert available_memory(tmp_path) == LIMIT
    _write(tmp_path / "proc/meminfo", "")
    assert available_memory(tmp_path) > 2**20, "where the kernel does not tell, the machine's"
