"""The model of the Job controller against what the real one did.

`pytest tests/deploy/test_job_model.py`. The table is tests/deploy/observed_controller.yaml, the Job
that of k8s/sweep-job.yaml.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.job_controller import ROOT
from tests.deploy.job_model import JobModel, Json

SEEN: Json = yaml.safe_load((Path(__file__).parent / "observed_controller.yaml").read_text())
SPEC: Json = next(
    document["spec"]
    for document in yaml.safe_load_all((ROOT / "k8s/sweep-job.yaml").read_text())
    if document["kind"] == "Job"
)


def job(**spec: Any) -> JobModel:
    return JobModel(SPEC | spec)


def run_next(model: JobModel) -> int:
    """Let time pass until a pod is due, at parallelism 1; return its index."""
    model.now += model.wait()
    (index,) = model.create()
    return index


@pytest.mark.parametrize("row", SEEN["back_off"], ids=lambda row: f"{row['action']}-{row['code']}")
def test_back_off_doubles_whatever_the_failure_counts(row: Json) -> None:
    model = job()
    conditions = {row["condition"]: "True"} if "condition" in row else {}
    waits = []
    for _ in row["waits"]:
        model.end(run_next(model), row["code"], conditions)
        waits.append(model.wait())
    assert waits == row["waits"]
    assert model.indexes[0].counted == (len(waits) if row["action"] == "Count" else 0)


def test_a_waiting_slot_holds_up_all_others_at_parallelism_1() -> None:
    row = SEEN["holds_up"]
    model = job(parallelism=row["parallelism"])
    for _ in range(row["tries"]):
        assert run_next(model) == 0
        model.end(0, row["code"])
    assert model.now == row["others_held_up_seconds"]
    assert run_next(model) == 1
    assert model.now == row["others_held_up_seconds"]


def test_with_room_for_two_the_next_slot_is_not_held_up() -> None:
    row = SEEN["two_at_once"]
    model = job(parallelism=row["parallelism"])
    assert model.create() == [0, 1]
    model.end(1, 0)
    model.end(0, row["code"])
    assert model.create() == [2], "the lowest two are 0, which waits, and 2"
    model.end(2, row["code"])
    assert model.create() == [], "0 and 2 both wait, and 3 is the third lowest"
    assert model.wait() == 10


@pytest.mark.parametrize("row", SEEN["ends"], ids=lambda row: str(row["code"]))
def test_ends_of_the_job(row: Json) -> None:
    model = job()
    tries = 0
    while model.condition is None:
        if (index := run_next(model)) == 0:
            tries += 1
        model.end(index, row["code"] if index == 0 else 0)
    assert (model.condition, tries) == (row["condition"], row["tries"])


def test_a_pod_on_a_silent_node_is_replaced_once_it_counts_as_failed() -> None:
    model = job()
    model.create()
    model.delete_pod(0)
    does_nothing, taint, _ = SEEN["lost_node"]
    assert (does_nothing["replaced"], model.create(), model.wait()) == (False, [], float("inf"))
    model.now += taint["gone_after_seconds"]
    model.taint_out_of_service(0)
    assert model.wait() == 10, "a disruption is ignored, and waited after all the same"
    assert (taint["replaced"], run_next(model)) == (True, 0)
    assert model.indexes[0].counted == 0


def test_suspending_forgets_what_ran_and_keeps_what_waits() -> None:
    runs, waits = SEEN["suspend"]
    model = job()
    for _ in range(5):
        model.end(run_next(model), 75)
    model.suspend()
    assert model.create() == []
    model.suspended = False
    assert model.wait() == waits["wait_seconds"]
    run_next(model)
    assert model.suspend() == {0}
    model.suspended = False
    assert model.wait() == runs["wait_seconds"]
    model.end(run_next(model), 75)
    assert model.wait() == runs["next_failure_waits"]


def test_a_slot_that_succeeded_leaves_no_wait_behind() -> None:
    model = job()
    for _ in range(3):
        model.end(run_next(model), 75)
    model.end(run_next(model), 0)
    assert (model.wait(), model.create()) == (0, [1])
