"""Faults on the way: success or one clear error. `pytest tests/store/test_faults.py`

Each row of `PASSING` is tried on every operation and must end in success, each row of `LASTING`
must end in its error within the limit. Data is compared by sha256.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from job.errors import CredentialsError, ExitCode, JobError, StoreError
from job.store import open_store
from job.store.base import Store
from job.store.documents import create_document, swap_document
from tests.servers import s3
from tests.servers.behind_proxy import LARGE_BYTES, SHORT_LIMITS
from tests.servers.proxy import Fault, FaultProxy
from tests.tiers import slow

PASSING = {
    "two resets": Fault("reset", times=2),
    "a lost answer": Fault("drop answer", times=1),
    "one stall": Fault("stall", times=1),
    "a cut answer": Fault("truncate", times=1, match="GET"),
    "a reset in the body": Fault("reset in body", times=1, match="GET"),
    "a stall in the body": Fault("stall in body", times=1, match="GET"),
    "two 500": Fault("status", times=2, status=500),
    "two 503": Fault("status", times=2, status=503, code="SlowDown"),
    "two 429": Fault("status", times=2, status=429, code="TooManyRequests"),
    "a 403 while the node is new": Fault("status", times=1, status=403, code="AccessDenied"),
    "a slow answer": Fault("slow", times=1),
}
LASTING = {
    "refused connections": (None, StoreError),
    "resets": (Fault("reset"), StoreError),
    "stalls": (Fault("stall"), StoreError),
    "500": (Fault("status", status=500), StoreError),
    "503": (Fault("status", status=503, code="SlowDown"), StoreError),
    "429": (Fault("status", status=429, code="TooManyRequests"), StoreError),
    "403": (Fault("status", status=403, code="AccessDenied"), CredentialsError),
    "expired token": (Fault("status", status=401, code="ExpiredToken"), CredentialsError),
    "not the service": (Fault("status", status=418, code="Teapot"), StoreError),
}

FAST = {"a lost answer", "a cut answer", "resets", "403"}  # most rows take a second or two


def _tiered(rows: Iterable[str]) -> list[object]:
    return [parameter for row in rows for parameter in ([row] if row in FAST else slow(row))]


def _round_trip(store: Store, folder: Path) -> dict[str, Callable[[], None]]:
    """Every operation, each with a check of what it must have done."""
    small, large = folder / "small", folder / "large"
    small.write_bytes(os.urandom(50_000))
    large.write_bytes(os.urandom(LARGE_BYTES))

    def create_and_swap() -> None:
        created = create_document(store, "doc.json", {"a": 1})
        assert created.ours
        assert swap_document(store, "doc.json", {"a": 2}, created.version).ours

    def download(path: Path) -> None:
        store.download(path.name, folder / "back")
        assert _sha256(folder / "back") == _sha256(path)

    return {
        "create and swap": create_and_swap,
        "upload small": lambda: store.upload("small", small),
        "download small": lambda: download(small),
        "upload large": lambda: store.upload("large", large),
        "download large": lambda: download(large),
        "list": lambda: _same(list(store.list("")), ["doc.json", "large", "small"]),
        "delete": lambda: store.delete("small"),
    }


def _same(got: object, expected: object) -> None:
    assert got == expected


@pytest.mark.parametrize("name", _tiered(PASSING))
def test_a_passing_fault_is_survived_by_every_operation(
    name: str, proxied: tuple[Store, FaultProxy], tmp_path: Path
) -> None:
    store, proxy = proxied
    tried = 0
    for operation in _round_trip(store, tmp_path).values():
        fault = PASSING[name]
        proxy.faults = [Fault(**vars(fault))]
        operation()
        tried += 1
        _log_fault(name, proxy)
    assert tried == 7
    assert len(proxy.injected) >= fault.times * 3, "the faults did happen"


def _log_fault(name: str, proxy: FaultProxy) -> None:
    print(f"{name}: {len(proxy.injected)} faults, {proxy.num_requests} requests")


@pytest.mark.parametrize("name", _tiered(LASTING))
def test_a_lasting_fault_ends_in_one_clear_line(
    name: str, proxied: tuple[Store, FaultProxy], tmp_path: Path
) -> None:
    store, proxy = proxied
    fault, error_type = LASTING[name]
    (tmp_path / "small").write_bytes(b"1")
    proxy.faults = [fault] if fault else []
    if fault is None:
        proxy.refuse()
    store = open_store(store.uri, limits=SHORT_LIMITS)
    operations = (
        lambda: store.get("doc.json"),
        lambda: store.put_if_absent("doc.json", b"1"),
        lambda: store.upload("small", tmp_path / "small"),
        lambda: store.download("small", tmp_path / "back"),
        lambda: list(store.list("")),
        lambda: store.delete("small"),
    )
    started = time.monotonic()
    with ThreadPoolExecutor(len(operations)) as threads:
        futures = [threads.submit(operation) for operation in operations]
    outcomes = [future.exception() for future in futures]
    assert time.monotonic() - started < 10
    for error in outcomes:
        assert type(error) is error_type
        _check_line(error, store)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def _check_line(error: JobError, store: Store) -> None:
    line = str(error)
    assert "\n" not in line
    assert store.uri in line
    assert s3.SECRET_KEY not in line
    assert error.exit_code in (ExitCode.OUTAGE, ExitCode.CREDENTIALS)


@pytest.mark.slow
def test_a_service_that_comes_back_is_used_again(proxied: tuple[Store, FaultProxy]) -> None:
    store, proxy = proxied
    proxy.refuse()
    timer = threading.Timer(0.5, proxy.listen)
    timer.start()
    assert store.put_if_absent("doc.json", b"1")
    timer.join(timeout=5)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
