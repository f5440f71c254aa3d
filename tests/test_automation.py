"""docs/automation.md, line by line: JSON as its schema says. `pytest tests/test_automation.py`"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from job.cli import VERBS
from job.errors import ExitCode
from tests import forked
from tests.winner.tuned import make_tuned_sweep

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/automation.md").read_text()
LINES = re.findall(r"^\| `job ([^`]+)` \|", PAGE, re.MULTILINE)
SCHEMA = json.loads((ROOT / "docs/verbs.schema.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    make_tuned_sweep(folder, num_slots=3)
    return folder


# `stage` needs a hub: tests/test_staged_base.py runs its line.
@pytest.mark.parametrize("line", [line for line in LINES if not line.startswith("stage")])
def test_each_line_prints_one_json_object_of_its_schema(folder: Path, line: str) -> None:
    words = shlex.split(line)
    environ = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "JOB_BASE_MODEL": f"{folder}/base", "JOB_DATASET_URI": f"{folder}/rows.jsonl",
        "JOB_OUTPUT_URI": f"{folder}/out", "JOB_SWEEP_NAME": "s", "JOB_NUM_TRIALS": "3",
        "JOB_WORK_DIR": f"{folder}/work", "JOB_DEVICE": "cpu",
    }  # fmt: skip
    if words[0] == "plan":  # a sweep that is not begun: the made one has no identity of its own
        environ |= {"JOB_SWEEP_NAME": "new", "JOB_USE_FULL_DATASET": "1"}
    done = forked.run([sys.executable, "-m", "job", *words], env=environ, cwd=folder, timeout=240)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert "--json" in words
    schema = {"$ref": f"#/$defs/{words[0]}", "$defs": SCHEMA["$defs"]}
    Draft202012Validator(schema).validate(content)
    if words[0] == "status":
        assert content["comparison"] is not None
        assert ("attempts" in content) == ("--attempts" in words)


def test_every_verb_that_has_json_has_a_line_and_a_schema() -> None:
    from argparse import ArgumentParser

    speaking = set()
    for name, verb in VERBS.items():
        parser = ArgumentParser()
        verb.add_options(parser)
        if "--json" in parser.format_help():
            speaking.add(name)
    assert speaking == {line.split()[0] for line in LINES}
    assert speaking <= set(SCHEMA["$defs"])
    silent = {"run", "trial", "queue", "sweep", "demo"}
    assert set(VERBS) - speaking == silent


def test_the_schema_is_one_and_sees_what_is_missing() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    schema = {"$ref": "#/$defs/redo", "$defs": SCHEMA["$defs"]}
    assert not Draft202012Validator(schema).is_valid({"slot": 1, "message": "begun again"})


def test_every_exit_code_has_its_line() -> None:
    (table,) = re.findall(r"\| exit code \|.*?\n\n", PAGE, re.DOTALL)
    told = {
        int(code)
        for code in re.findall(
            r"\d+", " ".join(re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE))
        )
    }
    assert told == {int(code) for code in ExitCode}
