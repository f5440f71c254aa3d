"""An adapter that has no room beside the base. `pytest tests/training/test_fit.py`"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.errors import GpuError
from job.training.state import TrainState
from tests.tiny_model import make_recipe

pytestmark = pytest.mark.slow  # imports torch and peft


class FullCard:
    """A base beside which nothing has room: attaching an adapter looks at its parts first."""

    def __getattr__(self, name: str) -> Any:
        import torch

        raise torch.OutOfMemoryError("planted")


def _attempt(work_dir: Path, resume_dir: Path | None) -> Any:
    import torch

    from job.training.fit import fit
    from job.training.loop import Ending

    memory = SimpleNamespace(recompute=False, token_budget=64)
    inputs: Any = SimpleNamespace(base=FullCard(), memory=memory, ending=Ending())
    keeper: Any = SimpleNamespace(resume_dir=resume_dir)
    return fit(make_recipe(), inputs, device=torch.device("cpu"), work_dir=work_dir, keeper=keeper)


def test_an_adapter_without_room_beside_the_base_is_infeasible(tmp_path: Path) -> None:
    fitted = _attempt(tmp_path, None)
    assert (fitted.status, fitted.state) == ("infeasible", TrainState())
    assert "lower lora_r" in fitted.reason
    assert fitted.history_path.read_text() == ""


def test_where_it_had_room_before_it_is_the_nodes_fault(tmp_path: Path) -> None:
    with pytest.raises(GpuError, match="had room in an earlier attempt"):
        _attempt(tmp_path, tmp_path)
