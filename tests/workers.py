"""Forked processes that work on a sweep with real ledger, lease, uploads and trial code."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from job.data.tokens import load_tokenizer
from job.errors import JobError
from job.ledger.accounts import read_accounts
from job.ledger.ledger import Ledger
from job.process.stop import Stop
from job.process.watchdog import Watchdog
from job.settings import Settings
from job.store.base import Store
from job.trial.attempt import Training
from job.trial.run import run_trial_on
from tests.fake_training import FAKE_TRAINING
from tests.tiny_tokenizer import byte_level_tokenizer

SWEEP = """\
name: s
method: random
metric: {name: eval/loss, goal: minimize}
parameters:
  learning_rate: {distribution: log_uniform_values, min: 1.0e-4, max: 1.0e-2}
"""
LEASE_SECONDS = 0.4


def make_inputs(folder: Path) -> dict[str, Any]:
    """Rows, a base that is only looked at, and a sweep file; settings for `Settings`."""
    base = folder / "base"
    byte_level_tokenizer().save_pretrained(base)
    (base / "config.json").write_text('{"model_type": "llama"}')
    (base / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")  # never loaded
    rows = [{"question": f"{a}+{b}?", "answer": str(a + b)} for a in range(9) for b in range(9)]
    # Imported once here, or every forked worker would spend seconds on it.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    load_tokenizer(str(base))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sweep.yaml").write_text(SWEEP)
    return {
        "base_model": str(base),
        "dataset_uri": str(folder / "rows.jsonl"),
        "output_uri": str(folder / "out"),
        "work_dir": str(folder / "work"),
        "sweep_file": str(folder / "sweep.yaml"),
        "use_full_dataset": True,
        "max_steps": 16,
        "num_epochs": 10,
        "evals_per_trial": 4,
        "lease_seconds": LEASE_SECONDS,
        "checkpoint_minutes": 0.02 / 60,  # every few steps
        "grace_seconds": 8,
    }


def start_worker(
    settings: dict[str, Any],
    open_store: Callable[[], Store],
    *,
    training: Training = FAKE_TRAINING,
) -> int:
    """Fork a process that runs one trial; its exit code is the job's. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        code = _work(settings, open_store(), training)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _work(given: dict[str, Any], store: Store, training: Training) -> int:
    settings = Settings(**given)
    stop = Stop(settings.grace_seconds)
    signal.signal(signal.SIGTERM, stop.set)
    logging.disable(logging.CRITICAL)
    try:
        run_trial_on(store, settings, stop, training, Watchdog(stop, _never_started))
    except JobError as error:
        return int(error.exit_code)
    return 0


def check_accounts(ledger: Ledger, slot: int) -> int:
    """Check the attempts' documents against the result; return the steps that were done twice."""
    result = ledger.slot(slot).result()
    assert result is not None
    assert ledger.slot(slot).lease() is not None
    told = read_accounts(ledger.slot(slot))
    # One that was frozen between its last renewal and its commit does not know of the next one.
    attempts = [a for a in told if a.epoch <= result.attempts]
    assert [a.epoch for a in attempts] == list(range(1, result.attempts + 1))
    if attempts[-1].state == "ended" and attempts[-1].exit_code == 0:
        assert attempts[-1].reason == f"committed: {result.status}"
        for name in ("gpu_seconds", "wasted_gpu_seconds"):
            told_in_all, committed = sum(getattr(a, name) for a in attempts), getattr(result, name)
            assert abs(told_in_all - committed) < 0.051 * len(attempts), name
    return sum(
        max(0, (a.last_step or 0) - max(a.saved_step or 0, a.first_step or 0))
        for a in attempts[:-1]
    )


def _never_started(reason: str) -> None:
    raise AssertionError(reason)


def wait_for(pid: int, timeout_seconds: float = 60) -> int:
    """The worker's exit code, or minus its signal; a worker that hangs fails the test."""
    descriptor = os.pidfd_open(pid)
    try:
        if not select.select([descriptor], [], [], timeout_seconds)[0]:
            os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"worker {pid} did not end in {timeout_seconds} s")
    finally:
        os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
