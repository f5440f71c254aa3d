"""Prepared data is the same for every pod, or is refused. `pytest tests/data/test_prepared.py`"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from job.data.prepared import DataSettings, PreparedData, data_digest, prepare
from job.data.sources import open_source
from job.data.table_files import Manifest
from job.data.tokenisation import tokenisation_of
from job.data.tokens import load_tokenizer
from job.errors import StoreError
from job.store.local import LocalStore
from tests.data.table_content import content_sha256
from tests.data.test_build import ROWS, settings_for, tokenizer, write_lines


def prepare_in(
    settings: DataSettings,
    store: LocalStore,
    cache_dir: Path,
    *,
    should_stop: Callable[[], None] = lambda: None,
) -> PreparedData:
    return prepare(
        settings,
        tokenisation=tokenisation_of(tokenizer(), settings.chat_template),
        store=store,
        cache_dir=cache_dir,
        should_stop=should_stop,
    )


def assert_same(one: PreparedData, other: PreparedData) -> None:
    assert one.digest == other.digest
    assert one.counts == other.counts
    assert content_sha256(one.train) == content_sha256(other.train)
    assert content_sha256(one.eval) == content_sha256(other.eval)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "rows.jsonl", ROWS)


def test_a_stop_is_obeyed_while_rows_are_read_and_encoded(tmp_path: Path, rows: Path) -> None:
    class StoppedError(Exception):
        pass

    calls = 0

    def stop_at_third() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise StoppedError

    path = write_lines(tmp_path / "many.jsonl", ROWS * 10)
    store = LocalStore(tmp_path / "bucket")
    with pytest.raises(StoppedError):
        prepare_in(settings_for(path), store, tmp_path / "disk", should_stop=stop_at_third)
    assert list(store.list("")) == []


DIGEST_SCRIPT = """
import sys
from tests.data.test_prepared import Path, digest_of, settings_for
print(digest_of(settings_for(Path(sys.argv[1]))))
"""


def digest_of(settings: DataSettings) -> str:
    source = open_source(settings.dataset_uri, Path("unused"))
    facts = tokenisation_of(tokenizer(), settings.chat_template).facts
    return data_digest(settings, source, facts)


@pytest.mark.slow
def test_the_digest_is_the_same_in_another_process_and_folder(tmp_path: Path, rows: Path) -> None:
    copy = write_lines(tmp_path / "elsewhere" / "rows.jsonl", ROWS)
    shown = subprocess.run(
        [sys.executable, "-c", DIGEST_SCRIPT, str(copy)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == digest_of(settings_for(rows))


def test_the_digest_changes_with_everything_that_changes_the_tables(rows: Path) -> None:
    base = settings_for(rows)
    changes: list[dict[str, Any]] = [
        {"seed": 18},
        {"max_seq_length": 65},
        {"subsample_fraction": 0.51},
        {"eval_fraction": 0.21},
        {"prompt_column": "question", "completion_column": "answer"},
        {"prompt_template": "{question}"},
        {"system_prompt": "Be brief."},
        {"chat_template": "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"},
    ]
    digests = {digest_of(dataclasses.replace(base, **change)) for change in changes}
    digests.add(digest_of(base))
    write_lines(rows, ROWS[1:])
    digests.add(digest_of(base))
    assert len(digests) == len(changes) + 2


def test_a_second_pod_takes_what_the_first_published(tmp_path: Path, rows: Path) -> None:
    store = LocalStore(tmp_path / "bucket")
    first = prepare_in(settings_for(rows), store, tmp_path / "first")
    names = sorted(key.rpartition("/")[2].split("-")[0] for key in store.list(""))
    assert names == ["eval", "manifest.json", "train"]
    version = store.get(f"prepared/{first.digest}/manifest.json")
    second = prepare_in(settings_for(rows), store, tmp_path / "second")
    assert_same(first, second)
    assert store.get(f"prepared/{first.digest}/manifest.json") == version


def test_another_store_is_filled_from_this_disk(tmp_path: Path, rows: Path) -> None:
    calls: list[None] = []
    first = prepare_in(settings_for(rows), LocalStore(tmp_path / "a"), tmp_path / "disk")
    second = prepare_in(
        settings_for(rows),
        LocalStore(tmp_path / "b"),
        tmp_path / "disk",
        should_stop=lambda: calls.append(None),
    )
    assert_same(first, second)
    assert len(calls) == 2  # before each look at the store; building calls it for its batches too


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_file_in_the_store_is_built_again(
    tmp_path: Path, rows: Path, damage: Callable[[Path], None]
) -> None:
    store = LocalStore(tmp_path / "bucket")
    first = prepare_in(settings_for(rows), store, tmp_path / "first")
    (damaged,) = (tmp_path / "bucket").rglob("train-*")
    damage(damaged)
    assert_same(first, prepare_in(settings_for(rows), store, tmp_path / "second"))
    assert_same(first, prepare_in(settings_for(rows), store, tmp_path / "third"))
    assert not list(
        (tmp_path / "third" / "prepared" / first.digest).glob("manifest*")
    )  # downloaded


def test_a_damaged_file_on_disk_is_fetched_again(tmp_path: Path, rows: Path) -> None:
    store = LocalStore(tmp_path / "bucket")
    first = prepare_in(settings_for(rows), store, tmp_path / "disk")
    for path in (tmp_path / "disk").rglob("*.parquet"):
        flip(path)
    assert_same(first, prepare_in(settings_for(rows), store, tmp_path / "disk"))


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"schema": 1}', b"\xff", b"[" * 99999])
def test_a_damaged_manifest_is_replaced(tmp_path: Path, rows: Path, body: bytes) -> None:
    store = LocalStore(tmp_path / "bucket")
    key = f"prepared/{digest_of(settings_for(rows))}/manifest.json"
    assert store.put_if_absent(key, body)
    first = prepare_in(settings_for(rows), store, tmp_path / "first")
    stored = store.get(key)
    assert stored is not None
    assert stored.version == "2"
    assert_same(first, prepare_in(settings_for(rows), store, tmp_path / "second"))


def test_a_manifest_cannot_name_a_file_elsewhere(tmp_path: Path, rows: Path) -> None:
    store = LocalStore(tmp_path / "bucket")
    first = prepare_in(settings_for(rows), store, tmp_path / "disk")
    stored = store.get(f"prepared/{first.digest}/manifest.json")
    assert stored is not None
    document = json.loads(stored.data)
    document["train"]["name"] = "../../" + document["train"]["name"]
    with pytest.raises(ValueError, match="name"):
        Manifest.from_bytes(json.dumps(document).encode(), digest=first.digest)


EARLIER = Path(__file__).parents[1] / "ledger/bucket_0_1"  # by version 0.1: schema 1


@pytest.mark.slow
def test_a_sweep_keeps_the_tables_that_an_earlier_version_made(tmp_path: Path) -> None:
    (folder,) = (EARLIER / "out/prepared").iterdir()
    settings = settings_for(EARLIER / "rows.jsonl", max_seq_length=1024, subsample_fraction=1.0)
    earlier = tokenisation_of(load_tokenizer(str(EARLIER / "base")), None)
    store = LocalStore(shutil.copytree(EARLIER / "out", tmp_path / "out"))

    def prepared(frozen: str | None, settings: DataSettings = settings) -> PreparedData:
        return prepare(
            settings, tokenisation=earlier, store=store, cache_dir=tmp_path / uuid4().hex,
            should_stop=lambda: None, frozen_digest=frozen,
        )  # fmt: skip

    assert prepared(folder.name).digest == folder.name
    assert prepared(folder.name).counts.joined == 0
    new = prepared(None).digest
    assert new != folder.name, "a new sweep takes this version's"
    assert prepared("0" * 64).digest == new, "another sweep's tables are not ours"
    other = dataclasses.replace(settings, system_prompt="Be brief.")
    assert prepared(folder.name, other).digest not in (new, folder.name)
    flip(next((tmp_path / "out/prepared" / folder.name).glob("train-*")))
    with pytest.raises(StoreError, match="go on with the image that began it.*JOB_SWEEP_NAME"):
        prepared(folder.name)


class RacingStore(LocalStore):
    """The local store, where another pod's manifest arrives just before ours.

    Its file has other bytes and the same table, as another Parquet writer would have made it.
    """

    def __init__(self, root: Path, winner: Path) -> None:
        super().__init__(root)
        self._winner = winner

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if self.get(key) is None:
            for path in self._winner.rglob("*.parquet"):
                self.upload(f"{key.rpartition('/')[0]}/{path.name}", path)
            (manifest,) = self._winner.rglob("manifest.json")
            assert super().put_if_absent(key, manifest.read_bytes())
        return super().put_if_absent(key, data)


def test_the_loser_of_a_race_takes_the_winners_tables(tmp_path: Path, rows: Path) -> None:
    first = prepare_in(settings_for(rows), LocalStore(tmp_path / "a"), tmp_path / "winner")
    store = RacingStore(tmp_path / "b", tmp_path / "winner")
    second = prepare_in(settings_for(rows), store, tmp_path / "loser")
    assert_same(first, second)
    stored = store.get(f"prepared/{first.digest}/manifest.json")
    (manifest,) = (tmp_path / "winner").rglob("manifest.json")
    assert stored is not None
    assert stored.data == manifest.read_bytes()


def test_damaged_tables_that_cannot_be_rebuilt_are_refused(tmp_path: Path, rows: Path) -> None:
    store = LocalStore(tmp_path / "bucket")
    first = prepare_in(settings_for(rows), store, tmp_path / "disk")
    key = f"prepared/{first.digest}/manifest.json"
    stored = store.get(key)
    assert stored is not None
    document = json.loads(stored.data)
    document["train"]["content_sha256"] = "0" * 64  # what other package versions once made of it
    assert store.put_if_version(key, json.dumps(document).encode(), stored.version)
    (damaged,) = (tmp_path / "bucket").rglob("train-*")
    flip(damaged)
    with pytest.raises(StoreError, match="is damaged and cannot be rebuilt"):
        prepare_in(settings_for(rows), store, tmp_path / "second")


@pytest.mark.slow
def test_no_torch_is_imported_to_prepare_data() -> None:
    code = (
        "import sys, job.data.prepared\n"
        "from tests.tiny_tokenizer import byte_level_tokenizer\n"
        "byte_level_tokenizer()\n"
        "assert 'torch' not in sys.modules\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
