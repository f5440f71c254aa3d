"""Builds `device.cpp` and runs a module with it; imports no torch."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent / "device.cpp"
BUILD_SECONDS, RUN_SECONDS = 300, 1800


def why_not() -> str | None:
    """Why there can be no fake card on this machine; None if there can."""
    if shutil.which("g++") is None:
        return "a fake CUDA card needs g++"
    if "+cpu" not in _torch_version():
        return "a fake CUDA card needs a CPU build of torch; this one has CUDA"
    return None


def run_with_fake_card(module: str, *arguments: str, folder: Path) -> str:
    """Run `python -m module arguments`; return its output. Torch finds the card when imported.

    `folder` gets the library. Raises `subprocess.CalledProcessError`.
    """
    library = _build(folder)
    environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=RUN_SECONDS,
    )
    return done.stdout


def _build(folder: Path) -> Path:
    torch_dir = _torch_dir()
    library = folder / "libfake_cuda.so"
    subprocess.run(
        [
            *("g++", "-shared", "-fPIC", "-std=c++20", "-O1", f"-I{torch_dir / 'include'}"),
            *(str(SOURCE), "-o", str(library)),
            *(f"-L{torch_dir / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_dir / 'lib'}"),
        ],
        check=True,
        timeout=BUILD_SECONDS,
    )
    return library


def _torch_dir() -> Path:
    """The folder of torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("torch")
    return Path(spec.origin).parent


def _torch_version() -> str:
    return (_torch_dir() / "version.py").read_text()
