"""Whether the kernel's OOM killer was at work in this container, and at which limit.

Version 2 of control groups counts in `memory.events`, version 1 in `memory.oom_control`:
https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files,
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html. Where Kubernetes has the whole group
killed (`memory.oom.group`, version 2), process 1 dies as well and the pod shows 137 instead.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path("/")
_UNLIMITED = 2**60  # version 1 gives a number near 2^63 where there is no limit


def oom_kills(root: Path = ROOT) -> int:
    """How many processes of this control group were killed for want of memory, ever."""
    for folder in _groups(root):
        for name in ("memory.events", "memory.oom_control"):
            if found := re.search(r"^oom_kill (\d+)$", _read(folder / name), re.MULTILINE):
                return int(found[1])
    return 0


def memory_limit(root: Path = ROOT) -> int | None:
    """The smallest memory limit above this process, in bytes; None if there is none."""
    texts = (
        _read(folder / name).strip()
        for folder in _groups(root)
        for name in ("memory.max", "memory.limit_in_bytes")
    )
    return min((int(t) for t in texts if t.isdecimal() and int(t) < _UNLIMITED), default=None)


def available_memory(root: Path = ROOT) -> int:
    """The memory that this process can still take, in bytes: the node's, or up to the limit."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE)
    if found is None:  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available, limit = int(found[1]) * 1024, memory_limit(root)
    return available if limit is None else min(available, limit)


def oom_words(root: Path = ROOT) -> str:
    """The line for a trial that the OOM killer ended."""
    limit = memory_limit(root)
    where = "this node's memory" if limit is None else f"the limit of {limit / 2**30:.3g} GiB"
    return (
        f"out of memory: the kernel killed the trial at {where}; raise resources.limits.memory"
        " (docker run --memory), take a smaller JOB_BASE_MODEL, or lower JOB_MAX_SEQ_LENGTH on a"
        " CPU; what lies in a JOB_WORK_DIR in memory (tmpfs) counts, too"
    )


def _groups(root: Path) -> list[Path]:
    """The folders of this process' control group and of those above it, the nearest first."""
    folders = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        own = top / path.lstrip("/")
        # In a container the path may be the node's, while the folder shown is the container's.
        folders += [own, *(p for p in own.parents if p.is_relative_to(top))]
    return folders


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
