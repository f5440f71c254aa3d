"""How long a sweep waits for its own Job, in simulated time, under several ways to run it.

`python -m tests.deploy.sweep_waiting` prints the table of docs/container.md. The controller is
tests/deploy/job_model.py; a pod is a start, then work that is kept when it is preempted. The ways:

    today     index n is slot n; k8s/sweep-job.yaml as it is
    own last  a pod whose slot's last attempt failed first works on the first other open slot
    any slot  a pod takes the first open slot whose last attempt did not fail, whatever its index
    limit 2   backoffLimitPerIndex: 2 in place of 6
    suspend   a person suspends and resumes the Job while the pod runs, once a slot was
              preempted four times
    standby   parallelism: 2 on one GPU: a second pod is always pending
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from tests.deploy.job_controller import ROOT
from tests.deploy.job_model import JobModel, Json

HOUR = 3600.0
TRIAL_SECONDS = 2.5 * HOUR  # the tuning card's 2 to 3 hours
START_SECONDS = 300.0  # node, image, base, rows, first step: an assumption, equal for all ways
FAILS_AFTER_SECONDS = 60.0  # a broken slot, once it has started
WAYS = ("today", "own last", "any slot", "limit 2", "suspend", "standby")
SUSPEND_AFTER = 4  # preemptions of one slot


@dataclass
class Outcome:
    """What became of one sweep."""

    waited_seconds: float = 0.0  # slots were open, and no pod ran
    healthy_done_at: float = 0.0  # the last slot that can be committed is
    ended_at: float = 0.0  # the Job has its condition
    pods: int = 0
    committed: list[int] = field(default_factory=list)
    condition: str = ""


@dataclass
class Sweep:
    """A sweep of simulated trials, of which some are broken, under one way to run it."""

    way: str
    broken: frozenset[int]
    preempt_every: float | None
    spec: Json
    left: dict[int, float] = field(default_factory=dict)  # seconds of work, by open slot
    just_failed: set[int] = field(default_factory=set)  # whose last attempt failed, not preempted
    outcome: Outcome = field(default_factory=Outcome)

    def __post_init__(self) -> None:
        self.left = dict.fromkeys(range(self.spec["completions"]), TRIAL_SECONDS)
        self.model = JobModel(self.spec)

    def play(self) -> Outcome:
        """Play until the Job has its condition, one pod at a time on one GPU."""
        queue: list[int] = []  # pods, the first of which has the GPU
        while self.model.condition is None:
            queue += self.model.create()
            if not queue:
                wait = self.model.wait()
                self.outcome.waited_seconds += wait
                self.model.now += wait
                continue
            index = queue.pop(0)
            self.outcome.pods += 1
            self.model.end(index, self._run(index))
        self.outcome.ended_at = self.model.now
        self.outcome.condition = self.model.condition
        return self.outcome

    def _run(self, index: int) -> int | None:
        """Run one pod until it ends; return its exit code."""
        taken_away = self._next_preemption()
        known = self.model.indexes.get(index)
        if self.way == "suspend" and known and known.ignored >= SUSPEND_AFTER:
            self._pass(START_SECONDS, taken_away)  # a minute of a person, and the start once more
            self.model.suspend()
            self.model.suspended = False
            self.model.create()
        if not self._pass(START_SECONDS, taken_away):
            return 75
        for slot in self._slots(index):
            code = self._work_on(slot, taken_away)
            if code != 0 or slot == index or self.way == "any slot":
                return code
        return 0  # committed before, or nothing is left

    def _slots(self, index: int) -> Iterator[int]:
        """The slots that this pod works on, one after another."""
        fresh = [slot for slot in self.left if slot not in self.just_failed]
        if self.way == "any slot":
            yield from (fresh or list(self.left))[:1]
            return
        if self.way == "own last" and index in self.just_failed:
            yield from fresh[:1]
        if index in self.left:
            yield index

    def _work_on(self, slot: int, taken_away: float) -> int:
        if slot in self.broken:
            if not self._pass(FAILS_AFTER_SECONDS, taken_away):
                return 75
            self.just_failed.add(slot)
            return 70
        started = self.model.now
        in_time = self._pass(self.left[slot], taken_away)
        self.left[slot] -= self.model.now - started
        if not in_time:
            return 75
        del self.left[slot]
        self.outcome.committed.append(slot)
        self.outcome.healthy_done_at = self.model.now
        return 0

    def _pass(self, seconds: float, taken_away: float) -> bool:
        """Let time pass; False if the machine is taken away before."""
        end = self.model.now + seconds
        self.model.now = min(end, taken_away)
        return end <= taken_away

    def _next_preemption(self) -> float:
        every = self.preempt_every
        return float("inf") if every is None else (self.model.now // every + 1) * every


def play(way: str, *, broken: int | None = 0, preempt_every: float | None = HOUR / 2) -> Outcome:
    """One sweep of k8s/sweep-job.yaml, run in that way."""
    documents = yaml.safe_load_all((ROOT / "k8s/sweep-job.yaml").read_text())
    spec: Json = next(d["spec"] for d in documents if d["kind"] == "Job")
    changes: dict[str, Any] = {
        "limit 2": {"backoffLimitPerIndex": 2},
        "standby": {"parallelism": 2},
    }.get(way, {})
    slots = frozenset() if broken is None else frozenset({broken})
    return Sweep(way, slots, preempt_every, spec | changes).play()


CASES: dict[str, dict[str, Any]] = {
    "preempted every 30 min": {"broken": None},
    "slot 0 broken": {"preempt_every": None},
    "both": {},
}


def table() -> list[str]:
    """The rows of docs/container.md: minutes waited in each case, hours to the end in the last."""
    rows = []
    for way in WAYS:
        outcomes = [play(way, **case) for case in CASES.values()]
        waited = " | ".join(f"{outcome.waited_seconds / 60:.1f}" for outcome in outcomes)
        both = outcomes[-1]
        done = f"{both.healthy_done_at / HOUR:.1f} | {both.ended_at / HOUR:.1f}"
        rows.append(f"| {way} | {waited} | {done} |")
    return rows


if __name__ == "__main__":
    print("\n".join(table()))
