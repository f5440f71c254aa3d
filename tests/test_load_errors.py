"""What a base that cannot be loaded means for the Job. `pytest tests/test_load_errors.py`"""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from job.errors import GpuError, JobError, OutageError, SettingsError

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
