"""What W&B costs a trial: the same real trial with and without a key, in turns.

`python -m benchmarks.wandb [ROUNDS]`; the server is the tests', on loopback, so the network is not
in it. A tiny model makes steps of some milliseconds: W&B's part is then as large as it can be.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.servers.wandb import API_KEY, WandbServer, wandb_server
from tests.tiny_model import make_base
from tests.workers import make_inputs

STEPS = 200
TRIAL = [sys.executable, "-m", "job"]


def _trial(environ: dict[str, str], out: Path) -> tuple[float, dict[str, Any]]:
    """Wall seconds of a trial, and its result."""
    started = time.monotonic()
    given = environ | {"JOB_OUTPUT_URI": str(out)}
    done = subprocess.run(TRIAL, env=given, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    (path,) = out.glob("sweeps/*/slots/0000/result.json")
    return seconds, json.loads(path.read_text())


def _environ(folder: Path) -> dict[str, str]:
    settings = make_inputs(folder) | {
        "device": "cpu", "max_steps": STEPS, "num_epochs": 99, "num_trials": 1, "patience": 99,
        "lease_seconds": 30, "checkpoint_minutes": 5,
    }  # fmt: skip
    make_base(folder / "base", vocab_size=600)
    variables = {f"JOB_{name.upper()}": str(value) for name, value in settings.items()}
    return variables | {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _kinds(server: WandbServer) -> dict[str, dict[str, str]]:
    key = {"WANDB_API_KEY": API_KEY, "WANDB_BASE_URL": server.url, "WANDB_PROJECT": "qlora"}
    return {
        "without W&B": {},
        "mirrored": key,
        "drawn from a W&B sweep": key | {"WANDB_SWEEP_ID": "team/qlora/abc"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", nargs="?", type=int, default=5, help="of each side in turn")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name, wandb_server() as server:
        folder = Path(name)
        server.state.add_sweep(_SWEEP, "abc")
        environ = _environ(folder)
        seen: dict[str, list[tuple[float, float]]] = {}
        for number in range(rounds + 1):
            for kind, variables in _kinds(server).items():
                given = environ | variables
                if "WANDB_SWEEP_ID" in given:
                    del given["JOB_SWEEP_FILE"]
                out = folder / f"{number}-{kind.replace(' ', '-')}"
                seconds, result = _trial(given, out)
                if number:  # the first round fills caches
                    train = result["phase_seconds"]["train"]
                    seen.setdefault(kind, []).append((seconds, train))
    base_wall, base_train = _medians(seen["without W&B"])
    print("| trial | seconds | lowest | more | training | lowest | more a step |")
    print("|---|---|---|---|---|---|---|")
    for kind, pairs in seen.items():
        wall, train = _medians(pairs)
        lowest_wall, lowest_train = (min(column) for column in zip(*pairs, strict=True))
        step = 1000 * (train - base_train) / STEPS
        print(
            f"| {kind} | {wall:.2f} | {lowest_wall:.2f} | {wall - base_wall:+.2f} s"
            f" | {train:.2f} | {lowest_train:.2f} | {step:+.2f} ms |"
        )
    print(f"\n{STEPS} steps, medians of {rounds} rounds")


def _medians(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    walls, trains = zip(*pairs, strict=True)
    return statistics.median(walls), statistics.median(trains)


_SWEEP = """\
method: random
metric: {name: eval/loss, goal: minimize}
parameters:
  learning_rate: {distribution: log_uniform_values, min: 1.0e-4, max: 1.0e-2}
"""

if __name__ == "__main__":
    main()
