"""Lost answers, flipped bits: never wrong data. `pytest tests/store/test_integrity.py`"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import resource
from pathlib import Path

import pytest

from job.errors import StoreError
from job.ledger.folders import fetch_folder, seal_folder, upload_folder
from job.store import open_store, probe
from job.store.base import Store
from job.store.documents import create_document, swap_document
from tests.servers import s3
from tests.servers.behind_proxy import (
    LARGE_BYTES,
    LIMITS,
    RETRYING_LIMITS,
    SHORT_LIMITS,
    write_verb,
)
from tests.servers.proxy import Fault, FaultProxy, proxy_to


def test_writes_whose_answers_are_lost_are_our_own(proxied: tuple[Store, FaultProxy]) -> None:
    store, proxy = proxied
    store = open_store(store.uri, limits=RETRYING_LIMITS)
    # The repeated write meets our own object and is refused.
    lost = Fault("drop answer", times=1, match=write_verb(store))
    version, ours = "", 0
    for number in range(10):
        proxy.faults = [dataclasses.replace(lost)]
        if number == 0:
            document = create_document(store, "spec.json", {"a": 1})
        else:
            document = swap_document(store, "spec.json", {"a": 1}, version)
        ours += document.ours
        version = document.version
    assert ours == 10
    assert proxy.injected == ["drop answer"] * 10


@pytest.mark.slow
def test_the_probe_survives_lost_answers(proxied: tuple[Store, FaultProxy]) -> None:
    store, proxy = proxied
    for skipped in range(4):  # each of its writes in turn
        first_line = write_verb(store)
        proxy.faults = [
            Fault("slow", times=skipped, match=first_line),
            Fault("drop answer", times=1, match=first_line),
        ]
        probe(store)
    assert proxy.injected.count("drop answer") == 4


@pytest.mark.slow
def test_a_flipped_bit_on_the_way_is_never_loaded(
    proxied: tuple[Store, FaultProxy], tmp_path: Path
) -> None:
    store, proxy = proxied
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/small").write_bytes(os.urandom(50_000))
    (tmp_path / "adapter/large").write_bytes(os.urandom(LARGE_BYTES))
    published = seal_folder("best", tmp_path / "adapter")
    upload_folder(store, published, tmp_path / "adapter")
    proxy.faults = [Fault("corrupt answer", match="GET")]
    store = open_store(store.uri, limits=SHORT_LIMITS)
    with pytest.raises(StoreError):
        fetch_folder(store, published.key, published.sha256, tmp_path / "back")
    for name in ("large", "small"):
        proxy.faults = [Fault("corrupt answer", times=1, match=f"/{name}")]
        with contextlib.suppress(StoreError):  # the SDK saw it and asked again, or our hash did
            fetch_folder(store, published.key, published.sha256, tmp_path / "back")
        for path in (tmp_path / "back").glob("*"):
            assert _sha256(path) == _sha256(tmp_path / "adapter" / path.name)
    assert len(proxy.injected) >= 3


@pytest.mark.slow
def test_a_flipped_bit_on_the_way_up_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3.swift_server(tmp_path) as swift, proxy_to(swift) as proxy:  # moto takes any checksum
        s3.use(monkeypatch, proxy.endpoint)
        store = open_store(f"s3://{s3.BUCKET}", limits=LIMITS)
        (tmp_path / "in").write_bytes(os.urandom(LARGE_BYTES))
        for match in ("PUT /trials/large", "PUT /trials/small"):
            proxy.faults = [Fault("corrupt request", times=1, match=match)]
            size_bytes = LARGE_BYTES if "large" in match else 50_000
            (tmp_path / "in").write_bytes(os.urandom(size_bytes))
            store.upload(match.rpartition("/")[2], tmp_path / "in")
            store.download(match.rpartition("/")[2], tmp_path / "back")
            assert _sha256(tmp_path / "back") == _sha256(tmp_path / "in")
        assert proxy.injected == ["corrupt request"] * 2


def test_a_full_volume_is_one_clear_line(proxied: tuple[Store, FaultProxy], tmp_path: Path) -> None:
    store, _ = proxied
    (tmp_path / "in").write_bytes(b"1" * 1000)
    store.upload("x", tmp_path / "in")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))  # EFBIG, the nearest to a full disk
    try:
        with pytest.raises(StoreError, match="File too large.*free space"):
            store.download("x", tmp_path / "back")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
