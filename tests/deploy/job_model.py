"""The Job controller's rules as a model with a clock of its own: no process, no sleep, no cluster.

After pkg/controller/job of kubernetes/kubernetes (manageJob, firstPendingIndexes, backoff_utils.go,
pod_failure_policy.go, canRemoveFinalizer) and what was seen under a real controller of 1.36:
tests/deploy/observed_controller.yaml, which tests/deploy/test_job_model.py holds it against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
FIRST_BACK_OFF_SECONDS, LAST_BACK_OFF_SECONDS = 10, 600  # DefaultJobPodFailureBackOff, Max…
NONE: Mapping[str, str] = {}
DISRUPTED = {"DisruptionTarget": "True"}


@dataclass
class Index:
    """What the controller knows of an index: annotations of its last failed pod, and when it ended.

    It has no other memory: where that pod goes without a replacement, all of this is forgotten.
    """

    counted: int = 0  # batch.kubernetes.io/job-index-failure-count
    ignored: int = 0  # batch.kubernetes.io/job-index-ignored-failure-count
    failed_at: float = 0.0

    def back_off(self) -> float:
        """Seconds between the end of its last failed pod and the next one."""
        failures = self.counted + self.ignored
        if not failures:
            return 0.0
        return min(FIRST_BACK_OFF_SECONDS * 2.0 ** (failures - 1), LAST_BACK_OFF_SECONDS)


@dataclass
class JobModel:
    """One Indexed Job with `backoffLimitPerIndex` and `podReplacementPolicy: Failed`."""

    spec: Json
    now: float = 0.0  # seconds
    active: set[int] = field(default_factory=set)  # indexes that have a pod
    terminating: set[int] = field(default_factory=set)  # ... that is deleted and not gone
    succeeded: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    indexes: dict[int, Index] = field(default_factory=dict)
    suspended: bool = False
    condition: str | None = None  # "Complete" or "Failed: REASON"

    def create(self) -> list[int]:
        """Create the pods that are due now; return their indexes."""
        due = [index for index in self._first_pending() if not self._remaining(index)]
        self.active.update(due)
        return due

    def wait(self) -> float:
        """Seconds until `create` would create a pod, if no pod ends before; infinity if none."""
        return min(map(self._remaining, self._first_pending()), default=float("inf"))

    def end(self, index: int, code: int | None, conditions: Mapping[str, str] = NONE) -> None:
        """Account for a pod that is gone for good; None is the code of one that told none."""
        self.active.discard(index)
        self.terminating.discard(index)
        if code == 0:
            self.succeeded.add(index)
            self.indexes.pop(index, None)
        else:
            self._fail(index, action(self.spec, code, conditions))
        if self.condition is None:
            self.condition = self._finished()

    def delete_pod(self, index: int) -> None:
        """`kubectl delete pod`, with `--force` or without, of a pod whose node does not answer.

        Nothing comes of it: the finalizer batch.kubernetes.io/job-tracking keeps the pod, which is
        neither active nor Failed any more, and only a Failed one is replaced.
        """
        self.active.discard(index)
        self.terminating.add(index)

    def taint_out_of_service(self, index: int) -> None:
        """node.kubernetes.io/out-of-service on its node: PodGC sets Failed and DisruptionTarget."""
        self.end(index, None, DISRUPTED)

    def suspend(self) -> set[int]:
        """`suspend: true`: pods lose their finalizer, then are deleted; return their indexes.

        What the controller knew of these indexes goes with them. An index that waits keeps its
        failed pod, and with it its wait.
        """
        self.suspended = True
        gone = self.active | self.terminating
        self.active.clear()
        self.terminating.clear()
        for index in gone:
            self.indexes.pop(index, None)
        return gone

    def _first_pending(self) -> list[int]:
        """The lowest indexes without a pod, as many as there is room for, whether due or not."""
        if self.condition is not None or self.suspended:
            return []
        wanted = min(self.spec["parallelism"], self.spec["completions"] - len(self.succeeded))
        room = wanted - len(self.active) - len(self.terminating)
        taken = self.active | self.terminating | self.succeeded | self.failed
        pending = (index for index in range(self.spec["completions"]) if index not in taken)
        return [index for index, _ in zip(pending, range(room), strict=False)]

    def _remaining(self, index: int) -> float:
        known = self.indexes.get(index, Index())
        return max(0.0, known.failed_at + known.back_off() - self.now)

    def _fail(self, index: int, what: str) -> None:
        if what == "FailJob":
            self.condition = "Failed: PodFailurePolicy"
            return
        known = self.indexes.setdefault(index, Index())
        known.failed_at = self.now
        if what == "Ignore":
            known.ignored += 1
        else:
            known.counted += 1
        if what == "FailIndex" or known.counted > self.spec["backoffLimitPerIndex"]:
            self.failed.add(index)
            del self.indexes[index]

    def _finished(self) -> str | None:
        if len(self.failed) > self.spec.get("maxFailedIndexes", self.spec["completions"]):
            return "Failed: MaxFailedIndexesExceeded"
        if len(self.failed) + len(self.succeeded) < self.spec["completions"]:
            return None
        return "Failed: FailedIndexes" if self.failed else "Complete"


def action(spec: Json, code: int | None, conditions: Mapping[str, str]) -> str:
    """What the first rule that fits says of a failed pod; Count if none does."""
    (container,) = spec["template"]["spec"]["containers"]
    for rule in spec["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            wanted = rule["onExitCodes"]
            assert wanted["operator"] == "In"
            fits = wanted["containerName"] == container["name"] and code in wanted["values"]
        else:
            patterns = rule["onPodConditions"]
            fits = any(conditions.get(p["type"]) == p["status"] for p in patterns)
        if fits:
            return str(rule["action"])
    return "Count"
