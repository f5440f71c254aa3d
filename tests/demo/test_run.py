"""The demo on a base of one's own, with no network. `pytest tests/demo/test_run.py`

The demo as it is, on its real model: test_real_model.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from job.errors import ExitCode
from tests import forked
from tests.test_supervisor import READY, _await_ready
from tests.tiny_model import make_base
from tests.tiny_tokenizer import byte_level_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def _demo(folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    (folder / "pip.py").write_text("raise SystemExit('nothing is to be fetched')")
    forked.with_torch()
    return forked.run(
        [sys.executable, "-m", "job", "demo"],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{folder}:{ROOT}", "HOME": str(folder),
             "OMP_NUM_THREADS": "1", **environ},
        timeout=300,
    )  # fmt: skip


def test_settings_in_the_environment_win_and_another_base_is_not_fetched(tmp_path: Path) -> None:
    base = tmp_path / "base"
    byte_level_tokenizer().save_pretrained(base)
    make_base(base, vocab_size=600, max_position_embeddings=1024)
    done = _demo(tmp_path, JOB_BASE_MODEL=str(base), JOB_NUM_TRIALS="1", JOB_MAX_STEPS="3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"the base model: {base}, by JOB_BASE_MODEL" in done.stdout
    (path,) = tmp_path.glob(".demo/store/sweeps/demo-*/slots/*/result.json")
    result = json.loads(path.read_text())
    assert (result["base_model"], result["steps"]) == (str(base), 3)
    assert done.stdout.count("before:") == done.stdout.count("held out:") == 3


@pytest.mark.parametrize("number", ["0", "101", "three"])
def test_a_wrong_number_of_trials_is_told_before_anything_is_done(
    tmp_path: Path, number: str
) -> None:
    done = _demo(tmp_path, JOB_NUM_TRIALS=number)
    assert done.returncode == ExitCode.SETTINGS
    assert f"JOB_NUM_TRIALS: is '{number}'; allowed: 1 to 100 in the demo" in done.stderr
    assert not (tmp_path / ".demo").exists()


# The demo's own way to run a queue, whose trials are `sh -c SCRIPT`.
DEMO = """
import os, sys
from dataclasses import replace
from job import cli, supervisor
from job.__main__ import main
from job.demo import run
supervisor.TRIAL_COMMAND = ("sh", "-c", sys.argv[1])
def queue(_):
    return run._run_verb(dict(os.environ), "queue"), None
cli.VERBS["demo"] = replace(cli.VERBS["demo"], run=queue)
sys.exit(main(["demo"]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_demo_alone_ends_its_queue_and_its_trial_in_their_own_time(
    tmp_path: Path, number: signal.Signals
) -> None:
    script = "trap 'echo saved > $OUT/saved; exit 75' TERM; " + READY + "sleep 60 & wait"
    os.mkfifo(tmp_path / "ready")
    demo = forked.popen(
        [sys.executable, "-c", DEMO, script],
        env={"PATH": os.environ["PATH"], "JOB_DATASET_URI": "rows", "JOB_OUTPUT_URI": "out",
             "JOB_DEVICE": "cpu", "JOB_NUM_TRIALS": "1", "JOB_WORK_DIR": f"{tmp_path}/work",
             "OUT": str(tmp_path)},
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    _await_ready(tmp_path)
    demo.send_signal(number)
    _, said = demo.communicate(timeout=60)  # until nobody can write there any more
    assert (tmp_path / "saved").exists()
    lines = said.splitlines()
    if number == signal.SIGKILL:
        assert demo.returncode == -number
    else:
        assert demo.returncode == ExitCode.PREEMPTED
        assert "exit 75 (preempted): the demo was told to end; " in lines.pop()
    assert "exit 75 (preempted): the queue was told to end, 1 of 1 slots are left" in lines[-1]
