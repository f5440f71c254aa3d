"""k8s/sweep-job.yaml played with processes. `pytest tests/deploy/test_queue_rehearsal.py`

A rehearsal, not a cluster: tests/deploy/job_controller.py says what it plays. Pods are
`python -m job` where a trial matters, its real process 1 over a scripted trial where signals do,
and scripts where only the Job's rules do.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.deploy.job_controller import ROOT, JobController, Pod
from tests.tiny_model import make_base
from tests.workers import make_inputs

# The real process 1 over a trial that is `sh -c SCRIPT`.
PARENT = """
import sys
from job import supervisor
from job.__main__ import main
supervisor.TRIAL_COMMAND = ("sh", "-c", sys.argv[1])
sys.exit(main(["run"]))
"""
ENTRY_POINT = json.loads(
    re.findall(r"^ENTRYPOINT (.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[0]
)


def play(script: str, out: Path, **spec: Any) -> tuple[str, JobController]:
    """Play the Job over pods that are `sh -c SCRIPT`, which sees its slot and a folder, $OUT."""

    def command(_: int) -> Sequence[str]:
        return ["sh", "-c", script]

    controller = JobController(command, overrides={"OUT": str(out)}, **spec)
    return controller.run(), controller


def attempts(controller: JobController) -> dict[int, int]:
    return {pod.index: pod.attempt for pod in controller.pods}


def test_twelve_slots_run_one_after_another(tmp_path: Path) -> None:
    script = 'mkdir $OUT/lock && echo "$JOB_COMPLETION_INDEX" >> $OUT/order && rmdir $OUT/lock'
    end, controller = play(script, tmp_path)
    assert end == "Complete"
    assert (tmp_path / "order").read_text().split() == [str(index) for index in range(12)]
    assert attempts(controller) == dict.fromkeys(range(12), 1)


@pytest.mark.parametrize("code", [1, 70, 72, 74, 137])
def test_a_failing_slot_is_tried_seven_times_and_the_others_go_on(
    code: int, tmp_path: Path
) -> None:
    end, controller = play(f'[ "$JOB_COMPLETION_INDEX" != 1 ] || exit {code}', tmp_path)
    assert end == "Failed: FailedIndexes"
    assert controller.model.failed == {1}
    assert attempts(controller) == dict.fromkeys(range(12), 1) | {1: 7}
    assert controller.waits == [(1, 10), (1, 20), (1, 40), (1, 80), (1, 160), (1, 320)]


def test_a_bad_node_costs_a_slot_no_more_than_its_own_tries(tmp_path: Path) -> None:
    script = "f=$OUT/$JOB_COMPLETION_INDEX; echo >> $f; [ $(wc -l < $f) -gt 6 ] || exit 72"
    end, controller = play(script, tmp_path)
    assert end == "Complete", "six failures each, 72 in all, and every slot has one try left"
    assert attempts(controller) == dict.fromkeys(range(12), 7)


def test_a_slot_given_up_is_not_tried_again(tmp_path: Path) -> None:
    end, controller = play('[ "$JOB_COMPLETION_INDEX" != 3 ] || exit 69', tmp_path)
    assert end == "Failed: FailedIndexes"
    assert (controller.model.failed, controller.waits) == ({3}, [])
    assert attempts(controller) == dict.fromkeys(range(12), 1)


@pytest.mark.parametrize("code", [64, 65, 77])
def test_what_only_a_person_can_mend_ends_the_job_at_once(code: int, tmp_path: Path) -> None:
    end, controller = play(f'[ "$JOB_COMPLETION_INDEX" != 2 ] || exit {code}', tmp_path)
    assert end == "Failed: PodFailurePolicy"
    assert attempts(controller) == {0: 1, 1: 1, 2: 1}


def test_a_fourth_lost_slot_ends_the_job(tmp_path: Path) -> None:
    end, controller = play('[ "$JOB_COMPLETION_INDEX" -ge 8 ] || exit 69', tmp_path)
    assert end == "Failed: MaxFailedIndexesExceeded"
    assert attempts(controller) == {0: 1, 1: 1, 2: 1, 3: 1}


def test_preemptions_never_use_up_a_slot(tmp_path: Path) -> None:
    script = "f=$OUT/$JOB_COMPLETION_INDEX; echo >> $f; [ $(wc -l < $f) -gt 40 ] || exit 75"
    end, controller = play(script, tmp_path, completions=1)
    assert end == "Complete"
    assert attempts(controller) == {0: 41}
    assert controller.failures == {}


def test_a_drained_pod_costs_no_try_whatever_its_code(tmp_path: Path) -> None:
    """A pod that is drained before the job listens for signals dies of SIGTERM: 143."""

    def disturb(pod: Pod) -> None:
        if pod.attempt <= 10:
            pod.wait_for_line("ready")
            pod.evict(grace_seconds=5, condition=True)

    script = "echo >> $OUT/n; echo ready >&2; [ $(wc -l < $OUT/n) -gt 10 ] || exec sleep 60"
    controller = JobController(
        lambda _: ["sh", "-c", script],
        overrides={"OUT": str(tmp_path)},
        on_pod=disturb,
        completions=1,
    )
    assert controller.run() == "Complete"
    assert [pod.code for pod in controller.pods] == [143] * 10 + [0]
    assert controller.failures == {}


def test_with_kueue_several_slots_run_at_once_and_no_slot_twice(tmp_path: Path) -> None:
    # The first four each wait for the other three, so they end only if they run together.
    script = """
        mkdir $OUT/$JOB_COMPLETION_INDEX || exit 70
        [ $JOB_COMPLETION_INDEX -ge 4 ] || while [ $(ls $OUT | wc -l) -lt 4 ]; do sleep 0.02; done
    """
    end, controller = play(script, tmp_path, parallelism=4)
    assert end == "Complete"
    assert attempts(controller) == dict.fromkeys(range(12), 1)


@pytest.mark.slow
def test_a_deaf_trial_is_ended_within_what_a_spot_machine_leaves(tmp_path: Path) -> None:
    """Process 1 is the real one; its trial ignores SIGTERM. GKE leaves 15 s and no condition."""
    script = (
        '[ -e "$OUT/again" ] && exit 0; : > "$OUT/again"; trap "" TERM; echo deaf >&2;'
        " while :; do sleep 1; done"
    )
    seconds: list[float] = []

    def disturb(pod: Pod) -> None:
        if pod.attempt == 1:
            pod.wait_for_line("deaf")
            started = time.monotonic()
            pod.evict(grace_seconds=15, condition=False)
            seconds.append(time.monotonic() - started)

    controller = JobController(
        lambda _: [sys.executable, "-c", PARENT, script],
        overrides={"OUT": str(tmp_path), "JOB_GRACE_SECONDS": "5"},  # of the 15, to save time
        on_pod=disturb,
        completions=1,
    )
    assert controller.run() == "Complete"
    assert [pod.code for pod in controller.pods] == [75, 0]
    assert seconds[0] < 5, "killed by process 1, not by the kubelet"
    assert controller.failures == {}


@pytest.mark.slow
def test_real_trials_survive_what_spot_machines_do(tmp_path: Path) -> None:
    """Slot 0 gets GKE's bare SIGTERM, slot 1 loses its node; both are committed once."""
    assert ENTRY_POINT[-2:] == ["-m", "job"]
    forked.with_torch()
    inputs = make_inputs(tmp_path) | {
        "dataset_uri": f"file://{tmp_path}/rows.jsonl",
        "output_uri": f"file://{tmp_path}/out",
        "device": "cpu", "max_steps": 120, "num_epochs": 20, "num_trials": 2,
        "lease_seconds": 2, "checkpoint_minutes": 0.01, "grace_seconds": 15,
    }  # fmt: skip
    make_base(tmp_path / "base", vocab_size=600)

    def disturb(pod: Pod) -> None:
        if pod.attempt > 1:
            return
        if pod.index == 0:
            pod.wait_for_line("step 30/120")
            pod.evict(grace_seconds=15, condition=False)
        else:
            pod.wait_for_line("checkpoint at step")  # a published one, or it starts over
            pod.lose_node()

    controller = JobController(
        lambda _: [sys.executable, *ENTRY_POINT[-2:]],
        overrides={f"JOB_{name.upper()}": str(value) for name, value in inputs.items()}
        | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        on_pod=disturb,
        completions=2,
        maxFailedIndexes=1,
    )
    assert controller.run() == "Complete", "\n".join(pod.log for pod in controller.pods)
    codes = [(pod.index, pod.code) for pod in controller.pods]
    assert codes == [(0, 75), (0, 0), (1, 137), (1, 0)]
    assert controller.failures == {}
    for index in range(2):
        (path,) = tmp_path.glob(f"out/sweeps/s/slots/{index:04}/result.json")
        result = json.loads(path.read_text())
        assert (result["status"], result["steps"], result["attempts"]) == ("completed", 120, 2)
    resumed = [pod.log for pod in controller.pods if pod.attempt == 2]
    assert all("going on from the checkpoint at step" in log for log in resumed)
