"""The same promises on every kind of store. `pytest tests/store/test_contract.py`"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from job.errors import CredentialsError, SettingsError, StoreError
from job.store import open_store, probe
from job.store.base import Store
from job.store.documents import create_document, read_document, swap_document
from job.store.retries import Limits
from tests.servers import azurite, emulator, gcs, s3
from tests.tiers import slow

LIMITS = Limits(outage_seconds=20, credentials_seconds=1, read_seconds=10, pause_seconds=0.05)
Opener = Callable[[str], Store]  # a new store, with a client of its own, under a prefix


@pytest.fixture(scope="module")
def servers(
    request: pytest.FixtureRequest,
    moto: str,
    thin_gcs: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], str]]:
    """The URI of a kind of store; starts Swift and the emulator once, when first asked for."""
    starts = {"swift": s3.swift_server, "gcs-emulator": emulator.gcs_emulator}
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        started = {"moto": moto, "gcs": thin_gcs}

        def endpoint(kind: str) -> str:
            if kind == "azurite":
                azurite.use(patch, request.getfixturevalue("azurite_blobs"))
                return f"az://{s3.BUCKET}"
            if kind not in started:
                server = starts[kind](tmp_path_factory.mktemp(kind))
                started[kind] = stack.enter_context(server)
            if kind in ("moto", "swift"):
                s3.use(patch, started[kind])
            else:
                patch.setenv("STORAGE_EMULATOR_HOST", started[kind])
            return f"s3://{s3.BUCKET}" if kind in ("moto", "swift") else f"gs://{s3.BUCKET}"

        yield endpoint


def _opener(kind: str, servers: Callable[[str], str], folder: Path) -> Opener:
    if kind == "local":
        return lambda prefix: open_store(str(folder / prefix))
    uri = servers(kind)
    return lambda prefix: open_store(f"{uri}/{folder.name}/{prefix}", limits=LIMITS)


@pytest.fixture(params=["local", "moto", "gcs", *slow("azurite")])
def conditional(request, servers, tmp_path) -> Opener:  # type: ignore[no-untyped-def]
    """A store that keeps the whole contract."""
    return _opener(request.param, servers, tmp_path)


@pytest.fixture(params=["local", "moto", "gcs", *slow("azurite", "swift", "gcs-emulator")])
def basic(request, servers, tmp_path) -> Opener:  # type: ignore[no-untyped-def]
    """A store that keeps at least the promises about whole objects."""
    return _opener(request.param, servers, tmp_path)


@pytest.fixture(params=slow("swift", "gcs-emulator"))
def unconditional(request, servers, tmp_path) -> Opener:  # type: ignore[no-untyped-def]
    """A service that lacks one of the two conditions."""
    return _opener(request.param, servers, tmp_path)


def test_the_probe_accepts_a_conditional_store_and_leaves_nothing(conditional: Opener) -> None:
    store = conditional("p")
    probe(store)
    assert list(store.list("")) == []


def test_the_probe_refuses_a_service_without_conditions(unconditional: Opener) -> None:
    store = unconditional("p")
    with pytest.raises(StoreError, match="lacks If-None-Match or If-Match|no generation"):
        probe(store)


@pytest.mark.slow
def test_swift_creates_once_and_checks_signatures(
    servers: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _opener("swift", servers, tmp_path)("once")
    assert store.put_if_absent("a", b"1")
    assert not store.put_if_absent("a", b"2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    limits = Limits(credentials_seconds=0.1, pause_seconds=0.05)
    with pytest.raises(CredentialsError, match="SignatureDoesNotMatch") as caught:
        open_store(store.uri, limits=limits).get("a")
    assert "wrong" not in str(caught.value)


def test_a_document_is_created_once(conditional: Opener) -> None:
    store = conditional("d")
    assert store.get("a/b.json") is None
    assert store.put_if_absent("a/b.json", b"1")
    assert not store.put_if_absent("a/b.json", b"2")
    stored = store.get("a/b.json")
    assert stored is not None
    assert stored.data == b"1"


def test_a_stale_swap_and_a_swap_of_nothing_are_refused(conditional: Opener) -> None:
    store = conditional("d")
    store.put_if_absent("lease.json", b"0")
    first = store.get("lease.json")
    assert first is not None
    assert store.put_if_version("lease.json", b"1", first.version)
    assert not store.put_if_version("lease.json", b"2", first.version)
    assert not store.put_if_version("absent.json", b"2", first.version)
    assert store.get("absent.json") is None
    second = store.get("lease.json")
    assert second is not None
    assert second.data == b"1"
    assert second.version != first.version


def test_a_document_can_be_created_again_after_a_delete(conditional: Opener) -> None:
    store = conditional("d")
    store.put_if_absent("a.json", b"1")
    store.delete("a.json")
    assert store.get("a.json") is None
    assert store.put_if_absent("a.json", b"2")


@pytest.mark.parametrize("conditional", ["local", *slow("moto", "gcs", "azurite")], indirect=True)
def test_of_twelve_racing_clients_one_creates_and_one_swaps(conditional: Opener) -> None:
    rounds = 5
    store = conditional("race")
    versions = [create_document(store, f"lease{i}.json", {}).version for i in range(rounds)]
    barrier = threading.Barrier(12)
    outcomes: list[list[bool]] = []

    def race(name: str) -> None:
        client = conditional("race")
        client.get("warm-up.json")
        won = []
        for number, version in enumerate(versions):
            barrier.wait(timeout=30)
            won.append(create_document(client, f"race{number}.json", {"who": name}).ours)
            won.append(swap_document(client, f"lease{number}.json", {"who": name}, version).ours)
        outcomes.append(won)

    racers = [threading.Thread(target=race, args=(f"racer{i}",)) for i in range(12)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(timeout=60)
    assert len(outcomes) == 12
    assert [sum(winners) for winners in zip(*outcomes, strict=True)] == [1] * 2 * rounds


@pytest.mark.parametrize("size_bytes", [0, 1, 50_000, *slow(8 * 2**20, 20_000_003)])
def test_a_file_comes_back_as_it_was_sent(basic: Opener, tmp_path: Path, size_bytes: int) -> None:
    store = basic("f")
    (tmp_path / "in").write_bytes(os.urandom(size_bytes))
    store.upload("x/adapter.safetensors", tmp_path / "in")
    store.download("x/adapter.safetensors", tmp_path / "deep/er/out")
    assert _sha256(tmp_path / "deep/er/out") == _sha256(tmp_path / "in")
    assert [path.name for path in (tmp_path / "deep/er").iterdir()] == ["out"]


def test_an_absent_object_is_told_and_leaves_the_old_file(basic: Opener, tmp_path: Path) -> None:
    store = basic("f")
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(FileNotFoundError):
        store.download("x/absent", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"old"
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]
    store.delete("x/absent")


def test_list_shows_the_keys_under_a_prefix_in_order(basic: Opener, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"1")
    for key in ("s/b", "s/a", "s/sub/c", "t/d"):
        basic("l").upload(key, tmp_path / "in")
    basic("l2").upload("s/other", tmp_path / "in")  # "l" is a prefix of its name, not its folder
    store = basic("l")
    assert list(store.list("s/")) == ["s/a", "s/b", "s/sub/c"]
    assert list(store.list("")) == ["s/a", "s/b", "s/sub/c", "t/d"]
    store.delete("s/a")
    assert list(store.list("s/")) == ["s/b", "s/sub/c"]


def test_a_long_list_comes_in_pages(servers: Callable[[str], str], tmp_path: Path) -> None:
    store = _opener("gcs", servers, tmp_path)("long")
    for number in range(gcs.PAGE + 5):
        store.put_if_absent(f"{number:04d}", b"")
    assert list(store.list("")) == [f"{number:04d}" for number in range(gcs.PAGE + 5)]


@pytest.mark.parametrize("kind", ["moto", "gcs", *slow("azurite", "swift")])
def test_a_missing_bucket_names_the_setting(servers: Callable[[str], str], kind: str) -> None:
    scheme = servers(kind).partition("://")[0]
    with pytest.raises(SettingsError, match=rf"^JOB_OUTPUT_URI: {scheme}://absent.*no bucket"):
        open_store(f"{scheme}://absent/x", limits=LIMITS).get("a")


@pytest.mark.parametrize("key", ["/etc/passwd", "a/../b", "a\\b", ".hidden"])
def test_a_hostile_key_is_refused(conditional: Opener, key: str) -> None:
    store = conditional("h")
    for operation in (store.get, store.delete, lambda k: store.put_if_absent(k, b"")):
        with pytest.raises(ValueError, match="not a store key"):
            operation(key)


def test_an_equal_document_of_another_writer_is_not_ours(conditional: Opener) -> None:
    store = conditional("n")
    assert create_document(store, "spec.json", {"a": 1}).ours
    assert not create_document(store, "spec.json", {"a": 1}).ours
    read = read_document(store, "spec.json")
    assert read is not None
    assert read.content == {"a": 1}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
