"""`python -m tests.objective VERB`: `python -m job VERB` with an objective in place of training.

Fakes `job.training.fit.fit` only, without torch: a trial's eval/loss is a function of its
parameters, which OBJECTIVE names. Command line, process 1, its child, ledger, lease, engine and
commit are the job's own. OBJECTIVE_LOADS is a file that gets a byte for each base that is loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from job import cli, supervisor, verbs
from job.__main__ import main
from job.child import run_as_child
from job.ledger.ledger import Ledger
from job.store.local import LocalStore
from job.training.state import TrainState
from job.trial.attempt import Training
from job.variables import load_settings
from tests import forked
from tests.workers import make_inputs

ROOT = Path(__file__).parents[1]
NUM_TRIALS = 12
SWEEP = """\
name: s
method: bayes
metric: {name: eval/loss, goal: minimize}
parameters:
  learning_rate: {distribution: log_uniform_values, min: 5.0e-6, max: 2.0e-4}
  gradient_accumulation_steps: {values: [4, 8]}
  lora_dropout: {values: [0.05, 0.1]}
  weight_decay: {values: [0.01, 0.05]}
"""


class Sweep:
    """A sweep of 12 in a folder of its own, and the job's command line on it."""

    def __init__(self, folder: Path) -> None:
        inputs = make_inputs(folder) | {"num_trials": NUM_TRIALS, "gpu_hourly_usd": 0.35}
        Path(inputs["sweep_file"]).write_text(SWEEP)
        self.ledger = Ledger(LocalStore(folder / "out"), "s")
        self.loads = folder / "loads"
        self._environ = {f"JOB_{name.upper()}": str(value) for name, value in inputs.items()}

    def job(self, *words: str, **changes: object) -> subprocess.CompletedProcess[str]:
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
                   "OMP_NUM_THREADS": "1", "OBJECTIVE_LOADS": str(self.loads)}  # fmt: skip
        done = forked.run(
            [sys.executable, "-m", "tests.objective", *words],
            env=environ | self._environ | {name: str(value) for name, value in changes.items()},
            cwd=ROOT, timeout=400,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def states(self) -> list[str]:
        return [self.ledger.slot(number).state() for number in range(NUM_TRIALS)]

    def num_loads(self) -> int:
        return self.loads.stat().st_size


UNTUNED = 1.9


def _flat(_params: dict[str, Any]) -> float:
    """Every trial is as good as every other: the engine can expect nothing of another one."""
    return 1.5


def _rough(params: dict[str, Any]) -> float:
    """Losses like dice, 0.5 nats wide: another throw may always be better."""
    digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()
    return 1.2 + 0.5 * int(digest[:4], 16) / 2**16


OBJECTIVES = {"flat": _flat, "rough": _rough}


class _Fitted:
    """What `fit` returns, as far as a trial reads it."""

    status, reason, peak_memory_bytes = "completed", "all planned steps", None
    rows_path = None

    def __init__(self, state: TrainState, history_path: Path) -> None:
        self.state, self.history_path = state, history_path


def _fit(attempt: Any, keeper: Any, work_dir: Path) -> Any:
    steps, state = attempt.spec.recipe.planned_steps, TrainState()
    history, folder = work_dir / "history.jsonl", work_dir / "best"
    history.write_text(json.dumps({"step": steps}) + "\n")
    keeper.report(first_step=0, step=0)
    loss = OBJECTIVES[os.environ["OBJECTIVE"]](attempt.spec.params)
    assert math.isfinite(loss)
    state.step, state.best_step, state.best_loss = steps, steps, loss
    state.curve = [(0, UNTUNED)] * attempt.spec.measure_step_0 + [(steps, loss)]
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_text(f"{loss}")
    kept = keeper.put_best(folder)
    state.best = {"key": kept.key, "sha256": kept.sha256, "bytes": kept.size_bytes}
    keeper.report(step=steps, eval_loss=loss)
    return _Fitted(state, history)


def _load_base(*_: Any) -> Any:
    with Path(os.environ["OBJECTIVE_LOADS"]).open("a") as file:
        file.write(".")


OBJECTIVE = Training(open_device=lambda *_: None, load_base=_load_base, fit=_fit)  # type: ignore[arg-type, return-value]


def _trial(options: Namespace) -> verbs.Ending:
    settings, _ = load_settings()

    def die(reason: str) -> None:
        sys.exit(reason)

    return run_as_child(settings, options.heartbeat_fd, die=die, training=OBJECTIVE)


if __name__ == "__main__":
    cli.VERBS["trial"] = replace(cli.VERBS["trial"], run=_trial)
    supervisor.TRIAL_COMMAND = (sys.executable, "-m", "tests.objective", "trial")
    sys.exit(main())
