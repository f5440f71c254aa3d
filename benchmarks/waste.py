"""Steps done twice when a trial is killed or told to end again and again.

`python -m benchmarks.waste [SEED]`: real lease, uploads and trial code in real processes, training
that sleeps and resumes (tests/fake_training.py). The times between two kills are drawn from an
exponential distribution whose mean is two checkpoint intervals. Prints a table.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

INTERVAL_SECONDS = 1.0
MEAN_SECONDS = 2 * INTERVAL_SECONDS  # of an attempt's training before it is ended
NUM_STEPS = 8000
SEED = 17


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", nargs="?", type=int, default=SEED, help="of the times")
    seed = parser.parse_args().seed
    print("| signal | kills | steps | done twice | share | steps a kill | intervals a kill |")
    print("|---|---|---|---|---|---|---|")
    for number in (signal.SIGKILL, signal.SIGTERM):
        with tempfile.TemporaryDirectory() as name:
            kills, steps, twice, seconds = measure(number, Path(name), seed=seed)
        per_kill = twice / max(1, kills)
        intervals = per_kill * seconds / (steps + twice) / INTERVAL_SECONDS
        print(
            f"| {number.name} | {kills} | {steps} | {twice} | {twice / steps:.1%} |"
            f" {per_kill:.2f} | {intervals:.2f} |",
            flush=True,
        )


def measure(
    number: signal.Signals, folder: Path, *, num_steps: int = NUM_STEPS, seed: int = SEED
) -> tuple[int, int, int, float]:
    """Kills, steps of the trial, steps done twice, and the seconds that training took in all."""
    from job.ledger.ledger import Ledger
    from job.store.local import LocalStore
    from tests.workers import make_inputs, start_worker

    settings = make_inputs(folder) | {
        "num_trials": 1, "completion_index": 0, "max_steps": num_steps, "num_epochs": 10_000,
        "checkpoint_minutes": INTERVAL_SECONDS / 60, "evals_per_trial": 2,
    }  # fmt: skip
    store = LocalStore(folder / "out")
    draw = random.Random(seed)  # when to kill, nothing secret
    kills = done = 0
    seconds = 0.0
    log = folder / "steps"
    os.environ["FAKE_TRAINING_LOG"] = str(log)
    try:
        while (result := Ledger(store, "s").slot(0).result()) is None:
            log.write_text("")
            worker = start_worker(settings, lambda: store)
            _wait_for_steps(log, worker)
            started = time.monotonic()
            if not _ended(worker, draw.expovariate(1 / MEAN_SECONDS)):
                os.kill(worker, number)
                kills += 1
            seconds += time.monotonic() - started
            os.waitpid(worker, 0)
            done += len(log.read_text())
    finally:
        del os.environ["FAKE_TRAINING_LOG"]
    return kills, result.steps, done - result.steps, seconds


def _wait_for_steps(log: Path, worker: int) -> None:
    deadline = time.monotonic() + 60
    while not log.stat().st_size and not _ended(worker, 0.002):
        if time.monotonic() > deadline:
            raise RuntimeError("the trial does not begin to train")


def _ended(worker: int, seconds: float) -> Any:
    """The worker has ended, or does so within `seconds`; it is not reaped."""
    descriptor = os.pidfd_open(worker)
    try:
        return select.select([descriptor], [], [], seconds)[0]
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
