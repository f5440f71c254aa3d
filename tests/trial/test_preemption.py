"""The real job, told to end or killed in mid-training, with all its processes.

`pytest tests/trial/test_preemption.py`
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.tiny_model import make_base
from tests.workers import make_inputs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    forked.with_torch()
    folder = tmp_path_factory.mktemp("inputs")
    settings = make_inputs(folder) | {
        "device": "cpu",
        "max_steps": 240,
        "num_epochs": 40,
        "lora_dropout": 0.1,
        "num_trials": 1,
        "lease_seconds": 3,
        "checkpoint_minutes": 0.01,
        "grace_seconds": 15,
    }
    make_base(folder / "base", vocab_size=600)
    return {f"JOB_{name.upper()}": str(value) for name, value in settings.items()}


def _start(
    inputs: dict[str, str], out: Path, *, start: Callable[..., Any] = forked.popen
) -> subprocess.Popen[str]:
    environ = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process: subprocess.Popen[str] = start(
        [sys.executable, "-m", "job"],
        env=environ | inputs | {"JOB_OUTPUT_URI": str(out), "JOB_WORK_DIR": str(out / "work")},
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    return process


def _finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def _lines_until(process: subprocess.Popen[str], text: str) -> str:
    """Read the log until a line holds `text`; the process ends or the line comes."""
    seen = ""
    assert process.stderr is not None
    for line in process.stderr:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came:\n{seen}")


def _result(out: Path) -> dict[str, Any]:
    (path,) = out.glob("sweeps/s/slots/0000/result.json")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.fixture(scope="module")
def calm(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _calm(inputs, tmp_path_factory.mktemp("calm"))


def _calm(inputs: dict[str, str], out: Path) -> dict[str, Any]:
    code, err = _finish(_start(inputs, out))
    assert code == 0, err
    return _result(out)


# Shorter than the others: the process around it is the same whatever the precision.
IN_16_BITS = {"JOB_QUANTIZATION": "none", "JOB_MAX_STEPS": "48"}


@pytest.mark.parametrize(
    ("moment", "changes"),
    [("device:", {}), ("data:", {}), ("step 60/240", {}), ("model:", {}),
     ("step 12/48", IN_16_BITS)],
)  # fmt: skip
def test_a_signal_ends_in_75_within_the_grace_and_the_next_attempt_ends_equal(
    inputs: dict[str, str],
    calm: dict[str, Any],
    tmp_path: Path,
    moment: str,
    changes: dict[str, str],
) -> None:
    number = signal.SIGINT if moment == "model:" else signal.SIGTERM
    if changes:
        inputs = inputs | changes
        calm = _calm(inputs, tmp_path / "calm")
    tmp_path /= "told"
    # A new Python for the signal that comes while torch is imported.
    start = subprocess.Popen if moment == "device:" else forked.popen
    process = _start(inputs, tmp_path, start=start)
    before = _lines_until(process, moment)
    started = time.monotonic()
    process.send_signal(number)
    process.send_signal(number)  # a second one changes nothing
    code, err = _finish(process)
    assert time.monotonic() - started < 15
    assert code == 75, before + err
    assert not list((tmp_path / "work").glob("attempt-*")), "the work folder is left clean"
    if "step" in moment:
        assert "goes on from step" in err
    again = _start(inputs, tmp_path)
    code, err = _finish(again)
    assert code == 0, err
    result = _result(tmp_path)
    for key in ("eval_loss", "curve", "adapter_sha256", "best_step", "untuned_16bit"):
        assert result[key] == calm[key], key
    assert (result["untuned_16bit"] is None) == (result["quantization"] == "none")
    # Measured again by an attempt that begins anew; a checkpoint keeps it.
    assert ("untuned in 16 bits" in err) == ("going on from the checkpoint at step" not in err)
    if "step" in moment:
        assert "going on from the checkpoint at step" in err
        assert result["attempts"] == 2


def test_a_killed_job_goes_on_from_its_background_checkpoint(
    inputs: dict[str, str], calm: dict[str, Any], tmp_path: Path
) -> None:
    process = _start(inputs, tmp_path)
    _lines_until(process, "checkpoint at step")
    (child,) = _children(process.pid)
    os.kill(child, signal.SIGKILL)
    code, err = _finish(process)
    assert code == 70, err
    assert "killed by SIGKILL" in err
    code, err = _finish(_start(inputs, tmp_path))
    assert code == 0, err
    assert "going on from the checkpoint at step" in err
    assert _result(tmp_path)["adapter_sha256"] == calm["adapter_sha256"]
    leftovers = list(tmp_path.glob("sweeps/s/slots/0000/checkpoints/*/manifest.json"))
    assert len(leftovers) <= 1, "a committed slot loses its checkpoints"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_trial_that_is_killed_at_three_places_ends_with_the_same_bytes(
    inputs: dict[str, str], calm: dict[str, Any], tmp_path: Path, device: str
) -> None:
    """Bit by bit on a GPU as well: `make test-gpu`."""
    inputs = inputs | {"JOB_DEVICE": device}
    # CUDA cannot be used in a fork of a process that has opened it, as other tests have.
    start = subprocess.Popen if device == "cuda" else forked.popen
    if device == "cuda":
        code, err = _finish(_start(inputs, tmp_path / "calm", start=start))
        assert code == 0, err
        calm = _result(tmp_path / "calm")
    for moment in ("checkpoint at step", "step 120/240: eval", "step 180/240: eval"):
        process = _start(inputs, tmp_path / "killed", start=start)
        _lines_until(process, moment)
        (child,) = _children(process.pid)
        os.kill(child, signal.SIGKILL)
        code, err = _finish(process)
        assert code == 70, err
    code, err = _finish(_start(inputs, tmp_path / "killed", start=start))
    assert code == 0, err
    assert "going on from the checkpoint at step" in err
    result = _result(tmp_path / "killed")
    assert result["attempts"] == 4
    for key in ("adapter_sha256", "eval_loss", "curve", "best_step"):
        assert result[key] == calm[key], key


def test_a_trial_does_not_outlive_its_killed_parent(inputs: dict[str, str], tmp_path: Path) -> None:
    process = _start(inputs, tmp_path)
    _lines_until(process, "model:")
    (child,) = _children(process.pid)
    descriptor = os.pidfd_open(child)
    process.kill()
    process.wait(timeout=10)
    import select

    assert select.select([descriptor], [], [], 10)[0], "the trial goes on without its parent"
    os.close(descriptor)
    assert process.stderr is not None
    process.stderr.close()


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
