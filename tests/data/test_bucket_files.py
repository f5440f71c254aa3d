"""A bucket is listed for the digest and read once. `pytest tests/data/test_bucket_files.py`"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow as pa
import pytest

from job.base_model import resolve_base_model
from job.data.file_names import glob_folder, glob_matches
from job.data.sources import open_source
from job.errors import DataError, SettingsError, StoreError
from job.store.local import LocalStore
from tests.data.test_build import ROWS, settings_for, write_lines
from tests.data.test_prepared import assert_same, prepare_in
from tests.servers import azurite, s3
from tests.servers.gcs import Bucket, gcs_server


def as_lines(rows: list[dict[str, str]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_arrow(rows: list[dict[str, str]]) -> bytes:
    table, file = pa.Table.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Bucket]]:
    with gcs_server("rows") as server:
        yield server


@pytest.fixture
def bucket(server: tuple[str, Bucket], monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket `rows` with shards, and other objects beside them."""
    endpoint, bucket = server
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
    bucket.blobs.clear()
    for key, data in {
        "chats/a/0.jsonl": as_lines(ROWS[:100]),
        "chats/a/1.jsonl.gz": gzip.compress(as_lines(ROWS[100:200])),
        "chats/a/b/2.jsonl": as_lines(ROWS[200:]),
        "chats/a/dataset_info.json": b"{}",
        "chats/a/_SUCCESS": b"",
        "chats/a/.part/3.jsonl": b"junk",
        "chats/another.jsonl": as_lines(ROWS[:1]),
        "odd/[1].jsonl": as_lines(ROWS[:2]),
        "empty/0.jsonl": b"",
        "hidden/.part/3.jsonl": b"junk",
    }.items():
        bucket.write(key, data, None)
    return bucket


def names(uri: str, cache_dir: Path) -> list[str]:
    return [version.name for version in open_source(uri, cache_dir).versions()]


def test_an_object_a_glob_and_a_folder_name_their_files(bucket: Bucket, tmp_path: Path) -> None:
    shards = ["0.jsonl", "1.jsonl.gz", "b/2.jsonl"]
    assert names("gs://rows/chats/a", tmp_path) == shards
    assert names("GS://rows/chats/a/", tmp_path) == shards
    assert names("gs://rows/chats/a/*.jsonl", tmp_path) == ["0.jsonl"]
    assert names("gs://rows/chats/a/**/[12].jsonl*", tmp_path) == ["1.jsonl.gz", "b/2.jsonl"]
    assert names("gs://rows/chats/*.jsonl", tmp_path) == ["another.jsonl"]
    assert names("gs://rows/chats/a/1.jsonl.gz", tmp_path) == ["1.jsonl.gz"]
    assert names("gs://rows/odd/[1].jsonl", tmp_path) == ["[1].jsonl"]


def test_of_a_clone_in_a_bucket_the_train_split_is_read(bucket: Bucket, tmp_path: Path) -> None:
    for split, rows in (("train", ROWS[:200]), ("test", ROWS[200:])):
        bucket.write(f"clone/main/{split}-0.jsonl", as_lines(rows), None)
        bucket.write(f"saved/{split}/data-0.arrow", as_arrow(rows), None)
    bucket.write("saved/dataset_dict.json", b"{}", None)
    assert names("gs://rows/clone", tmp_path) == ["main/train-0.jsonl"]
    saved = open_source("gs://rows/saved", tmp_path).rows(lambda: None)
    assert [row.columns for row in saved] == ROWS[:200]
    card = "---\nconfigs:\n- data_files: {train: main/test-0.jsonl}\n---\n"
    bucket.write("clone/README.md", card.encode(), None)
    assert names("gs://rows/clone", tmp_path) == ["main/test-0.jsonl"]
    assert names("gs://rows/clone/main", tmp_path) == ["train-0.jsonl"]


def test_a_file_in_a_bucket_is_told_by_its_content(bucket: Bucket, tmp_path: Path) -> None:
    whole = json.dumps({"data": ROWS})
    for key, data in {
        "x/a.jsonl": whole.encode(),
        "x/b.json": whole.encode("utf-16"),
        "x/c.json": gzip.compress(whole.encode()),
    }.items():
        bucket.write(key, data, None)
        rows = open_source(f"gs://rows/{key}", tmp_path).rows(lambda: None)
        assert [row.columns for row in rows] == ROWS, key


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("gs://rows/nothing", "gs://rows/nothing does not exist"),
        ("gs://rows/chats/a/*.csv", r"matches no object"),
        ("gs://rows/empty", "is empty"),
        ("gs://rows/hidden", "holds no .jsonl"),
    ],
)
def test_a_uri_without_rows_is_one_clear_line(
    bucket: Bucket, tmp_path: Path, uri: str, words: str
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        open_source(uri, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_bucket_is_a_setting(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="JOB_DATASET_URI"):
        open_source("gs://missing/rows", tmp_path)


def test_an_outage_is_waited_for_as_long_as_is_said(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source("gs://rows/chats/another.jsonl", tmp_path, outage_seconds=0.5)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")  # nobody listens there
    with pytest.raises(StoreError, match=r"another.jsonl: read: still failing after 0.5 seconds"):
        list(source.rows(lambda: None))
    with pytest.raises(StoreError, match=r"list: still failing after 0.5 seconds"):
        open_source("gs://rows/chats/a", tmp_path, outage_seconds=0.5)
    with pytest.raises(StoreError, match=r"list: still failing after 0.5 seconds"):
        resolve_base_model("gs://rows/model", "main", tmp_path, outage_seconds=0.5)


def test_the_first_trial_reads_the_bucket_and_the_next_ones_do_not(
    bucket: Bucket, tmp_path: Path
) -> None:
    store = LocalStore(tmp_path / "store")
    settings = settings_for(Path("unused"), dataset_uri="gs://rows/chats/a")
    first = prepare_in(settings, store, tmp_path / "first")
    assert list((tmp_path / "first" / "objects").iterdir()) == []  # read, then removed
    second = prepare_in(settings, store, tmp_path / "second")
    assert not (tmp_path / "second" / "objects").exists()
    assert_same(first, second)
    local = write_lines(tmp_path / "rows.jsonl", list(ROWS))
    same_rows = prepare_in(settings_for(local), store, tmp_path / "third")
    assert first.counts == same_rows.counts
    assert first.train.input_ids.tolist() == same_rows.train.input_ids.tolist()
    bucket.write("chats/a/0.jsonl", as_lines(ROWS[:99]), None)
    assert prepare_in(settings, store, tmp_path / "second").digest != first.digest


def test_what_a_killed_process_downloaded_is_used(bucket: Bucket, tmp_path: Path) -> None:
    source = open_source("gs://rows/chats/another.jsonl", tmp_path)
    rows = source.rows(lambda: None)
    next(rows)  # downloaded, and not read to its end
    bucket.blobs.clear()
    assert [row.columns for row in source.rows(lambda: None)] == ROWS[:1]
    rows.close()
    with pytest.raises(StoreError, match="was changed or removed"):
        list(source.rows(lambda: None))


def test_an_object_that_changed_since_it_was_listed_is_not_read(
    bucket: Bucket, tmp_path: Path
) -> None:
    source = open_source("gs://rows/chats/another.jsonl", tmp_path)
    bucket.write("chats/another.jsonl", as_lines(ROWS[1:2]), None)
    with pytest.raises(StoreError, match="was changed or removed"):
        list(source.rows(lambda: None))


def test_s3_gives_the_same_rows(moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.use(monkeypatch, moto)
    client = boto3.client("s3")
    client.put_object(Bucket=s3.BUCKET, Key="x/0.jsonl", Body=as_lines(ROWS[:150]))
    client.put_object(Bucket=s3.BUCKET, Key="x/1.jsonl", Body=as_lines(ROWS[150:]))
    client.put_object(Bucket=s3.BUCKET, Key="xy.jsonl", Body=b"junk")
    client.close()
    settings = settings_for(Path("unused"), dataset_uri=f"s3://{s3.BUCKET}/x")
    data = prepare_in(settings, LocalStore(tmp_path / "store"), tmp_path / "disk")
    assert data.counts.rows_read == len(ROWS)
    versions = open_source(settings.dataset_uri, tmp_path).versions()
    assert all(version.version.startswith("s3:") for version in versions)


@pytest.mark.slow
def test_azure_gives_the_same_rows(
    azurite_blobs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from azure.storage.blob import ContainerClient

    azurite.use(monkeypatch, azurite_blobs)
    connection = azurite.connection_string(azurite_blobs)
    with ContainerClient.from_connection_string(connection, s3.BUCKET) as container:
        container.upload_blob("y/0.jsonl", as_lines(ROWS[:150]))
        container.upload_blob("y/1.jsonl", as_lines(ROWS[150:]))
    settings = settings_for(Path("unused"), dataset_uri=f"AZ://{s3.BUCKET}/y")
    data = prepare_in(settings, LocalStore(tmp_path / "store"), tmp_path / "disk")
    assert data.counts.rows_read == len(ROWS)
    versions = open_source(settings.dataset_uri, tmp_path).versions()
    assert all(version.version.startswith("az:") for version in versions)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("a/*.jsonl", "a/b.jsonl", True),
        ("a/*.jsonl", "a/b/c.jsonl", False),
        ("a/**/*.jsonl", "a/c.jsonl", True),
        ("a/**/*.jsonl", "a/b/b/c.jsonl", True),
        ("a/**", "a/b/c.jsonl", True),
        ("a/part-?.jsonl", "a/part-1.jsonl", True),
        ("a/part-?.jsonl", "a/part-/.jsonl", False),
        ("a/[0-4].jsonl", "a/3.jsonl", True),
        ("a/[!0-4].jsonl", "a/3.jsonl", False),
        ("a/[!0-4].jsonl", "a/5.jsonl", True),
        ("a.jsonl*", "aXjsonl", False),
        ("a/[.jsonl", "a/[.jsonl", True),
        ("a/[z-a].jsonl", "a/b.jsonl", False),
        ("*", "a\nb", True),
    ],
)
def test_a_glob_matches_keys_as_it_matches_paths(pattern: str, name: str, matches: bool) -> None:
    assert glob_matches(pattern, name) is matches
    assert name.startswith(glob_folder(pattern))
