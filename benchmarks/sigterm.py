"""Seconds from SIGTERM to the end of all processes, in every phase of a trial, on a slow store.

`python -m benchmarks.sigterm`: real parent and child processes, the trial's own code, training that
sleeps instead of computing, checkpoints of 130 MB at 20 MB/s and of 1 GB at 10 MB/s. Every signal
is sent twice. Prints a table; stops if one outlives the grace of 15 s or ends in another code.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

GRACE_SECONDS = 15
PHASES = [
    "start-up", "data preparation", "model load", "training", "evaluation", "upload", "commit",
]  # fmt: skip
LINES = [(130, 20), (1000, 10)]  # MB of a checkpoint, MB/s of the store


@dataclass(frozen=True)
class Case:
    """One trial that is told to end in one phase."""

    phase: str
    megabytes: int
    rate: float  # MB/s
    number: signal.Signals = signal.SIGTERM
    grace_seconds: float = GRACE_SECONDS


@dataclass(frozen=True)
class Outcome:
    """The end of a case as it was seen."""

    seconds: float
    code: int
    saved_step: int | None
    step: int | None  # as the lease heard last


def main() -> None:
    given = _parse()
    if given.parent:
        sys.exit(_parent(given.parent))
    if given.child:
        sys.exit(_child(*given.child))
    print("| checkpoint, store | phase | signal | seconds to exit | code | saved step |")
    print("|---|---|---|---|---|---|")
    cases = [Case(phase, *line) for line in LINES for phase in PHASES]
    cases.append(Case("training", *LINES[0], number=signal.SIGINT))
    with tempfile.TemporaryDirectory() as name:
        for number, case in enumerate(cases):
            seen = measure(case, Path(name) / str(number))
            saved = "none yet" if seen.saved_step is None else f"{seen.saved_step} of {seen.step}"
            print(
                f"| {case.megabytes} MB, {case.rate:g} MB/s | {case.phase} | {case.number.name} |"
                f" {seen.seconds:.1f} | {seen.code} | {saved} |",
                flush=True,
            )
            if seen.seconds >= GRACE_SECONDS or seen.code != (0 if case.phase == "commit" else 75):
                sys.exit("a promise is broken")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for process in ("--parent", "--child"):  # of a trial: settings, phase, MB, MB/s
        parser.add_argument(process, nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--heartbeat-fd", help=argparse.SUPPRESS)  # which process 1 adds
    return parser.parse_args()


def measure(case: Case, folder: Path) -> Outcome:
    """Run the trial to the phase, signal its parent twice, and wait for the end of all."""
    folder.mkdir()
    settings = _inputs(folder, case)
    command = [
        sys.executable, "-m", "benchmarks.sigterm", "--parent", json.dumps(settings), case.phase,
        str(case.megabytes), str(case.rate),
    ]  # fmt: skip
    environ = {**os.environ, **{f"JOB_{k.upper()}": str(v) for k, v in settings.items()}}
    pipe = subprocess.PIPE
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, stdout=pipe, text=True, stderr=log, env=environ) as process,
    ):
        out = process.stdout
        if out is None or not any(line.strip() == case.phase for line in out):
            raise RuntimeError((folder / "log").read_text())
        time.sleep(0.3)  # well into the phase
        started = time.monotonic()
        process.send_signal(case.number)
        process.send_signal(case.number)
        out.read()  # until the last process that holds it has ended
        code = process.wait(timeout=60)
        seconds = time.monotonic() - started
    return Outcome(seconds, code, *_steps(folder / "out"))


def _inputs(folder: Path, case: Case) -> dict[str, object]:
    from tests.workers import make_inputs

    settings = make_inputs(folder) | {
        "num_trials": 1, "checkpoint_minutes": 1 / 60, "lease_seconds": 60,
        "grace_seconds": case.grace_seconds,
    }  # fmt: skip
    if case.phase == "data preparation":  # long enough to fall into
        rows = (json.dumps({"question": f"{i}+{i}?", "answer": str(2 * i)}) for i in range(60_000))
        (folder / "rows.jsonl").write_text("\n".join(rows))
    return settings


def _steps(out: Path) -> tuple[int | None, int | None]:
    from job.ledger.ledger import Ledger
    from job.store.local import LocalStore

    stored = Ledger(LocalStore(out), "s").slot(0).lease()
    if stored is None or not stored.lease.checkpoints:
        return None, None
    return stored.lease.checkpoints[0].step, stored.lease.attempt.step


def _parent(words: list[str]) -> int:
    from job import supervisor
    from job.log import set_up_logging
    from job.variables import load_settings

    set_up_logging("text")
    supervisor.TRIAL_COMMAND = (
        sys.executable, "-m", "benchmarks.sigterm", "--child", *words,
    )  # fmt: skip
    settings, _ = load_settings()
    return supervisor.run_one(settings)[0]


def _child(words: str, phase: str, megabytes: str, rate: str) -> int:
    """What `job trial` does, on a slow store and with training that sleeps."""
    print("start-up", flush=True)
    from job.errors import JobError
    from job.log import log, set_up_logging
    from job.process.stop import Stop
    from job.process.watchdog import Watchdog
    from job.settings import Settings
    from job.trial.run import run_trial_on
    from tests.throttled import BigTraining, ThrottledStore

    def mark(phase: str) -> None:
        print(phase, flush=True)

    set_up_logging("text")
    settings = Settings(**json.loads(words))
    stop = Stop(settings.grace_seconds)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop.set)
    training = BigTraining(
        int(megabytes),
        mark,
        load_seconds=60 if phase == "model load" else 0,
        eval_seconds=60 if phase == "evaluation" else 0,
        num_steps={"upload": 200, "commit": 4}.get(phase, 60),
    )
    store = ThrottledStore(
        Path(settings.output_uri), float(rate) * 1e6, mark,
        document_seconds=1 if phase == "commit" else 0.05,
    )  # fmt: skip
    watchdog = Watchdog(stop, lambda _: None)
    try:
        log.info("%s", run_trial_on(store, settings, stop, training.training(), watchdog))
    except JobError as error:
        log.error("exit %d: %s", error.exit_code, error)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    main()
