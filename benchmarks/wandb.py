"""What W&B adds to a trial, and to a logged step, against the same trial without.

`python -m benchmarks.wandb`: whole processes (`python -m job`) with a tiny model on the CPU, the
real client, and the tests' server on loopback; three ways in turn, three rounds, medians. The
network to the real service is not in it. Results: benchmarks/wandb.md.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.servers.wandb import API_KEY, WandbServer, wandb_server
from tests.tiny_model import make_base
from tests.workers import make_inputs

ROUNDS = 3
SHORT, LONG = 40, 440  # optimizer steps
WAYS = ("without W&B", "mirrored", "W&B sweep")


def main() -> None:
    """Run all trials, print a table."""
    seconds: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name, wandb_server() as server:
        inputs = make_inputs(Path(name)) | {"device": "cpu", "num_epochs": 1000, "num_trials": 1}
        make_base(Path(name) / "base", vocab_size=600)
        for number in range(ROUNDS):
            for steps in (SHORT, LONG):
                for way in WAYS:
                    out = Path(name) / f"out-{way}-{steps}-{number}"
                    given = inputs | {"max_steps": steps, "output_uri": out, "patience": 1000}
                    seconds.setdefault((way, steps), []).append(_trial(way, given, server))
    print("| trial of | steps | seconds | CPU seconds | added seconds | added a step, ms |")
    print("|---|---|---|---|---|---|")
    for steps in (SHORT, LONG):
        for way in WAYS:
            print(_row(seconds, way, steps))


def _row(seconds: dict[tuple[str, int], list[tuple[float, float]]], way: str, steps: int) -> str:
    wall, cpu = (statistics.median(run[k] for run in seconds[way, steps]) for k in (0, 1))
    added = wall - statistics.median(run[0] for run in seconds[WAYS[0], steps])
    short = [statistics.median(run[0] for run in seconds[w, SHORT]) for w in (way, WAYS[0])]
    a_step = 1000 * (added - (short[0] - short[1])) / (LONG - SHORT) if steps == LONG else None
    shown = "" if a_step is None or way == WAYS[0] else f"{a_step:.1f}"
    plus = "" if way == WAYS[0] else f"{added:.1f}"
    return f"| {way} | {steps} | {wall:.1f} | {cpu:.1f} | {plus} | {shown} |"


def _trial(way: str, given: dict[str, object], server: WandbServer) -> tuple[float, float]:
    """Wall and CPU seconds of a trial's processes."""
    environ = {
        **{f"JOB_{name.upper()}": str(value) for name, value in given.items()},
        **{name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ},
        "HOME": str(Path(str(given["output_uri"])).parent),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if way != WAYS[0]:
        environ |= {"WANDB_API_KEY": API_KEY, "WANDB_BASE_URL": server.url, "WANDB_PROJECT": "p"}
    if way == "W&B sweep":
        created = _job(["sweep", "create"], environ)
        environ["WANDB_SWEEP_ID"] = created.partition("WANDB_SWEEP_ID=")[2].split()[0]
        del environ["JOB_SWEEP_FILE"]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    _job([], environ)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - started
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _job(words: list[str], environ: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "job", *words],
        env=environ, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


if __name__ == "__main__":
    main()
