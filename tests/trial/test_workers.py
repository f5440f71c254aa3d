"""Workers of different kinds on one sweep at once: every slot is committed once.

`pytest tests/trial/test_workers.py`

A queue with two workers, a lone `job` that takes the first open slot, and the pods of the Indexed
Job in k8s/sweep-job.yaml, as tests/deploy/job_controller.py plays it: all of them the job's own
processes with scripted training. They are killed, drained and told to end at random, and started
again.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from job.ledger.accounts import read_accounts
from job.ledger.ledger import Ledger
from job.report.overview import read_overview
from job.store import open_store
from job.store.base import Store
from job.store.local import LocalStore
from tests.deploy.job_controller import ROOT, JobController, Pod, kill_all
from tests.servers import azurite, s3
from tests.trial.test_chaos import COURSE, _result, _same
from tests.workers import check_accounts, make_inputs, start_worker, wait_for

pytestmark = pytest.mark.slow

LIMIT_SECONDS = 400
PRICES = {"queue": "0.11", "lone": "0.35", "pod": "0.60"}
KIND_OF = {float(price): kind for kind, price in PRICES.items()}
NUM_SLOTS = 4
NUM_HARMS = 6  # each costs a new process its five seconds of imports; then they are left alone
SETTINGS = {
    "num_trials": NUM_SLOTS, "max_steps": 1000, "num_epochs": 1000,  # steps of 4 ms
    "lease_seconds": 2.0, "checkpoint_minutes": 0.1 / 60, "device": "cpu", "min_gain": 0,
}  # fmt: skip
COMMAND = (sys.executable, "-m", "tests.fake_trial")


class Pods:
    """The Indexed Job, played in a thread of its own; two slots at once, as with Kueue."""

    def __init__(self, settings: dict[str, str]) -> None:
        self.controller = JobController(
            lambda _: [*COMMAND, "run"],
            overrides=settings | {"JOB_GPU_HOURLY_USD": PRICES["pod"]},
            popen=subprocess.Popen,  # a fork would keep locks of the other threads' clients
            completions=NUM_SLOTS,
            parallelism=2,
        )
        self._thread = threading.Thread(target=self.controller.run)
        self._thread.start()

    def running(self) -> list[Pod]:
        return [pod for pod in self.controller.pods if pod.code is None]

    def harm(self, pod: Pod, action: str) -> None:
        """Do what clusters do; signals by pid, for only the controller may reap."""
        if action in ("drained", "node lost"):
            pod.conditions["DisruptionTarget"] = "True"
        if action == "node lost":
            kill_all(pod.process.pid)
        else:
            os.kill(pod.process.pid, signal.SIGTERM)

    def end(self, *, is_over: bool) -> None:
        """Wait for the Job's end, or give it up."""
        if not is_over:
            self.controller.model.condition = "given up"
        self._thread.join(180 if is_over else 0)
        while self._thread.is_alive():
            self.controller.model.condition = "given up"
            for pod in self.running():
                with contextlib.suppress(ProcessLookupError):
                    kill_all(pod.process.pid)
            self._thread.join(1)


class Fleet:
    """A queue and a lone `job`, started again when they end, and the Job's pods beside them."""

    def __init__(self, settings: dict[str, Any], log_path: Path, seed: int) -> None:
        own = {f"JOB_{name.upper()}": str(value) for name, value in settings.items()}
        of_store = {n: v for n, v in os.environ.items() if n.startswith(("AWS_", "AZURE_"))}
        self._log = log_path.open("wb")
        self._random = random.Random(seed)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.pods = Pods(own | of_store | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
        self.counts: Counter[str] = Counter()

    def tend(self) -> None:
        """Start whatever does not run; the pods are the controller's."""
        for kind in ("queue", "lone"):
            process = self._running.get(kind)
            if process is not None and process.poll() is None:
                continue
            if process is not None:
                self.counts[f"{kind} exit {process.returncode}"] += 1
            self._running[kind] = self._start(kind)

    def _start(self, kind: str) -> subprocess.Popen[bytes]:
        environ = self.pods.controller.environ(0) | {"JOB_GPU_HOURLY_USD": PRICES[kind]}
        del environ["JOB_COMPLETION_INDEX"]
        if kind == "queue":
            environ["JOB_WORKERS"] = "2"
        verb = "queue" if kind == "queue" else "run"
        return subprocess.Popen(
            [*COMMAND, verb], env=environ, cwd=ROOT, stdout=self._log, stderr=self._log
        )

    def harm(self, slot: int, kind: str) -> None:
        """End the worker that is at a slot, with all its trials, or kill one of its trials."""
        pod = next((pod for pod in self.pods.running() if pod.index == slot), None)
        if kind == "pod" and pod is None:
            return  # ended by itself meanwhile
        of_pod = kind == "pod" and pod is not None
        pid = pod.process.pid if of_pod and pod else self._running[kind].pid
        actions = ["drained", "node lost", "SIGTERM"] if of_pod else ["SIGTERM", "SIGKILL"]
        action = self._random.choice(["kill a trial", *actions])
        with contextlib.suppress(ProcessLookupError):  # as above
            if action == "kill a trial":
                children = Path(f"/proc/{pid}/task/{pid}/children")
                pids = children.read_text().split() if children.exists() else []
                if not pids:
                    return
                os.kill(int(self._random.choice(pids)), signal.SIGKILL)
            elif of_pod and pod:
                self.pods.harm(pod, action)
            else:
                self._running[kind].send_signal(getattr(signal, action))
        self.counts[f"{kind}: {action}"] += 1

    def end(self, *, is_over: bool) -> None:
        for process in self._running.values():
            if process.poll() is None:
                process.terminate()
        for process in self._running.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        self.pods.end(is_over=is_over)
        self.counts += Counter(f"pod exit {pod.code}" for pod in self.pods.controller.pods)
        for pod in self.pods.controller.pods:
            self._log.write(pod.log.encode())
        self._log.close()


def _chaos(settings: dict[str, Any], store: Store, log_path: Path, seed: int) -> Fleet:
    fleet, rhythm = Fleet(settings, log_path, seed), random.Random(seed + 1)
    deadline, next_harm = time.monotonic() + LIMIT_SECONDS, 0.0
    specs: dict[int, bytes] = {}
    seen: set[str] = set()  # attempts that were at work
    harmed: set[str] = set()  # ... and were ended
    is_over = False
    try:
        while not is_over:
            assert time.monotonic() < deadline, log_path.read_text()[-3000:]
            at_work = _at_work(store)
            seen |= at_work.keys()
            if seen:  # a pod, the first to come: then the others join
                fleet.tend()
            time.sleep(0.2)
            targets = sorted(at_work.keys() - harmed)
            if targets and len(harmed) < NUM_HARMS and time.monotonic() > next_harm:
                owner = rhythm.choice(targets)
                harmed.add(owner)
                fleet.harm(*at_work[owner])
                next_harm = time.monotonic() + rhythm.uniform(1, 3)  # the mischief's own rhythm
            for slot in range(NUM_SLOTS):
                spec = store.get(f"sweeps/s/slots/{slot:04d}/spec.json")
                if spec is not None:
                    assert specs.setdefault(slot, spec.data) == spec.data, f"slot {slot} redrawn"
            is_over = all(_result(store, slot) for slot in range(NUM_SLOTS))
    finally:
        fleet.end(is_over=is_over)
    assert fleet.pods.controller.model.condition == "Complete", log_path.read_text()[-3000:]
    return fleet


def _at_work(store: Store) -> dict[str, tuple[int, str]]:
    """The slot and the kind of each attempt that holds a lease and has finished a step."""
    found = {}
    for number in range(NUM_SLOTS):
        stored = Ledger(store, "s").slot(number).lease()
        if stored and stored.lease.is_held and stored.lease.attempt.step:
            kind = KIND_OF[stored.lease.attempt.hourly_usd or 0]
            found[stored.lease.owner] = number, kind
    return found


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of the same sweep with a worker for each slot, all at once, undisturbed."""
    folder = tmp_path_factory.mktemp("calm")
    store, slots = LocalStore(folder / "out"), range(NUM_SLOTS)
    settings = make_inputs(folder) | SETTINGS
    pids = [start_worker(settings | {"completion_index": n}, lambda: store) for n in slots]
    assert [wait_for(pid) for pid in pids] == [0] * NUM_SLOTS
    return [result for n in slots if (result := _result(store, n)) is not None]


def _check(
    folder: Path, connect: Callable[[], Store], calm: list[dict[str, Any]], seed: int, **given: str
) -> str:
    started = time.monotonic()
    store = connect()
    fleet = _chaos(make_inputs(folder) | SETTINGS | given, store, folder / "log", seed)
    seconds = time.monotonic() - started
    counts, ledger = fleet.counts, Ledger(store, "s")
    attempts = done_twice = 0
    for slot in range(NUM_SLOTS):
        result = _result(store, slot)
        assert result is not None
        assert {k: result[k] for k in COURSE} == {k: calm[slot][k] for k in COURSE}, slot
        assert result["steps"] == SETTINGS["max_steps"], "long enough to be harmed"
        attempts += result["attempts"]
        done_twice += check_accounts(ledger, slot)
    overview = read_overview(ledger, NUM_SLOTS)
    leases = Counter(KIND_OF[c.hourly_usd or 0] for view in overview.slots for c in view.charges)
    assert leases["pod"] > 0
    numbers = {told.worker for n in range(NUM_SLOTS) for told in read_accounts(ledger.slot(n))}
    assert numbers & {1, 2}, "of the queue's workers at least one committed or lost an attempt"
    assert numbers <= {None, 1, 2}
    rows = [f"{name:18} {counts[name]}" for name in sorted(counts)]
    by_kind = ", ".join(f"{count} by {kind}" for kind, count in leases.most_common())
    rows.append(f"{'leases taken':18} {attempts} for {NUM_SLOTS} slots: {by_kind}")
    steps = NUM_SLOTS * SETTINGS["max_steps"]
    rows.append(f"{'steps done twice':18} {done_twice} beside {steps} that count")
    rows.append(f"{'seconds':18} {seconds:.0f}")
    return "\n  ".join(rows)


def test_workers_of_three_kinds_commit_every_slot_once(
    tmp_path: Path, calm: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    table = _check(tmp_path, partial(_same, LocalStore(tmp_path / "out")), calm, 0)
    with capsys.disabled():
        print(f"\n  three kinds of workers on a folder\n  {table}")
    assert not list((tmp_path / "out").rglob("result.json.v*"))


@pytest.fixture(params=["s3", "az"])
def scheme(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The scheme of a server's bucket, to which the SDK's own variables point."""
    name = str(request.param)
    module, server = (s3, "moto") if name == "s3" else (azurite, "azurite_blobs")
    module.use(monkeypatch, request.getfixturevalue(server))
    return name


def test_workers_of_three_kinds_share_a_bucket(
    scheme: str, tmp_path: Path, calm: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"{scheme}://{s3.BUCKET}/{tmp_path.name}"
    table = _check(tmp_path, partial(open_store, uri), calm, 1, output_uri=uri)
    with capsys.disabled():
        print(f"\n  three kinds of workers on {scheme}://\n  {table}")
