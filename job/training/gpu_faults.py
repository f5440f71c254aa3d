"""Telling what an error of CUDA means: out of memory, or a card that failed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from job.errors import GpuError

# torch.OutOfMemoryError is raised by torch's allocator. What takes memory outside of it (kernels at
# their first use, a library's handle) fails with these words in a RuntimeError.
OUT_OF_MEMORY = ("CUDA error: out of memory", "STATUS_ALLOC_FAILED")
FAULTS = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error")


def is_gpu_fault(error: BaseException) -> bool:
    """Whether the card, its driver or a library of CUDA failed: not this code, nor the settings."""
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in FAULTS)
    )


@contextlib.contextmanager
def out_of_memory_by_one_name() -> Iterator[None]:
    """Turn every error that means "out of GPU memory" into `torch.OutOfMemoryError`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if any(words in str(error) for words in OUT_OF_MEMORY):
            raise torch.OutOfMemoryError(str(error)) from error
        raise


@contextlib.contextmanager
def gpu_faults_told() -> Iterator[None]:
    """Turn a failure of CUDA into `GpuError`: another node may do better, another trial not."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not is_gpu_fault(error):
            raise
        first_line = str(error).strip().partition("\n")[0]
        raise GpuError(f"this node's GPU failed: {first_line}") from error
