"""The notebook runs from its first cell to committed trials. `pytest tests/test_notebook.py`"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import nbformat
import pytest
import yaml

import job
from job.ledger.ledger import Ledger
from job.settings import Settings, variable
from job.store.local import LocalStore
from tests.workers import SWEEP

ROOT = Path(__file__).parent.parent
NOTEBOOK = nbformat.read(ROOT / "docs/notebooks/worker.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]


def _runner() -> ModuleType:
    """`.ci/notebook.py`, which `make notebook` runs."""
    spec = importlib.util.spec_from_file_location("notebook", ROOT / ".ci/notebook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_a_valid_notebook_with_the_output_of_a_run() -> None:
    nbformat.validate(NOTEBOOK)
    assert all(cell.outputs for cell in CODE), "make notebook executes it"
    shown = "".join(output.get("text", "") for cell in CODE for output in cell.outputs)
    assert "committed: completed" in shown or re.search(r"slot \d+ committed", shown)
    assert "exit 0" in shown
    assert not re.search(r"exit [1-9]\d", shown)
    assert not re.search(r"(?<!\w)/(tmp|root|home|work)/", shown), "no path of one machine"


def test_it_installs_the_release_that_a_rented_worker_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a branch holds today may not be what the sweep's other workers run."""
    commands: list[list[str]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr("subprocess.run", lambda command, check: commands.append(command))
    exec(re.sub(r"^!.*$", "", CODE[0].source, flags=re.MULTILINE), {})  # noqa: S102
    task = yaml.safe_load((ROOT / "docs/skypilot.yaml").read_text(encoding="utf-8"))["envs"]
    assert task["VERSION"] == f"v{job.__version__}", "the tag that `make check-tag` asks for"
    source = f"git+{task['REPOSITORY']}@{task['VERSION']}"
    (command,) = commands
    assert command[-1] == f"qlora-sweep-job[gcs,azure] @ {source}"


def test_it_sets_only_settings_that_there_are() -> None:
    source = "".join(cell.source for cell in CODE)
    known = {variable(name) for name in Settings.model_fields}
    assert set(re.findall(r"JOB_[A-Z_]+", source)) <= known


def test_it_knows_every_variable_of_the_page_on_free_stores() -> None:
    page = (ROOT / "docs/free-stores.md").read_text(encoding="utf-8")
    asked = set(re.findall(r"^(\w+)=", page, re.MULTILINE))
    assert "AWS_REGION" in asked
    assert asked <= set(re.findall(r'"([A-Z0-9_]+)"', CODE[1].source))


@pytest.mark.parametrize("service", ["Colab", "Kaggle", "Kaggle with Colab's packages", "neither"])
def test_secrets_come_from_the_service_that_has_them(
    monkeypatch: pytest.MonkeyPatch, service: str
) -> None:
    def have(name: str, **content: object) -> None:
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))  # type: ignore[misc]

    def no_notebook(name: str) -> str:
        raise TimeoutError(name)

    if "Colab" in service:
        have("google", colab=None)
        get = no_notebook if "Kaggle" in service else {"HF_TOKEN": "t0ken"}.__getitem__
        have("google.colab", userdata=SimpleNamespace(get=get))
    if "Kaggle" in service:
        client = SimpleNamespace(get_secret={"HF_TOKEN": "t0ken"}.__getitem__)
        have("kaggle_secrets", UserSecretsClient=lambda: client)
    environ: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environ)
    exec(CODE[1].source, {})  # noqa: S102
    assert environ.get("HF_TOKEN") == (None if service == "neither" else "t0ken")
    assert "WANDB_API_KEY" not in environ


def test_settings_that_are_changed_and_run_again_count(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"JOB_WORKERS": "2"}  # given from outside: it stays
    monkeypatch.setattr(os, "environ", environ)
    names: dict[str, object] = {}
    exec(CODE[1].source, names)  # noqa: S102
    assert "CHANGE-ME" in environ["JOB_OUTPUT_URI"]
    exec(CODE[1].source.replace("CHANGE-ME", "mine"), names)  # noqa: S102
    assert environ["JOB_OUTPUT_URI"] == "s3://mine/sweeps"
    assert environ["JOB_WORKERS"] == "2"


@pytest.mark.slow
def test_it_runs_to_committed_trials_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    from tests.tiny_model import make_base
    from tests.tiny_tokenizer import byte_level_tokenizer

    monkeypatch.delenv("WANDB_MODE", raising=False)
    tokenizer = byte_level_tokenizer()
    base = make_base(tmp_path / "base", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(base)
    rows = [{"question": f"{a}+{b}?", "answer": str(a + b)} for a in range(20) for b in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    environ: dict[str, Any] = {
        "JOB_BASE_MODEL": str(base),
        "JOB_DATASET_URI": str(tmp_path / "rows.jsonl"),
        "JOB_OUTPUT_URI": str(tmp_path / "out"),
        "JOB_WORK_DIR": str(tmp_path / "work"),
        "JOB_SWEEP_FILE": str(tmp_path / "sweep.yaml"),
        "JOB_MAX_STEPS": "4",
        "JOB_EVALS_PER_TRIAL": "2",
        "JOB_SUBSAMPLE_FRACTION": "1",
        "WANDB_MODE": "disabled",
    }
    executed = _runner().execute(environ, tmp_path)
    results = [result for _, _, result in Ledger(LocalStore(tmp_path / "out"), "s").committed(2)]
    assert [result.status for result in results] == ["completed"] * 2
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    queue = "".join(output.get("text", "") for output in code[3].outputs)
    assert "queue: 2 workers" in queue
    assert {"[1]", "[2]"} <= set(re.findall(r"\[\d\]", queue))
    page = code[-1].outputs[-1]["data"]["text/html"]
    assert "&lt;svg" in page, "the report is shown inline"
