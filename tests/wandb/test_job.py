"""`python -m job` with W&B as a user runs it: create a sweep, train a real tiny model, report.

`pytest tests/wandb/test_job.py`
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.servers.wandb import API_KEY, WandbServer, wandb_server
from tests.tiny_model import make_base
from tests.trial.test_preemption import _finish, _lines_until
from tests.workers import make_inputs

pytestmark = pytest.mark.slow

STEPS = list(range(1, 61))


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with wandb_server() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("job")


@pytest.fixture(scope="module")
def environ(server: WandbServer, folder: Path) -> dict[str, str]:
    settings = make_inputs(folder) | {
        "device": "cpu",
        "max_steps": 60,
        "num_epochs": 20,
        "num_trials": 1,
        "lease_seconds": 3,
        "checkpoint_minutes": 0.01,
        "grace_seconds": 15,
    }
    make_base(folder / "base", vocab_size=600)
    (folder / "sweep.yaml").write_text(
        (folder / "sweep.yaml").read_text().replace("random", "bayes")
    )
    return {
        **{f"JOB_{name.upper()}": str(value) for name, value in settings.items()},
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_API_KEY": API_KEY,
        "WANDB_BASE_URL": server.url,
        "WANDB_PROJECT": "qlora",
        "JOB_STRICT": "1",
    }


def _start(*verb: str, environ: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "job", *verb],
        env=environ,
        stdout=subprocess.PIPE if verb else None,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


@pytest.fixture(scope="module")
def sweep(environ: dict[str, str]) -> str:
    """The output of `job sweep create`, read as a user reads it."""
    process = _start("sweep", "create", environ=environ)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    found = re.search(r"--env WANDB_SWEEP_ID=(\S+) qlora-sweep-job queue", out)
    assert found, out
    assert f"page  http://127.0.0.1:{environ['WANDB_BASE_URL'].rpartition(':')[2]}/team/" in out
    assert f"--from-literal=WANDB_SWEEP_ID={found[1]}" in out
    return found[1]


@pytest.fixture(scope="module")
def trained(
    sweep: str, environ: dict[str, str], folder: Path, server: WandbServer
) -> dict[str, str]:
    """A trial of the sweep, told to end in the middle and gone on with."""
    given = {k: v for k, v in environ.items() if k != "JOB_SWEEP_FILE"} | {"WANDB_SWEEP_ID": sweep}
    process = _start(environ=given)
    _lines_until(process, "step 15/60")
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, err = _finish(process)
    assert code == 75, err
    assert time.monotonic() - started < 15
    (run,) = server.state.runs.values()
    assert run.state == "running", "W&B is not told that a trial failed which goes on"
    code, err = _finish(_start(environ=given))
    assert code == 0, err
    assert "Traceback" not in err
    return given


def test_the_registered_sweep_is_the_file_with_a_cap(
    sweep: str, server: WandbServer, environ: dict[str, str]
) -> None:
    registered = server.state.sweeps[sweep.rpartition("/")[2]]
    source = yaml.safe_load(Path(environ["JOB_SWEEP_FILE"]).read_text())
    assert registered.config == source | {"run_cap": 2}
    assert (registered.entity, registered.project) == ("team", "qlora")


def test_a_real_trial_is_shown_whole(
    trained: dict[str, str], server: WandbServer, folder: Path
) -> None:
    (run,) = server.state.runs.values()
    assert run.steps in (STEPS, [0, *STEPS])
    assert (run.state, run.exit_code) == ("finished", 0)
    evaluated = [row["_step"] for row in run.rows if "eval/loss" in row]
    assert evaluated[-4:] == [15, 30, 45, 60]
    for row in run.rows[1:]:
        assert {"train/loss", "learning_rate", "tokens_per_second"} <= set(row)
    assert list(folder.glob("out/sweeps/*/slots/0000/mirror.json"))


def test_report_mirror_makes_up_for_an_outage(
    trained: dict[str, str], server: WandbServer, folder: Path
) -> None:
    (run,) = server.state.runs.values()
    rows = [{k: v for k, v in row.items() if not k.startswith("_")} for row in run.rows]
    server.state.runs.clear()
    (confirmation,) = folder.glob("out/sweeps/*/slots/0000/mirror.json*")
    confirmation.unlink()
    shutil.rmtree(folder / "work")
    server.refuse()
    failing = trained | {"WANDB_INIT_TIMEOUT": "3"}
    _, err = _finish(process := _start("report", "--mirror", environ=failing))
    assert process.returncode == 74, err
    assert "Traceback" not in err
    server.listen()
    _, err = _finish(process := _start("report", "--mirror", environ=trained))
    assert process.returncode == 0, err
    assert "W&B has all committed trials, 1 of them new" in err
    (run,) = server.state.runs.values()
    assert run.state == "finished"
    again = [{k: v for k, v in row.items() if not k.startswith("_")} for row in run.rows]
    assert again == rows


def test_verbs_say_what_is_missing(environ: dict[str, str]) -> None:
    keyless = environ | {"WANDB_API_KEY": ""}
    for verb in (["sweep", "create"], ["report", "--mirror"]):
        _, err = _finish(process := _start(*verb, environ=keyless))
        assert process.returncode == 64
        assert "WANDB_API_KEY: not set" in err
