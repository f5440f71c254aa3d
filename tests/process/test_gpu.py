"""What a node's driver says of its GPU, and what follows: pytest tests/process/test_gpu.py

The driver's library is a small one of our own, built here, which the loader finds in place of the
driver's; environment variables say what it answers. Each test asks in a process of its own, because
a process keeps the library that it loaded first.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from job.errors import GpuError
from job.process.gpu import Gpu, check_gpu, preflight, read_gpu
from tests.runbook import check_row

ROOT = Path(__file__).parents[2]
T4 = Gpu("Tesla T4", (7, 5), 15360 * 2**20, 15200 * 2**20, "535.216.01", (12, 2))

# NVML as a T4 node answers; each function returns the code in FAKE_<NAME>, 0 if unset.
LIBRARY = r"""
#include <stdlib.h>
#include <string.h>
static int code(const char *name) { char *v = getenv(name); return v ? atoi(v) : 0; }
int nvmlInitWithFlags(unsigned flags) { return code("FAKE_INIT"); }
int nvmlShutdown(void) { return 0; }
static unsigned gpus(void) { return getenv("FAKE_GPUS") ? atoi(getenv("FAKE_GPUS")) : 1; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = gpus(); return code("FAKE_COUNT"); }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **device) {
    *device = (void *)(i ? 0x99ul + i : 0x1122334455667788);
    return i >= gpus() ? 2 : code("FAKE_HANDLE");
}
int nvmlDeviceGetUUID(void *device, char *text, unsigned n) {
    strncpy(text, device == (void *)0x1122334455667788 ? "GPU-1" : "GPU-8932f937-0000", n);
    return 0;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    *device = (void *)0x1122334455667788; return strcmp(uuid, "GPU-1") ? 6 : 0;
}
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *memory) {
    memory[0] = 15360ull << 20; memory[1] = 15200ull << 20; memory[2] = 160ull << 20;
    if (device == (void *)0x51) {
        memory[0] = 10240ull << 20; memory[1] = 10200ull << 20; return 0;
    }
    return device == (void *)0x1122334455667788 ? code("FAKE_MEMORY") : 2;
}
int nvmlDeviceGetMigDeviceHandleByIndex(void *device, unsigned i, void **slice) {
    *slice = (void *)0x51; return i ? 6 : getenv("FAKE_MIG") ? 0 : 3;
}
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 12020; return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned n) { strncpy(text, "535.216.01", n); return 0; }
int nvmlDeviceGetName(void *device, char *text, unsigned n) {
    strncpy(text, "Tesla T4", n); return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    *major = 7; *minor = 5; return code("FAKE_CAPABILITY");
}
"""


ASK = """
from job.process.gpu import *
try:
    print(read_gpu({visible!r}))
except GpuError as error:
    print("GpuError:", error)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a driver's library that answers as told."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler to build a driver library")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(LIBRARY)
    out = folder / "libnvidia-ml.so.1"
    command = [compiler, "-shared", "-fPIC", "-o", str(out), str(folder / "nvml.c")]
    subprocess.run(command, check=True, timeout=60)
    return folder


def _ask(folder: Path, visible: str | None, **fault: str) -> str:
    """`read_gpu`'s answer, or its error, in a process that loads the library of this folder."""
    return subprocess.run(
        [sys.executable, "-c", ASK.format(visible=visible)],
        env={"LD_LIBRARY_PATH": str(folder), **fault},
        cwd=ROOT, check=True, capture_output=True, text=True, timeout=60,
    ).stdout.strip()  # fmt: skip


@pytest.mark.parametrize("visible", [None, "0", "0,1", "GPU-1"])
def test_the_driver_describes_the_gpu(library: Path, visible: str | None) -> None:
    assert _ask(library, visible) == repr(T4)


@pytest.mark.parametrize("visible", ["GPU", "GPU-", "G"])
def test_a_unique_beginning_of_an_id_names_the_gpu_as_cuda_says(
    library: Path, visible: str
) -> None:
    assert _ask(library, visible) == repr(T4)


def test_a_beginning_of_several_ids_names_none(library: Path) -> None:
    answer = _ask(library, "GPU-", FAKE_GPUS="2")
    assert "CUDA_VISIBLE_DEVICES=GPU-: names 2 GPUs at once; here are: GPU-1, GPU-8932" in answer
    check_row(answer, 72)
    assert "there is no such GPU; here are: GPU-1, GPU-8932" in _ask(
        library, "GPU-7", FAKE_GPUS="2"
    )


def test_a_slice_of_a_gpu_is_measured_where_the_whole_is_nobodys_to_see(library: Path) -> None:
    assert "no permission to use the GPU" in _ask(library, "0", FAKE_MEMORY="4")
    slice_of_it = t4(total_bytes=10240 * 2**20, free_bytes=10200 * 2**20)
    assert _ask(library, "0", FAKE_MEMORY="4", FAKE_MIG="1") == repr(slice_of_it)


def test_a_slice_of_a_gpu_may_keep_its_capability_to_itself(library: Path) -> None:
    silent = t4(capability=None)
    assert _ask(library, "0", FAKE_CAPABILITY="3") == repr(silent)
    check_gpu(silent, torch_cuda=(12, 6), gpu_memory_gb=None)


@pytest.mark.parametrize(
    ("visible", "fault", "message"),
    [
        ("1", {}, "no GPU 1: this node shows 1"),
        ("", {}, "hides every GPU"),
        ("-1", {}, "hides every GPU"),
        ("GPU-2", {}, "there is no such GPU"),
        ("0", {"FAKE_INIT": "9"}, "the NVIDIA driver is not loaded"),
        ("0", {"FAKE_INIT": "18"}, "of different versions: restart the node"),
        ("0", {"FAKE_HANDLE": "15"}, "fallen off the bus"),
        ("0", {"FAKE_MEMORY": "999"}, "error 999 (nvmlDeviceGetMemoryInfo); run with --gpus all"),
        ("0", {"FAKE_CAPABILITY": "4"}, "no permission"),
    ],
)
def test_a_broken_node_is_named(
    library: Path, visible: str, fault: dict[str, str], message: str
) -> None:
    answer = _ask(library, visible, **fault)
    assert answer.startswith("GpuError: ")
    assert message in answer
    assert "\n" not in answer


def test_no_driver_in_the_container_is_named(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").touch()  # no library, even on a machine that has one
    answer = _ask(tmp_path, None)
    assert answer.startswith("GpuError: no GPU: the driver's library libnvidia-ml.so.1 is not here")
    assert "run with --gpus all" in answer


def t4(**changes: object) -> Gpu:
    return Gpu(**(vars(T4) | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gpu", "torch_cuda", "message"),
    [
        (t4(), (13, 0), r"535.216.01 supports CUDA 12.2, this torch is built for CUDA 13.0"),
        (t4(driver_cuda=(11, 4)), (12, 6), "use a node with a newer driver"),
        (t4(name="Tesla P4", capability=(6, 1)), (12, 6), "compute capability 6.1, needed: 7.0"),
        (t4(name="NVIDIA GeForce GTX 1650"), (12, 6), "no fp16 tensor cores"),
        (t4(name="Quadro T1000"), (12, 6), "no fp16 tensor cores"),
        (t4(free_bytes=6 * 2**30), (12, 6), r"6.0 of 15.0 GiB free, needed: 13.5"),
    ],
)
def test_what_cannot_train_is_refused(gpu: Gpu, torch_cuda: tuple[int, int], message: str) -> None:
    with pytest.raises(GpuError, match=message) as caught:
        check_gpu(gpu, torch_cuda=torch_cuda, gpu_memory_gb=None)
    assert caught.value.exit_code == 72


@pytest.mark.parametrize(
    ("gpu", "torch_cuda", "gpu_memory_gb"),
    [
        (T4, (12, 6), None),  # a 12.2 driver runs a 12.6 build
        (t4(driver_cuda=(13, 0)), (12, 6), None),
        (t4(name="Tesla V100-SXM2-16GB", capability=(7, 0)), (12, 6), None),
        (t4(free_bytes=6 * 2**30), (12, 6), 5.0),  # the user said how much this trial may use
        (T4, (12, 6), 40.0),  # more than there is: a cap, no demand
    ],
)
def test_what_can_train_passes(
    gpu: Gpu, torch_cuda: tuple[int, int], gpu_memory_gb: float | None
) -> None:
    check_gpu(gpu, torch_cuda=torch_cuda, gpu_memory_gb=gpu_memory_gb)


@pytest.mark.slow
def test_torch_version_is_read_without_importing_it() -> None:
    code = (
        "import sys, job.process.gpu; read = job.process.gpu.torch_cuda_version();"
        "assert 'torch' not in sys.modules;"
        "import torch; cuda = torch.version.cuda; print(read, cuda);"
        "assert read == (tuple(map(int, cuda.split('.')[:2])) if cuda else None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_cpu_asked_for_is_not_looked_at() -> None:
    preflight("cpu", gpu_memory_gb=None)


def test_a_node_without_gpu_ends_with_72_before_anything_is_fetched(tmp_path: Path) -> None:
    """The base model's name would be looked up on the hub, which this machine cannot reach."""
    environ = {
        "PATH": os.environ["PATH"],
        "CUDA_VISIBLE_DEVICES": "-1",  # of whatever GPU this machine has
        "JOB_BASE_MODEL": "no-one/nothing",
        "JOB_DATASET_URI": str(tmp_path / "rows.jsonl"),
        "JOB_OUTPUT_URI": str(tmp_path / "out"),
        "JOB_WORK_DIR": str(tmp_path / "work"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "job"], env=environ, cwd=ROOT, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 72, done.stderr
    # In the words of the preflight: torch, which would see it too, was not asked.
    assert re.search(
        r"exit 72 \(gpu\): (no GPU can be used|CUDA_VISIBLE_DEVICES)", done.stderr.splitlines()[-1]
    )
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.gpu
def test_a_real_gpu_is_described_as_torch_sees_it() -> None:
    import torch

    gpu = read_gpu(os.environ.get("CUDA_VISIBLE_DEVICES"))
    properties = torch.cuda.get_device_properties(0)
    assert gpu.name == properties.name
    assert gpu.capability == (properties.major, properties.minor)
    assert abs(gpu.total_bytes / properties.total_memory - 1) < 0.1
    preflight("cuda", gpu_memory_gb=1.0)
