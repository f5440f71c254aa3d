"""Safetensors files looked at before anything is loaded: whether every tensor's bytes are there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from job.errors import SettingsError

_LENGTH_BYTES = 8  # of the header, little-endian, at the file's beginning
_HEADER_LIMIT_BYTES = 100_000_000  # safetensors' own
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_weights(path: Path) -> None:
    """Compare the file's size with what its header says. Raises `SettingsError`, `OSError`.

    Format: https://huggingface.co/docs/safetensors. Reads the header only, never a tensor.
    """
    have = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = file.read(length) if length <= min(have, _HEADER_LIMIT_BYTES) else b""
    try:
        tensors = json.loads(header)
        ends = [int(t["data_offsets"][1]) for n, t in tensors.items() if n != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _damaged(path, "is cut off or no safetensors file, its header is damaged") from error
    need = _LENGTH_BYTES + length + max(ends, default=0)
    if have < need:
        raise _damaged(path, f"is cut off, {have} of {need} bytes are there")
    if have > need:
        raise _damaged(path, f"is damaged, {have - need} bytes more than its header says")


def no_weights(where: str, files: Iterable[str]) -> SettingsError:
    """`where` holds these files, and none of them is safetensors."""
    what = f"JOB_BASE_MODEL: {where} holds no *.safetensors file"
    if any(file.endswith(_PICKLES) for file in files):
        return SettingsError(
            f"{what}; pickled weights are refused, convert them with save_pretrained()"
        )
    return SettingsError(f"{what} and no other weights; fetch the whole model")


def _damaged(path: Path, what: str) -> SettingsError:
    return SettingsError(f"JOB_BASE_MODEL: {path} {what}; fetch it again")
