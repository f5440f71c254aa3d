"""Asks the driver whether this node's GPU can be used, before torch is imported.

A node that cannot train is left within a second, before a base model is downloaded to it. What
passes here is looked at again through torch (`job/training/device.py`). The driver's library is
NVML, https://docs.nvidia.com/deploy/nvml-api, called through NVIDIA's package nvidia-ml-py; the
container runtime mounts it beside the GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml

from job.errors import GpuError
from job.log import log

# What the codes that a node really shows mean; nvmlReturn_t has 30 of them.
NVML_ERRORS = {
    pynvml.NVML_ERROR_NO_PERMISSION: "no permission to use the GPU",
    pynvml.NVML_ERROR_NOT_FOUND: "there is no such GPU",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded",
    pynvml.NVML_ERROR_GPU_IS_LOST: "the GPU is lost: it has fallen off the bus",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
        "the driver and its library are of different versions: restart the node"
    ),
}
# With eight buffers of 4 MiB a handle, cuBLAS gives equal results from run to run.
# https://docs.nvidia.com/cuda/cublas/index.html#results-reproducibility
CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
MIN_CAPABILITY = (7, 0)  # the first cards with fp16 tensor cores; a T4 is (7, 5)
# Cards of a T4's compute capability that were built without tensor cores (TU116, TU117).
WITHOUT_TENSOR_CORES = r"\b(GTX 16\d\d|MX[45]50|T(400|500|550|600|1000|1200|2000))\b"
FREE_SHARE = 0.9  # of the card's memory; less means that another process holds it
WAY_OUT = (
    "run with --gpus all (or nvidia.com/gpu: 1) on a node with a working driver, or set"
    " JOB_DEVICE=cpu for a tiny model"
)


@dataclass(frozen=True)
class Gpu:
    """The GPU that CUDA will use, as its driver describes it."""

    name: str
    capability: tuple[int, int] | None  # None where the driver does not say (a slice of a GPU)
    total_bytes: int
    free_bytes: int
    driver: str
    driver_cuda: tuple[int, int]  # the newest CUDA that the driver supports


def preflight(device: str, *, gpu_memory_gb: float | None) -> None:
    """Raise `GpuError` if `JOB_DEVICE` asks for a GPU and this node's cannot be used."""
    if device == "cpu":
        return
    torch_cuda = torch_cuda_version()
    if torch_cuda is None:
        raise GpuError(
            "no GPU can be used: this torch is built for the CPU only; build the image with"
            " TORCH_INDEX of a CUDA build, or set JOB_DEVICE=cpu for a tiny model"
        )
    gpu = read_gpu(os.environ.get("CUDA_VISIBLE_DEVICES"))
    check_gpu(gpu, torch_cuda=torch_cuda, gpu_memory_gb=gpu_memory_gb)
    log.info(
        "GPU: %s, driver %s (CUDA %d.%d), %.1f of %.1f GiB free",
        gpu.name, gpu.driver, *gpu.driver_cuda, gpu.free_bytes / 2**30, gpu.total_bytes / 2**30,
    )  # fmt: skip


def check_gpu(gpu: Gpu, *, torch_cuda: tuple[int, int], gpu_memory_gb: float | None) -> None:
    """Raise `GpuError` if the card, its driver or its free memory is not enough."""
    # A driver runs everything of its own major version and older, minor versions apart
    # (https://docs.nvidia.com/deploy/cuda-compatibility), for cards that the build has code for.
    if gpu.driver_cuda[0] < torch_cuda[0]:
        raise GpuError(
            f"driver {gpu.driver} supports CUDA {_dotted(gpu.driver_cuda)}, this torch is built for"
            f" CUDA {_dotted(torch_cuda)}: use a node with a newer driver, or an image whose torch"
            f" is built for CUDA {gpu.driver_cuda[0]} (TORCH_INDEX)"
        )
    if gpu.capability is not None and gpu.capability < MIN_CAPABILITY:
        raise GpuError(
            f"{gpu.name} has compute capability {_dotted(gpu.capability)}, needed: 7.0 or higher"
            " (fp16 tensor cores), as a T4's 7.5; choose another node type"
        )
    if re.search(WITHOUT_TENSOR_CORES, gpu.name):
        raise GpuError(
            f"{gpu.name} has no fp16 tensor cores, although its compute capability is that of a T4;"
            " choose another node type"
        )
    needed_bytes = FREE_SHARE * gpu.total_bytes
    if gpu_memory_gb is not None:
        needed_bytes = min(needed_bytes, gpu_memory_gb * 2**30)
    if gpu.free_bytes < needed_bytes:
        raise GpuError(
            f"{gpu.name} has {gpu.free_bytes / 2**30:.1f} of {gpu.total_bytes / 2**30:.1f} GiB"
            f" free, needed: {needed_bytes / 2**30:.1f}; end the other process on it, or set"
            " JOB_GPU_MEMORY_GB to what this trial may use"
        )


def read_gpu(visible: str | None) -> Gpu:
    """Describe the first GPU of `CUDA_VISIBLE_DEVICES` (unset: of all). Raises `GpuError`."""
    wanted = "0" if visible is None else visible.split(",")[0].strip()
    if not wanted or wanted.startswith("-"):
        raise GpuError(f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU: unset it, or name one")
    try:
        _ask(pynvml.nvmlInit, but=pynvml.NVMLError_LibraryNotFound)
    except pynvml.NVMLError_LibraryNotFound as error:
        library = "the driver's library libnvidia-ml.so.1"
        raise GpuError(f"no GPU: {library} is not here; {WAY_OUT}") from error
    try:
        device = _handle(wanted)
        memory = _memory(device)
        cuda = _ask(pynvml.nvmlSystemGetCudaDriverVersion_v2)
        return Gpu(
            name=_ask(pynvml.nvmlDeviceGetName, device),
            capability=_capability(device),
            total_bytes=memory.total,
            free_bytes=memory.free,
            driver=_ask(pynvml.nvmlSystemGetDriverVersion),
            driver_cuda=(cuda // 1000, cuda % 1000 // 10),
        )
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def torch_cuda_version() -> tuple[int, int] | None:
    """The CUDA (major, minor) that torch is built for, by its version file; None for the CPU."""
    spec = importlib.util.find_spec("torch")  # finds, does not import: 3 s on two cores
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).with_name("version.py").read_text()
    match = re.search(r"^cuda\b.*= '(\d+)\.(\d+)", text, re.MULTILINE)
    return (int(match[1]), int(match[2])) if match else None


def _handle(wanted: str) -> Any:
    """NVML's handle of the GPU with this index or this id."""
    if not wanted.isdecimal():  # GPU-<uuid>, or MIG-<uuid> for a slice of one
        return _handle_by_id(wanted)
    num_gpus = _ask(pynvml.nvmlDeviceGetCount)
    if int(wanted) >= num_gpus:
        raise GpuError(f"no GPU {wanted}: this node shows {num_gpus}; {WAY_OUT}")
    return _ask(pynvml.nvmlDeviceGetHandleByIndex, int(wanted))


def _handle_by_id(wanted: str) -> Any:
    """NVML's handle of the GPU whose id is this, or begins with it: CUDA takes a unique prefix.

    https://docs.nvidia.com/cuda/cuda-c-programming-guide/#env-vars
    """
    function = pynvml.nvmlDeviceGetHandleByUUID
    unknown = (pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument)
    try:
        return _ask(function, wanted, but=unknown)
    except unknown as error:
        num_gpus = _ask(pynvml.nvmlDeviceGetCount)
        devices = [_ask(pynvml.nvmlDeviceGetHandleByIndex, n) for n in range(num_gpus)]
        ids = [str(_ask(pynvml.nvmlDeviceGetUUID, device)) for device in devices]
        found = [
            device for device, uuid in zip(devices, ids, strict=True) if uuid.startswith(wanted)
        ]
        if len(found) == 1:
            return found[0]
        what = f"names {len(found)} GPUs at once" if found else "there is no such GPU"
        raise GpuError(
            f"CUDA_VISIBLE_DEVICES={wanted}: {what}; here are: {', '.join(ids)}"
        ) from error


def _memory(device: Any) -> Any:
    """NVML's `total` and `free` bytes; of its slice, where this container has a slice (MIG).

    Index 0 is the whole card even then, and nobody may see its memory: `NO_PERMISSION`.
    """
    try:
        return _ask(pynvml.nvmlDeviceGetMemoryInfo, device, but=pynvml.NVMLError_NoPermission)
    except pynvml.NVMLError_NoPermission:
        with contextlib.suppress(pynvml.NVMLError):
            device = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(device, 0)
        return _ask(pynvml.nvmlDeviceGetMemoryInfo, device)


def _capability(device: Any) -> tuple[int, int] | None:
    """The compute capability; None where the driver has none to tell (a slice of a GPU)."""
    function = pynvml.nvmlDeviceGetCudaComputeCapability
    try:
        major, minor = _ask(function, device, but=pynvml.NVMLError_NotSupported)
    except pynvml.NVMLError_NotSupported:
        return None
    return major, minor


def _ask(function: Callable[..., Any], *arguments: object, but: Any = ()) -> Any:
    """The answer of one of NVML's functions; its errors, but those of type `but`, as `GpuError`."""
    try:
        return function(*arguments)
    except but:
        raise
    except pynvml.NVMLError as error:
        reason = NVML_ERRORS.get(error.value, f"error {error.value}")
        message = f"the GPU cannot be used: {reason} ({function.__name__}); {WAY_OUT}"
        raise GpuError(message) from error


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
