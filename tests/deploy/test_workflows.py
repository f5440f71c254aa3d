"""CI runs make targets that exist, with least rights: pytest tests/deploy/test_workflows.py"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TARGETS = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)

pytestmark = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)


def read(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text())


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


def test_run_steps_are_make_targets(path: Path) -> None:
    commands = [step["run"] for step in steps(path) if "run" in step]
    assert commands
    for command in commands:
        match = re.fullmatch(r"make ([a-z-]+)", command)
        assert match, f"{command!r}: a step is one make target, so that it runs on a laptop too"
        assert match[1] in TARGETS, f"{command!r}: `make help` lists no such target"


# What a job may do beyond reading the code, and nothing else may.
RIGHTS = {
    ("release.yml", "image"): {"packages": "write", "id-token": "write", "attestations": "write"},
    ("release.yml", "release"): {"contents": "write"},
}


def test_rights_are_least(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        wanted = RIGHTS.get((path.name, name), {})
        assert job.get("permissions", {}) == ({"contents": "read"} | wanted if wanted else {})
    # A pull request from a fork must never run with this repository's secrets.
    assert "pull_request_target" not in workflow[True]  # `on` is a boolean to YAML 1.1
    for step in steps(path):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_no_expression_reaches_a_shell(path: Path) -> None:
    assert not [step["run"] for step in steps(path) if "${{" in step.get("run", "")]


def test_actions_are_pinned_to_a_commit_beside_its_tag(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if re.search(r"\buses:", line)]
    assert len(lines) == sum("uses" in step for step in steps(path))
    for line in lines:
        assert re.search(r"uses: [\w.-]+/[\w./-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+$", line), line


def test_jobs_end_and_make_way(path: Path) -> None:
    workflow = read(path)
    is_release = "tags" in (workflow[True].get("push") or {})
    assert bool(workflow["concurrency"]["cancel-in-progress"]) is not is_release
    assert all(job["timeout-minutes"] <= 60 for job in workflow["jobs"].values())


def test_ci_checks_everything_and_runs_the_image(path: Path) -> None:
    if path.name != "ci.yml":
        return
    commands = {step["run"] for step in steps(path) if "run" in step}
    checks = {"make lint", "make check-manifests", "make check-skypilot", "make test"}
    assert commands == checks | {"make image", "make smoke"}
    script = re.findall(r"^make (.*)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert checks <= {f"make {word}" for line in script for word in line.split()}


def test_oldest_python_is_tested(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    matrices = [job.get("strategy", {}).get("matrix", {}) for job in read(path)["jobs"].values()]
    versions = [version for matrix in matrices for version in matrix.get("python-version", [])]
    if any(step.get("uses", "").startswith("actions/setup-python@") for step in steps(path)):
        assert project["requires-python"] == f">={versions[0]}"


def test_oldest_and_pinned_torch_are_tested(path: Path) -> None:
    """One of CI's rows takes the oldest that is allowed, the others what constraints.txt pins."""
    if path.name != "ci.yml":
        return
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (allowed,) = [name for name in project["dependencies"] if name.startswith("torch>=")]
    job = read(path)["jobs"]["check"]
    assert job["env"]["TORCH"] == "${{ matrix.torch }}"
    (row,) = job["strategy"]["matrix"]["include"]
    assert row["torch"] == allowed.removeprefix("torch>=").partition(",")[0] + ".0"
    assert "torch" not in job["strategy"]["matrix"]
    assert row["python-version"] in job["strategy"]["matrix"]["python-version"]
    makefile, pins = ((ROOT / file).read_text() for file in ("Makefile", "constraints.txt"))
    assert "s/^torch==.*/torch==$(TORCH)/)' constraints.txt" in makefile
    assert re.search(r"^torch==2\.\d+\.\d+$", pins, re.MULTILINE)
