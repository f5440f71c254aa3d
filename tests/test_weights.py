"""Whole weight files pass, all others are named. `pytest tests/test_weights.py`"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from job.base_model import check_weights, no_weights
from job.errors import SettingsError


def weights(fill: bytes) -> bytes:
    """A safetensors file of one tensor of 1000 bytes."""
    tensor = {"dtype": "U8", "shape": [1000], "data_offsets": [0, 1000]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + fill * 1000


def test_safetensors_own_files_are_whole(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    from safetensors.numpy import save_file

    for tensors in ({}, {"a": numpy.ones((3, 5)), "b": numpy.ones(0)}):
        save_file(tensors, tmp_path / "w", metadata={"format": "pt"})
        check_weights(tmp_path / "w")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (weights(b"x")[:-1], "is cut off, 1107 of 1108 bytes are there"),
        (weights(b"x")[:40], "is cut off or no safetensors file"),
        (weights(b"x")[:5], "is cut off or no safetensors file"),
        (b"", "is cut off or no safetensors file"),
        (weights(b"x") + b"y", "is damaged, 1 bytes more than its header says"),
        (b"\2\0\0\0\0\0\0\0[]", "is cut off or no safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is cut off or no safetensors file"),
        (b"\xff" * 500, "is cut off or no safetensors file"),
    ],
)
def test_a_file_that_is_not_whole_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=f"^JOB_BASE_MODEL: {path} {says}.*; fetch it again$"):
        check_weights(path)


def test_a_base_without_weights_is_not_told_of_pickles() -> None:
    assert "pickled weights are refused" in str(no_weights("/base", ["pytorch_model.bin"]))
    assert str(no_weights("/base", ["config.json"])) == (
        "JOB_BASE_MODEL: /base holds no *.safetensors file and no other weights;"
        " fetch the whole model"
    )
