"""A worker with an empty disk gets a 500 MB base: from the bucket, against the hub's own client.

`python -m benchmarks.base`: hub, buckets and all sides in one run. Each side is a new process with
an empty HOME, and they take turns. The hub is tests/servers/hub.py, the buckets are a folder, moto
and, where `make azurite` was run, Azurite. Prints a table; stops if any byte differs.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import azurite, s3
from tests.servers.hub import COMMIT, hub_server

NAME = "owner/model"
NUM_SHARDS, SHARD_BYTES = 2, 250_000_000
LIMIT_SECONDS = 300
ROOT = Path(__file__).parents[1]
TAKE = """
import sys
from pathlib import Path
from job.staged_base import resolve_base
from job.store import open_store
uri, work = sys.argv[1:]
print(resolve_base(open_store(uri), "owner/model", "a" * 40, Path(work), outage_seconds=60,
                   should_stop=lambda: None).location)
"""
HUB = """
from huggingface_hub import snapshot_download
print(snapshot_download("owner/model", revision="a" * 40))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of each side; medians are shown")
    parser.add_argument("--dir", help="where the files are written")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=arguments.dir) as name,
        hub_server() as hub,
        pytest.MonkeyPatch.context() as patch,
        contextlib.ExitStack() as stack,
    ):
        folder = Path(name)
        hub.repositories[f"models/{NAME}"] = files = _model()
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        patch.setenv("HF_HUB_DISABLE_XET", "1")  # the local hub has none
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        sides = {"the hub's client": [sys.executable, "-c", HUB]}
        for kind, uri in _buckets(folder, patch, stack):
            _run(folder, [sys.executable, "-m", "job", "stage"], JOB_OUTPUT_URI=uri)
            sides[f"our copy in {kind}"] = [sys.executable, "-c", TAKE, uri]
        seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for _ in range(arguments.rounds):
            for side, command in sides.items():
                seconds[side].append(_one(folder, side, command, files))
    _print(seconds, arguments.rounds)


def _model() -> dict[str, bytes]:
    """A config and two files of weights, of random bytes behind a whole header."""
    tensor = {"dtype": "U8", "shape": [SHARD_BYTES], "data_offsets": [0, SHARD_BYTES]}
    header = json.dumps({"w": tensor}).encode()
    head = len(header).to_bytes(8, "little") + header
    names = [f"model-{i + 1:05d}-of-{NUM_SHARDS:05d}.safetensors" for i in range(NUM_SHARDS)]
    index = json.dumps({"weight_map": {name: name for name in names}}).encode()
    return {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors.index.json": index,
        **{name: head + os.urandom(SHARD_BYTES) for name in names},
    }


def _buckets(
    folder: Path, patch: pytest.MonkeyPatch, stack: contextlib.ExitStack
) -> Iterator[tuple[str, str]]:
    yield "a folder", str(folder / "out")
    s3.use(patch, stack.enter_context(s3.moto_server(folder)))
    yield "moto (s3://)", f"s3://{s3.BUCKET}/out"
    if azurite.INSTALLED.exists():
        azurite.use(patch, stack.enter_context(azurite.azurite_server(folder)))
        yield "Azurite (az://)", f"az://{s3.BUCKET}/out"


def _run(folder: Path, command: list[str], **environ: str) -> str:
    settings = {
        "HOME": str(folder), "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT),
        "JOB_BASE_MODEL": NAME, "JOB_WORK_DIR": str(folder), "JOB_SWEEP_NAME": "s",
        "JOB_BASE_MODEL_REVISION": COMMIT,
    }  # fmt: skip
    done = subprocess.run(
        command,
        env={**os.environ, **settings, **environ},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    return done.stdout.strip()


def _one(
    folder: Path, side: str, command: list[str], files: dict[str, bytes]
) -> tuple[float, float]:
    """Seconds and CPU seconds of one side on an empty disk; its bytes are compared."""
    disk = folder / "disk"
    work = [str(disk / "work")] if "copy" in side else []
    began, cpu = time.monotonic(), _child_cpu_seconds()
    location = _run(folder, [*command, *work], HOME=str(disk), HF_HOME=str(disk / "hf"))
    seconds, cpu = time.monotonic() - began, _child_cpu_seconds() - cpu
    for name, data in files.items():
        (folder / "expected").write_bytes(data)
        if not filecmp.cmp(folder / "expected", Path(location) / name, shallow=False):
            raise RuntimeError(f"{side}: {name} differs")
    shutil.rmtree(disk)
    return seconds, cpu


def _child_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _print(seconds: dict[str, list[tuple[float, float]]], rounds: int) -> None:
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    print(f"{platform.platform()}, {os.cpu_count()} cores, load average {load}, {rounds} rounds\n")
    print(
        "| 500 MB base on an empty disk | median s | least | most | CPU s |\n|---|---|---|---|---|"
    )
    for side, rows in seconds.items():
        taken = [row[0] for row in rows]
        cpu = statistics.median(row[1] for row in rows)
        print(
            f"| {side} | {statistics.median(taken):.2f} | {min(taken):.2f} | {max(taken):.2f} |"
            f" {cpu:.2f} |"
        )


if __name__ == "__main__":
    main()
