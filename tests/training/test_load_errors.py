"""What a base that cannot be loaded means for the Job.

`pytest tests/training/test_load_errors.py`
"""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from job.errors import GpuError, JobError, OutageError, SettingsError
from tests.tiny_model import make_base

pytestmark = pytest.mark.slow


def _failed_load(location: str) -> JobError:
    import torch

    from job.training.model import load_base

    with pytest.raises(JobError) as caught:
        load_base(location, None, torch.device("cpu"))
    return caught.value


def test_a_hub_that_cannot_be_reached_is_an_outage() -> None:
    error = _failed_load("owner/never-downloaded")  # the tests run with HF_HUB_OFFLINE
    assert isinstance(error, OutageError), error
    assert "cannot be reached" in str(error)


def test_files_that_are_no_model_are_the_settings_fault(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert isinstance(_failed_load(str(tmp_path)), SettingsError)


def test_a_full_volume_and_a_failing_card_are_this_nodes() -> None:
    from job.training.model import _load_error

    full = _load_error("base", OSError(errno.ENOSPC, "No space left on device"))
    assert isinstance(full, OutageError)
    assert "no space left" in str(full)
    card = _load_error("base", RuntimeError("CUDA error: uncorrectable ECC error encountered"))
    assert isinstance(card, GpuError)


@pytest.mark.parametrize(
    ("kind", "message", "says"),
    [
        ("OutOfMemoryError", "CUDA out of memory.", "does not fit this GPU's free memory"),
        ("RuntimeError", "CUDA error: uncorrectable ECC error", "this node's GPU failed"),
    ],
)
def test_a_card_that_fails_while_weights_are_quantised_is_this_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, message: str, says: str
) -> None:
    """transformers catches whatever is raised there and raises another error in the end."""
    import bitsandbytes
    import torch

    def fail(*_: object, **__: object) -> None:
        raise getattr(torch, kind, RuntimeError)(message)

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", fail)
    error = _failed_load(str(make_base(tmp_path)))
    assert isinstance(error, GpuError), error
    assert says in str(error)


def test_libraries_own_words_for_out_of_memory_get_one_name() -> None:
    import torch

    from job.training.gpu_faults import gpu_faults_told, out_of_memory_by_one_name

    for words in ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when ..."):
        with pytest.raises(torch.OutOfMemoryError), gpu_faults_told(), out_of_memory_by_one_name():
            raise RuntimeError(words)
    with pytest.raises(GpuError, match="GPU failed: CUDA error: an illegal"), gpu_faults_told():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with")
    with pytest.raises(RuntimeError, match="shapes"), gpu_faults_told():
        raise RuntimeError("shapes cannot be multiplied")
