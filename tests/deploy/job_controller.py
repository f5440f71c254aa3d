"""Plays the Job controller and the kubelet over the rules of a manifest, with processes as pods.

Not a cluster: no scheduler, no API server, no containers. Which index gets a pod and when, what an
exit code or a condition means, back-off and limits are tests/deploy/job_model.py's, on a clock that
stands still while a process runs and jumps over a back-off. SIGTERM, grace and SIGKILL are the
kubelet's part.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests import forked
from tests.deploy.job_model import Index, JobModel, Json, action

ROOT = Path(__file__).parents[2]
POD_LIMIT_SECONDS = 120  # a pod that hangs fails the test


@dataclass
class Pod:
    """One attempt at one index."""

    index: int
    attempt: int
    process: subprocess.Popen[str]
    conditions: dict[str, str] = field(default_factory=dict)
    code: int | None = None
    log: str = ""

    def wait_for_line(self, text: str) -> None:
        """Read the log until a line holds `text`; the process ends or the line comes."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line
            if text in line:
                return
        raise AssertionError(f"index {self.index}: {text!r} never came:\n{self.log}")

    def evict(self, *, grace_seconds: float, condition: bool) -> None:
        """SIGTERM to process 1, SIGKILL to what is left after the grace, as a kubelet does."""
        if condition:
            self.conditions["DisruptionTarget"] = "True"
        self.process.send_signal(signal.SIGTERM)
        if not has_ended(self.process.pid, grace_seconds):
            kill_all(self.process.pid)

    def reap(self) -> None:
        """Read the log to its end, and the exit code as a container runtime reports it."""
        self.log += self.process.communicate(timeout=POD_LIMIT_SECONDS)[1]
        code = self.process.returncode
        self.code = code if code >= 0 else 128 - code

    def lose_node(self) -> None:
        """Kill everything at once; the pod is given up as lost some time later."""
        self.conditions["DisruptionTarget"] = "True"
        kill_all(self.process.pid)


def has_ended(pid: int, seconds: float) -> bool:
    descriptor = os.pidfd_open(pid)
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


def kill_all(pid: int) -> None:
    """SIGKILL for a process and all its descendants: a container ends with its process 1."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # ended meanwhile
            continue
        parents.setdefault(parent, []).append(int(path.parent.name))
    family = [pid]
    for member in family:
        family += parents.get(member, [])
    for member in family:
        with contextlib.suppress(ProcessLookupError):  # ended meanwhile
            os.kill(member, signal.SIGKILL)


class JobController:
    """Runs the Job of `k8s/sweep-job.yaml`; `on_pod` is told of each pod and may disturb it."""

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        *,
        overrides: dict[str, str],
        on_pod: Callable[[Pod], None] = lambda _: None,
        popen: Callable[..., subprocess.Popen[Any]] = forked.popen,
        **spec: Any,
    ) -> None:
        documents = list(yaml.safe_load_all((ROOT / "k8s/sweep-job.yaml").read_text()))
        by_kind: dict[str, Json] = {document["kind"]: document for document in documents}
        self.spec: Json = by_kind["Job"]["spec"] | spec
        self.model = JobModel(self.spec)
        self.pod: Json = self.spec["template"]["spec"]
        (self.container,) = self.pod["containers"]
        self._settings: dict[str, str] = by_kind["ConfigMap"]["data"] | overrides
        self._command, self._on_pod, self._popen = command, on_pod, popen
        self.pods: list[Pod] = []
        self.failures: dict[int, int] = {}  # that count, by index
        self.waits: list[tuple[int, float]] = []  # back-off by index: recorded, not slept

    def run(self) -> str:
        """Play until the Job has its last condition; return it."""
        running: list[Pod] = []
        while self.model.condition is None:
            running += [self._start(index) for index in self.model.create()]
            if not running:
                self.model.now += self.model.wait()
                continue
            pod = self._next_end(running)
            # podReplacementPolicy Failed: only now, that the pod is gone, may another one start.
            running.remove(pod)
            self.model.end(pod.index, pod.code, pod.conditions)
            if pod.code and action(self.spec, pod.code, pod.conditions) == "Count":
                self.failures[pod.index] = self.failures.get(pod.index, 0) + 1
            if wait := self.model.indexes.get(pod.index, Index()).back_off():
                self.waits.append((pod.index, wait))
        for other in running:
            other.evict(grace_seconds=self.grace_seconds, condition=False)
            other.reap()
        return self.model.condition

    @property
    def grace_seconds(self) -> float:
        return float(self.pod["terminationGracePeriodSeconds"])

    def environ(self, index: int) -> dict[str, str]:
        """The environment of the container: the ConfigMap, and `env` with its field references."""
        annotations = {"batch.kubernetes.io/job-completion-index": str(index)}
        environ = {"PATH": os.environ["PATH"], **self._settings}
        for entry in self.container["env"]:
            path = entry["valueFrom"]["fieldRef"]["fieldPath"]
            environ[entry["name"]] = annotations[path.split("'")[1]]
        return environ

    def _start(self, index: int) -> Pod:
        attempt = 1 + sum(pod.index == index for pod in self.pods)
        process = self._popen(
            self._command(index), env=self.environ(index), stderr=subprocess.PIPE, text=True,
            cwd=ROOT,
        )  # fmt: skip
        pod = Pod(index, attempt, process)
        self.pods.append(pod)
        self._on_pod(pod)
        return pod

    def _next_end(self, running: list[Pod]) -> Pod:
        descriptors = {os.pidfd_open(pod.process.pid): pod for pod in running}
        ended = select.select(list(descriptors), [], [], POD_LIMIT_SECONDS)[0]
        for descriptor in descriptors:
            os.close(descriptor)
        if not ended:
            for pod in running:
                kill_all(pod.process.pid)
            raise AssertionError(f"pods did not end: {[pod.index for pod in running]}")
        pod = descriptors[ended[0]]
        pod.reap()
        return pod
