"""The advice of docs/runbook.md, rehearsed: `pytest tests/deploy/test_runbook.py`

The Job's rules are played by tests/deploy/job_controller.py; pods are real `job trial` processes
whose training is tests/fake_training.py.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.errors import ExitCode
from job.ledger.ledger import Ledger
from job.store.local import LocalStore
from tests.deploy.job_controller import ROOT, JobController, Pod
from tests.workers import make_inputs

RUNBOOK = (ROOT / "docs/runbook.md").read_text()
ALERTS = yaml.safe_load((ROOT / "k8s/alerts.yaml").read_text())["spec"]["groups"][0]["rules"]
# Of kube-state-metrics (docs/metrics/workload), as far as they are used.
METRICS = {
    "kube_job_created",
    "kube_job_failed",
    "kube_job_status_failed",
    "kube_pod_status_phase",
    "kube_pod_container_status_waiting_reason",
    "kube_pod_deletion_timestamp",
}
# `job trial` without torch; the version stands for another image.
POD = """
import sys
import job
from job.trial import run
from job.__main__ import main
from tests.fake_training import FAKE_TRAINING
job.__version__ = sys.argv[1]
run.real_training = lambda: FAKE_TRAINING
sys.exit(main(["trial"]))
"""


class DeletedError(Exception):
    """`kubectl delete job`: its pods get a SIGTERM, and nobody replaces them."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    given = make_inputs(folder) | {"dataset_uri": f"file://{folder}/rows.jsonl", "device": "cpu"}
    return {f"JOB_{name.upper()}": str(value) for name, value in given.items()}


@pytest.fixture
def apply(inputs: dict[str, str], tmp_path: Path) -> Callable[..., JobController]:
    """`kubectl apply` of a Job with so many trials; settings override the ConfigMap's."""

    def start(
        trials: int, *, version: str = "0.1.0", on_pod: Callable[[Pod], None] = lambda _: None,
        **settings: str,
    ) -> JobController:  # fmt: skip
        return JobController(
            lambda _: [sys.executable, "-c", POD, version],
            overrides=inputs
            | {"JOB_OUTPUT_URI": f"file://{tmp_path}/out", "JOB_NUM_TRIALS": str(trials)}
            | settings,
            on_pod=on_pod,
            completions=trials,
        )

    return start


def results(tmp_path: Path, sweep: str = "s") -> dict[int, dict[str, Any]]:
    paths = tmp_path.glob(f"out/sweeps/{sweep}/slots/*/result.json")
    return {int(path.parent.name): json.loads(path.read_text()) for path in paths}


Apply = Callable[..., JobController]


@pytest.mark.slow
def test_a_deleted_job_goes_on_under_a_new_image(apply: Apply, tmp_path: Path) -> None:
    def delete(pod: Pod) -> None:
        if pod.index == 1:
            pod.wait_for_line("slot 1:")
            pod.evict(grace_seconds=15, condition=False)
            pod.reap()
            raise DeletedError

    with pytest.raises(DeletedError):
        apply(2, on_pod=delete).run()
    before = results(tmp_path)
    assert list(before) == [0]
    again = apply(2, version="0.2.0")
    assert again.run() == "Complete", again.pods[-1].log
    assert "committed before, nothing to do" in again.pods[0].log
    after = results(tmp_path)
    assert after[0] == before[0]
    assert (after[1]["status"], after[1]["attempts"]) == ("completed", 2)
    assert [after[slot]["code_version"] for slot in (0, 1)] == ["0.1.0", "0.2.0"]


@pytest.mark.slow
def test_trials_can_be_added_and_settings_only_in_another_sweep(
    apply: Apply, tmp_path: Path
) -> None:
    assert apply(1).run() == "Complete"
    first = results(tmp_path)

    changed = apply(2, JOB_MAX_STEPS="20")
    assert changed.run() == "Failed: PodFailurePolicy"
    # A committed slot ends before settings are compared; the first open one says what differs.
    assert [pod.code for pod in changed.pods] == [ExitCode.OK, ExitCode.SETTINGS]
    assert re.search(r"max_steps.*16 -> 20", changed.pods[1].log, re.IGNORECASE)

    assert apply(2).run() == "Complete"
    assert results(tmp_path)[0] == first[0]
    assert set(results(tmp_path)) == {0, 1}

    assert apply(1, JOB_MAX_STEPS="20", JOB_SWEEP_NAME="other").run() == "Complete"
    assert results(tmp_path, "other")[0]["steps"] == 20
    assert results(tmp_path)[0] == first[0]


@pytest.mark.slow
def test_rows_that_come_after_the_job_are_asked_for(
    apply: Apply, inputs: dict[str, str], tmp_path: Path
) -> None:
    """The volume was still empty when the Job was applied: 65 says so; copy, delete, apply."""
    volume = tmp_path / "volume"
    volume.mkdir()
    early = apply(1, JOB_DATASET_URI=f"file://{volume}/rows.jsonl")
    assert early.run() == "Failed: PodFailurePolicy"
    (pod,) = early.pods
    assert pod.code == ExitCode.DATA
    assert f"{volume} is empty: copy the rows there first" in pod.log.splitlines()[-1]
    shutil.copy(inputs["JOB_DATASET_URI"].removeprefix("file://"), volume / "rows.jsonl")
    assert apply(1, JOB_DATASET_URI=f"file://{volume}/rows.jsonl").run() == "Complete"


@pytest.mark.slow
def test_an_excluded_slot_holds_up_nobody(apply: Apply, tmp_path: Path) -> None:
    """`job exclude` between two tries of a slot: its next pod ends with 0, the others go on."""

    def lose_and_exclude(pod: Pod) -> None:
        if (pod.index, pod.attempt) == (0, 1):
            pod.lose_node()
            Ledger(LocalStore(tmp_path / "out"), "s").slot(0).exclude("broken")

    controller = apply(2, on_pod=lose_and_exclude)
    assert controller.run() == "Complete"
    assert [(pod.index, pod.code) for pod in controller.pods] == [(0, 137), (0, 0), (1, 0)]
    assert set(results(tmp_path)) == {1}


def test_the_readme_copies_the_rows_before_it_applies_the_job() -> None:
    readme = (ROOT / "README.md").read_text()
    (block,) = [b for b in readme.split("```") if "kubectl apply -f k8s/sweep-job.yaml" in b]
    steps = [
        "kubectl apply -f k8s/volume.yaml",
        "kubectl wait --for=condition=Ready",
        "kubectl exec qlora-sweep-files -- mkdir -p /data/CHANGE-ME\n",
        "kubectl cp rows.jsonl qlora-sweep-files:/data/CHANGE-ME/rows.jsonl\n",
        "kubectl delete pod qlora-sweep-files\n",
        "kubectl apply -f k8s/sweep-job.yaml\n",
        "kubectl wait --for=jsonpath='{.status.ready}'=1",
        "kubectl logs -f ",
    ]
    places = [block.index(step) for step in steps]
    assert places == sorted(places)
    volume, job = ((ROOT / f"k8s/{name}.yaml").read_text() for name in ("volume", "sweep-job"))
    assert "name: qlora-sweep-files\n" in volume
    assert "JOB_DATASET_URI: file:///data/CHANGE-ME/rows.jsonl\n" in job


def test_no_page_follows_more_pods_than_kubectl_does() -> None:
    """`kubectl logs -f -l ...` fails beyond five pods, and the pods that ended count."""
    for page in [*ROOT.glob("docs/*.md"), *ROOT.glob("k8s/**/*.yaml"), ROOT / "README.md"]:
        assert not re.search(r"logs (-f|--follow) (-l|--selector)", page.read_text()), page


def test_every_exit_code_has_a_row() -> None:
    rows = re.findall(r"^\| (\d+) \|", RUNBOOK, re.MULTILINE)
    assert [int(code) for code in rows] == [int(code) for code in ExitCode]


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_asks_a_known_metric_and_has_its_place(rule: dict[str, Any]) -> None:
    assert set(re.findall(r"kube_\w+", rule["expr"])) <= METRICS
    assert f"\n### {rule['alert']}\n" in RUNBOOK
    assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"
    name = yaml.safe_load_all((ROOT / "k8s/sweep-job.yaml").read_text())
    names = {document["metadata"]["name"] for document in name}
    pattern = re.search(r'(?:job_name|pod)=~"([^"]+)"', rule["expr"])
    assert pattern
    assert all(re.fullmatch(pattern[1], job) for job in names)


def parts() -> dict[str, str]:
    """The runbook's parts that tell what to do, by heading: those below ### and the exit codes."""
    found = dict(re.findall(r"^### (.+)\n((?:(?!^##).*\n?)+)", RUNBOOK, re.MULTILINE))
    (codes,) = re.findall(r"^## Exit codes\n((?:(?!^##).*\n?)+)", RUNBOOK, re.MULTILINE)
    return found | {"Exit codes": codes}


@pytest.mark.parametrize("part", parts())
def test_every_part_names_the_tests_that_walk_it_or_its_source(part: str) -> None:
    text = parts()[part]
    assert "\nWalked: " in text
    walked = text[text.index("\nWalked: ") :]
    assert re.search(r"`(test|alerts_test)\w*", walked)  # tests/test_docs.py: they exist
    if part in [rule["alert"] for rule in ALERTS]:
        assert "`alerts_test.yaml`" in walked
        assert f"alertname: {part}\n" in (Path(__file__).parent / "alerts_test.yaml").read_text()
    _, *unwalked = walked.split("Not walked: ")
    assert all("https://" in what or "docs/" in what for what in unwalked)


def test_every_file_that_the_runbook_names_exists() -> None:
    for path in re.findall(r"`((?:k8s|docs|job|tests)/[\w./-]+)`", RUNBOOK):
        assert (ROOT / path).exists(), path
