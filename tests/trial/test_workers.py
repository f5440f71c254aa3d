"""Workers of different kinds on one sweep at once: every slot is committed once.

`pytest tests/trial/test_workers.py`

A queue with two workers, a lone `job` that takes the first open slot, and the pods of an Indexed
Job, all of them the job's own processes with scripted training; they are killed and told to end at
random, and started again.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from job.ledger.accounts import read_accounts
from job.ledger.ledger import Ledger
from job.report.overview import read_overview
from job.store import open_store
from job.store.base import Store
from job.store.local import LocalStore
from tests.servers import azurite, s3
from tests.trial.test_chaos import COURSE, _result, _same
from tests.workers import check_accounts, make_inputs, start_worker, wait_for

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 400
LEASE_SECONDS = 2.0
PRICES = {"queue": "0.11", "lone": "0.35", "pod": "0.60"}
NUM_SLOTS = 8
STEPS = 1200  # five seconds of scripted training


class Fleet:
    """One process of each kind, started again when it ends, until it ends with nothing to do."""

    def __init__(self, settings: dict[str, Any], log_path: Path, seed: int) -> None:
        self._environ = {f"JOB_{name.upper()}": str(value) for name, value in settings.items()}
        self._log = log_path.open("wb")
        self._random = random.Random(seed)
        self._indexes: Iterator[int] = cycle(range(NUM_SLOTS))
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.counts: Counter[str] = Counter()

    def tend(self) -> None:
        """Start whatever does not run."""
        for kind in PRICES:
            process = self._running.get(kind)
            if process is not None and process.poll() is None:
                continue
            if process is not None:
                self.counts[f"{kind} exit {process.returncode}"] += 1
            self._running[kind] = self._start(kind)

    def _start(self, kind: str) -> subprocess.Popen[bytes]:
        environ = {**os.environ, **self._environ, "PYTHONPATH": str(ROOT)}
        environ["JOB_GPU_HOURLY_USD"] = PRICES[kind]
        if kind == "queue":
            environ["JOB_WORKERS"] = "2"
        if kind == "pod":
            environ["JOB_COMPLETION_INDEX"] = str(next(self._indexes))
        verb = "queue" if kind == "queue" else "run"
        return subprocess.Popen(
            [sys.executable, "-m", "tests.fake_trial", verb],
            env=environ, cwd=ROOT, stdout=self._log, stderr=self._log,
        )  # fmt: skip

    def harm(self) -> None:
        """End one process: a trial by SIGKILL, or a worker with all its trials by either signal."""
        kind = self._random.choice(sorted(self._running))
        process = self._running[kind]
        action = self._random.choice(["kill a trial", "SIGTERM", "SIGKILL"])
        if action == "kill a trial":
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            pids = children.read_text().split() if children.exists() else []
            if not pids:
                return
            os.kill(int(self._random.choice(pids)), signal.SIGKILL)
        elif process.poll() is None:
            process.send_signal(getattr(signal, action))
        self.counts[action] += 1

    def end(self) -> None:
        for process in self._running.values():
            if process.poll() is None:
                process.terminate()
        for process in self._running.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        self._log.close()


def _chaos(settings: dict[str, Any], store: Store, log_path: Path, seed: int) -> Counter[str]:
    fleet, pause = Fleet(settings, log_path, seed), random.Random(seed + 1)
    deadline, next_harm = time.monotonic() + LIMIT_SECONDS, 0.0
    specs: dict[int, bytes] = {}
    try:
        while not all(_result(store, slot) for slot in range(NUM_SLOTS)):
            assert time.monotonic() < deadline, log_path.read_text()[-3000:]
            fleet.tend()
            time.sleep(0.2)
            if time.monotonic() > next_harm and _is_at_work(store):
                fleet.harm()  # a process that trains, more likely than one that imports
                next_harm = time.monotonic() + pause.uniform(1, 3)  # the mischief's own rhythm
            for slot in range(NUM_SLOTS):
                spec = store.get(f"sweeps/s/slots/{slot:04d}/spec.json")
                if spec is not None:
                    assert specs.setdefault(slot, spec.data) == spec.data, f"slot {slot} redrawn"
    finally:
        fleet.end()
    return fleet.counts


def _undisturbed(settings: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The results of the same sweep with a worker for each slot, all at once."""
    store = LocalStore(folder)
    slots = range(NUM_SLOTS)
    pids = [start_worker(settings | {"completion_index": n}, lambda: store) for n in slots]
    assert [wait_for(pid) for pid in pids] == [0] * NUM_SLOTS
    return [result for n in slots if (result := _result(store, n)) is not None]


def _is_at_work(store: Store) -> bool:
    """Whether an attempt holds a lease and has finished a step."""
    leases = [Ledger(store, "s").slot(number).lease() for number in range(NUM_SLOTS)]
    return any(found and found.lease.is_held and found.lease.attempt.step for found in leases)


def _check(folder: Path, settings: dict[str, Any], connect: Callable[[], Store], seed: int) -> str:
    settings = settings | {
        "num_trials": NUM_SLOTS, "max_steps": STEPS, "lease_seconds": LEASE_SECONDS,
        "device": "cpu", "checkpoint_minutes": 0.1 / 60, "min_gain": 0,
    }  # fmt: skip
    store = connect()
    counts = _chaos(settings, store, folder / "log", seed)
    calm = _undisturbed(settings, folder / "calm")
    ledger = Ledger(store, "s")
    attempts = done_twice = 0
    for slot in range(NUM_SLOTS):
        result = _result(store, slot)
        assert result is not None
        assert {k: result[k] for k in COURSE} == {k: calm[slot][k] for k in COURSE}, slot
        attempts += result["attempts"]
        done_twice += check_accounts(ledger, slot)
    overview = read_overview(ledger, NUM_SLOTS)
    prices = {str(c.hourly_usd) for view in overview.slots for c in view.charges}
    assert prices <= {str(float(price)) for price in PRICES.values()}
    numbers = {told.worker for n in range(NUM_SLOTS) for told in read_accounts(ledger.slot(n))}
    assert numbers & {1, 2}, "of the queue's workers at least one committed or lost an attempt"
    assert numbers <= {None, 1, 2}
    rows = [f"{name:18} {counts[name]}" for name in sorted(counts)]
    rows.append(f"{'leases taken':18} {attempts} for {NUM_SLOTS} slots, {len(prices)} prices")
    rows.append(f"{'steps done twice':18} {done_twice} beside {NUM_SLOTS * STEPS} that count")
    return "\n  ".join(rows)


def test_workers_of_three_kinds_commit_every_slot_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = LocalStore(tmp_path / "out")
    table = _check(tmp_path, make_inputs(tmp_path), partial(_same, store), 0)
    with capsys.disabled():
        print(f"\n  three kinds of workers on a folder\n  {table}")
    assert not list((tmp_path / "out").rglob("result.json.v*"))


def test_workers_of_three_kinds_share_a_bucket(
    moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    s3.use(monkeypatch, moto)
    uri = f"s3://{s3.BUCKET}/{tmp_path.name}"
    settings = make_inputs(tmp_path) | {"output_uri": uri}
    table = _check(tmp_path, settings, partial(open_store, uri), 1)
    with capsys.disabled():
        print(f"\n  three kinds of workers on an S3 server\n  {table}")


def test_workers_of_three_kinds_share_azure_blobs(
    azurite_blobs: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    azurite.use(monkeypatch, azurite_blobs)
    uri = f"az://{s3.BUCKET}/{tmp_path.name}"
    settings = make_inputs(tmp_path) | {"output_uri": uri}
    table = _check(tmp_path, settings, partial(open_store, uri), 2)
    with capsys.disabled():
        print(f"\n  three kinds of workers on Azurite\n  {table}")
