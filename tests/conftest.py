"""All tests: one thread, no network, the longest first, a fast tier without torch, servers."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.store.base import Store
from tests.servers import azurite, behind_proxy, gcs, s3
from tests.servers.proxy import FaultProxy
from tests.tiers import slow

# With more threads than idle cores a training step takes ten times longer.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read by cuBLAS at its first use; a GPU's kernels then give the same bits in every run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# A shell's background (`make test &`) ignores it, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Nothing may be fetched; a test that tries fails at once instead of waiting.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

# Files that take the longest, longest first, so that none of them is what others wait for at the
# end: pytest-xdist hands out files in this order.
LONGEST = (
    "tests/demo/test_real_model.py",
    "tests/training/test_fake_cuda.py",
    "tests/training/test_memory.py",
    "tests/test_hub.py",
    "tests/trial/test_workers.py",
    "tests/trial/test_chaos.py",
    "tests/store/test_faults.py",
    "tests/store/test_pace.py",
    "tests/trial/test_faults.py",
    "tests/trial/test_preemption.py",
    "tests/ledger/test_spoiled_documents.py",
)


@pytest.hookimpl(trylast=True)  # once `-m` has chosen: the fast tier does not ask torch for a GPU
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU: run `make test-gpu` on a machine with one")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def no_waits_for_the_disk() -> Iterator[None]:
    """No test cuts the power, and a store waits 4 ms for the disk at every write."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def no_torch_in_the_fast_tier(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test that brings torch in and is not marked slow: its import alone takes 2 s."""
    was_here = "torch" in sys.modules
    yield
    may = request.node.get_closest_marker("slow") or request.node.get_closest_marker("gpu")
    assert was_here or may or "torch" not in sys.modules, "it imports torch: mark it slow"


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of one moto server for all tests of this process: each start takes 1.5 s."""
    with s3.moto_server(tmp_path_factory.mktemp("moto")) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def thin_gcs() -> Iterator[str]:
    """The endpoint of the thin server with bucket `s3.BUCKET`, for all tests of this process."""
    with gcs.gcs_server(s3.BUCKET) as (endpoint, _):
        yield endpoint


@pytest.fixture(scope="session")
def azurite_blobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of one Azurite for all tests of this process."""
    with azurite.azurite_server(tmp_path_factory.mktemp("azurite")) as endpoint:
        yield endpoint


@pytest.fixture(params=["s3", "gs", *slow("az")])
def proxied(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[tuple[Store, FaultProxy]]:
    """A store whose every request goes through the proxy, one of each service."""
    server = {"s3": "moto", "gs": "thin_gcs", "az": "azurite_blobs"}[request.param]
    endpoint = request.getfixturevalue(server)
    with behind_proxy.store(request.param, endpoint, monkeypatch, tmp_path) as proxied:
        yield proxied
