"""The device that a trial trains on, checked before anything is downloaded."""

from __future__ import annotations

import os

import torch

from job.errors import GpuError
from job.log import log
from job.process.gpu import CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACE, MIN_CAPABILITY
from job.training.gpu_faults import gpu_faults_told

# PyTorch's words: https://docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms
NO_DETERMINISTIC_KERNEL = "does not have a deterministic implementation"


@gpu_faults_told()
def open_device(name: str, *, gpu_memory_gb: float | None) -> torch.device:
    """Open the device that `JOB_DEVICE` names, its cache emptied, its memory capped.

    `gpu_memory_gb` is the cap in GiB. Raises `GpuError` if a GPU is asked for and none can be used.
    """
    if name == "cpu":
        log.info("device: CPU, fp32 (JOB_DEVICE=cpu)")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise GpuError(
            "no CUDA GPU can be used on this node: run with --gpus all (or nvidia.com/gpu: 1) on a"
            f" node whose driver supports CUDA {torch.version.cuda or '(this torch is CPU-only)'},"
            " or set JOB_DEVICE=cpu for a tiny model"
        )
    capability = torch.cuda.get_device_capability(0)
    properties = torch.cuda.get_device_properties(0)
    if capability < MIN_CAPABILITY:
        raise GpuError(
            f"{properties.name} has compute capability {capability[0]}.{capability[1]}, needed:"
            " 7.0 or higher (fp16 tensor cores), as a T4's 7.5"
        )
    torch.cuda.empty_cache()
    if gpu_memory_gb is not None:
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, gpu_memory_gb * 2**30 / properties.total_memory)
        )
    log.info(
        "device: %s, %.1f GiB%s, fp16; CUDA cache emptied",
        properties.name,
        properties.total_memory / 2**30,
        f" capped to {gpu_memory_gb}" if gpu_memory_gb else "",
    )
    use_deterministic_kernels(os.environ.get(CUBLAS_WORKSPACE))
    return torch.device("cuda", 0)


def use_deterministic_kernels(cublas_workspace: str | None) -> None:
    """Have every kernel give the same bits in every run, or say that they may not.

    Attention's backward sums with atomics otherwise, and a resumed trial ended 1e-5 beside an
    uninterrupted one. cuBLAS keeps to it only with the workspace that the supervisor sets before
    this process starts; another value of the variable is somebody's wish for speed.
    """
    if cublas_workspace != DETERMINISTIC_WORKSPACE:
        log.info("kernels: not deterministic, as %s is %s", CUBLAS_WORKSPACE, cublas_workspace)
        return
    torch.use_deterministic_algorithms(True)
    # Filling every new tensor with NaN would double the writes of each dequantised matrix.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def allow_other_kernels(error: RuntimeError) -> bool:
    """Whether `error` says that an operation has no deterministic kernel; all may be used then."""
    if NO_DETERMINISTIC_KERNEL not in str(error):
        return False
    torch.use_deterministic_algorithms(False)
    first_line = str(error).partition("\n")[0]
    log.warning("kernels: not deterministic from now on: %s", first_line)
    return True


def usable_memory_bytes(device: torch.device, *, gpu_memory_gb: float | None) -> int | None:
    """The bytes that this process may hold, those it holds already included; None on a CPU."""
    if device.type == "cpu":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    usable = free + torch.cuda.memory_reserved(device)
    return min(usable, int(gpu_memory_gb * 2**30)) if gpu_memory_gb else usable


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most GPU memory that tensors took so far; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
