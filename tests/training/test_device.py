"""Deterministic kernels, asked for and done without. `pytest tests/training/test_device.py`"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.slow
NO_KERNEL = (
    "cumsum_cuda_kernel does not have a deterministic implementation, but you set"
    " 'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this"
)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    import torch

    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_kernels_are_deterministic_only_with_the_workspace_that_cublas_needs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    import torch

    from job.process.gpu import DETERMINISTIC_WORKSPACE
    from job.training.device import use_deterministic_kernels

    for other in (None, ":0:0", ""):
        use_deterministic_kernels(other)
        assert not torch.are_deterministic_algorithms_enabled()
    use_deterministic_kernels(DETERMINISTIC_WORKSPACE)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "attention would not obey"
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_an_operation_without_a_deterministic_kernel_takes_another_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    import torch

    from job.training.loop import easing_on_oom

    torch.use_deterministic_algorithms(True)
    trainer: Any = None  # nothing is eased

    def step() -> str:
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(NO_KERNEL)
        return "taken"

    assert easing_on_oom(trainer, step) == "taken"
    assert "not deterministic from now on: cumsum_cuda_kernel" in caplog.text

    def fail() -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        easing_on_oom(trainer, fail)


def test_a_cpu_is_left_as_it_is() -> None:
    import torch

    from job.training.device import open_device

    assert open_device("cpu", gpu_memory_gb=None).type == "cpu"
    assert not torch.are_deterministic_algorithms_enabled()
