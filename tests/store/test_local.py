"""The local store: exactly one winner, nothing half-written. `pytest tests/store/test_local.py`"""

from __future__ import annotations

import errno
import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from job.errors import SettingsError, StoreError
from job.store import open_store, probe
from job.store.base import Stored, check_key
from job.store.documents import create_document, read_document, swap_document
from job.store.local import LocalStore
from tests.runbook import check_row


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "bucket")


def test_a_document_is_created_once(store: LocalStore) -> None:
    assert store.put_if_absent("a/b.json", b"1")
    assert not store.put_if_absent("a/b.json", b"2")
    assert store.get("a/b.json") == Stored(b"1", "1")


def test_a_stale_swap_is_refused(store: LocalStore) -> None:
    store.put_if_absent("lease.json", b"0")
    for number in range(1, 12):  # two digits: versions are compared as numbers
        assert store.put_if_version("lease.json", str(number).encode(), str(number))
    assert not store.put_if_version("lease.json", b"x", "11")
    assert not store.put_if_version("absent.json", b"x", "1")
    assert store.get("lease.json") == Stored(b"11", "12")


def test_list_shows_keys_without_versions_and_temporary_files(
    store: LocalStore, tmp_path: Path
) -> None:
    store.put_if_absent("s/lease.json", b"0")
    store.put_if_version("s/lease.json", b"1", "1")
    store.put_if_absent("s/spec.json", b"0")
    (tmp_path / "bucket/s/.tmp-dead").write_bytes(b"half")
    assert list(store.list("s/")) == ["s/lease.json", "s/spec.json"]
    assert list(store.list("s/sp")) == ["s/spec.json"]
    assert list(store.list("nothing/")) == []


def test_upload_and_download_give_the_same_bytes(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"\0adapter")
    store.upload("x/adapter.safetensors", tmp_path / "in")
    store.download("x/adapter.safetensors", tmp_path / "deep/er/out")
    assert (tmp_path / "deep/er/out").read_bytes() == b"\0adapter"
    with pytest.raises(FileNotFoundError):
        store.download("x/absent", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    store.delete("x/adapter.safetensors")
    assert list(store.list("x/")) == []


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "a/../b", "..", "a//b", "a\\b", "a\0b", ".hidden", "a/", "a b", "é"]
)
def test_a_hostile_key_is_refused(store: LocalStore, key: str) -> None:
    with pytest.raises(ValueError, match="not a store key"):
        check_key(key)
    with pytest.raises(ValueError, match="not a store key"):
        store.put_if_absent(key, b"")


def test_a_planted_link_cannot_lead_outside(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket/slots").symlink_to(tmp_path / "outside")
    with pytest.raises(StoreError, match="leads outside"):
        store.put_if_absent("slots/spec.json", b"")
    assert not list((tmp_path / "outside").iterdir())


def _race(root: Path, barrier: object, name: str) -> None:
    store = LocalStore(root)
    barrier.wait(timeout=30)  # type: ignore[attr-defined]
    won = create_document(store, "race.json", {"who": name}).ours
    swapped = swap_document(store, "lease.json", {"who": name}, "1").ours
    (root / f"{name}-{won:d}{swapped:d}").touch()


def test_of_twelve_racing_processes_one_creates_and_one_swaps(tmp_path: Path) -> None:
    LocalStore(tmp_path).put_if_absent("lease.json", b"{}")
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(12)
    racers = [
        context.Process(target=_race, args=(tmp_path, barrier, f"racer{i}")) for i in range(12)
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(timeout=60)
    outcomes = [path.name[-2:] for path in tmp_path.glob("racer*")]
    assert len(outcomes) == 12
    assert sum(outcome[0] == "1" for outcome in outcomes) == 1
    assert sum(outcome[1] == "1" for outcome in outcomes) == 1


class AnswerLost:
    """A store that applies a conditional write, then says that it did not: a retried request."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self.lost = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._store.put_if_absent(key, data)
        self.lost += 1
        return False

    def put_if_version(self, key: str, data: bytes, version: str) -> bool:
        self._store.put_if_version(key, data, version)
        self.lost += 1
        return False


def test_a_write_whose_answer_was_lost_is_recognised_as_ours(store: LocalStore) -> None:
    flaky = AnswerLost(store)
    created = create_document(flaky, "spec.json", {"a": 1})  # type: ignore[arg-type]
    assert created.ours
    swapped = swap_document(flaky, "spec.json", {"a": 1}, created.version)  # type: ignore[arg-type]
    assert swapped.ours
    assert flaky.lost == 2
    assert not create_document(store, "spec.json", {"a": 1}).ours  # equal content, other writer
    read = read_document(store, "spec.json")
    assert read is not None
    assert read.content == {"a": 1}


def test_the_probe_refuses_a_store_without_conditions(store: LocalStore) -> None:
    class Careless(LocalStore):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            return super().put_if_absent(key, data) or True

    class CarelessSwap(LocalStore):
        def put_if_version(self, key: str, data: bytes, version: str) -> bool:
            return super().put_if_version(key, data, version) or True

    probe(store)
    root = Path(store.uri)
    assert not list(root.iterdir()), "the probe cleans up"
    with pytest.raises(StoreError, match="create-if-absent"):
        probe(Careless(root))
    with pytest.raises(StoreError, match="swap-if-version"):
        probe(CarelessSwap(root))


def test_open_store_takes_paths_and_file_uris_and_names_the_rest(tmp_path: Path) -> None:
    assert open_store(str(tmp_path)).uri == str(tmp_path)
    assert open_store(f"file://{tmp_path}").uri == str(tmp_path)
    with pytest.raises(SettingsError, match=r"JOB_OUTPUT_URI: ftp://"):
        open_store("ftp://host/x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_names_the_setting(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(SettingsError, match="JOB_OUTPUT_URI: .*Permission denied"):
        probe(LocalStore(tmp_path))


def test_an_output_path_through_a_file_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="JOB_OUTPUT_URI: .*Not a directory"):
        probe(LocalStore(tmp_path / "file/out"))


@pytest.mark.parametrize("output", ["file", "file/out", "dangling"])
def test_an_output_that_cannot_be_a_folder_is_no_empty_sweep(tmp_path: Path, output: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SettingsError, match=r"JOB_OUTPUT_URI: .* is (not a folder|a link to noth)"):
        open_store(f"{tmp_path}/{output}")


def test_opening_and_reading_makes_no_folder(tmp_path: Path) -> None:
    store = open_store(f"{tmp_path}/new")
    assert store.get("sweeps/s/sweep.json") is None
    assert list(store.list("")) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that takes no folders")
@pytest.mark.parametrize("output", ["/proc/zz", "/proc/zz/deeper", "/proc"])
def test_an_impossible_folder_names_the_setting(output: str) -> None:
    with pytest.raises(SettingsError, match="JOB_OUTPUT_URI: /proc/.*No such file or directory"):
        probe(open_store(output))


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOENT])
def test_a_folder_that_has_served_fails_for_now_and_an_unused_one_is_a_wrong_setting(
    tmp_path: Path, code: int
) -> None:
    """As by ext4 after an I/O error: another node mounts the disk anew."""

    class Refusing(LocalStore):
        @staticmethod
        def _temporary(target: Path) -> Path:
            raise OSError(code, os.strerror(code), str(target.parent))

    store = Refusing(tmp_path)
    with pytest.raises(SettingsError, match=f"JOB_OUTPUT_URI: .*{os.strerror(code)}"):
        store.put_if_absent("sweeps/s/sweep.json", b"")
    (tmp_path / "sweeps").mkdir()
    with pytest.raises(StoreError, match=os.strerror(code)):
        store.put_if_absent("sweeps/s/sweep.json", b"")


def test_a_file_to_upload_that_is_not_there_is_no_fault_of_the_store(
    store: LocalStore, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        store.upload("sweeps/a", tmp_path / "absent")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF])
def test_a_folder_that_cannot_be_synced_is_no_error(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """fsync(2): EINVAL where the file system has none; CIFS and FUSE mounts give others."""
    sync, refused = os.fsync, []

    def without_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused.append(number)
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", without_folders)
    probe(store)
    assert create_document(store, "doc.json", {"a": 1}).ours
    assert refused


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_disk_that_fails_in_a_sync_is_told(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, is_folder: bool
) -> None:
    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == is_folder:
            number = errno.EIO if is_folder else errno.EINVAL
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError if is_folder else OSError):
        store.put_if_absent("doc.json", b"1")


@pytest.mark.parametrize("number", [errno.EIO, errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_hard_links_is_told_as_that(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """link(2): EPERM on FAT; ENOTSUP, ENOSYS on FUSE; some FUSE and SMB mounts say EIO."""

    def link(_source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number), str(target))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(SettingsError, match="JOB_OUTPUT_URI: .*hard links") as caught:
        probe(store)
    if number == errno.EIO:
        check_row(str(caught.value), 64)
        (tmp_path / "bucket/sweeps").mkdir()
        with pytest.raises(StoreError, match="no hard links here, or the disk fails") as failed:
            store.put_if_absent("doc.json", b"1")
        check_row(str(failed.value), 74)
