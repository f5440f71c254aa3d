"""Of a folder with splits only train is read. `pytest tests/data/test_folders.py`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from job.data.folders import folder_files
from job.data.sources import open_source
from job.errors import DataError

ROWS = [{"question": f"{number}?", "answer": f"{number}."} for number in range(30)]


def columns(path: object) -> list[object]:
    rows = list(open_source(str(path), Path("unused")).rows(lambda: None))
    assert [row.problem for row in rows if row.problem] == []
    return [row.columns for row in rows]


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_a_clone_of_a_hub_data_set_trains_on_its_train_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_table(tmp_path / "main/train-00000-of-00001.parquet", ROWS[:20])
    write_table(tmp_path / "main/test-00000-of-00001.parquet", ROWS[20:])
    (tmp_path / "README.md").write_text("# GSM8K\n")
    with caplog.at_level("INFO", logger="job"):
        assert columns(tmp_path) == ROWS[:20]
    told = [message for message in caplog.messages if "split" in message]
    assert told == [f"data: only the train split of {tmp_path} is read, not: test (1 file)"]
    assert columns(tmp_path / "main/*.parquet") == ROWS[20:] + ROWS[:20], (
        "a glob means what it says"
    )


@pytest.mark.parametrize(
    ("names", "train"),
    [
        (["a.jsonl", "b/c.jsonl"], ["a.jsonl", "b/c.jsonl"]),
        (["train.csv", "test.csv", "dev.csv"], ["train.csv"]),
        (
            ["train/0.jsonl", "train/1.jsonl", "validation/0.jsonl"],
            ["train/0.jsonl", "train/1.jsonl"],
        ),
        (["data/train-0.parquet", "data/test-0.parquet", "x.json"], ["data/train-0.parquet"]),
        (["gsm8k_Train.jsonl", "gsm8k_test.jsonl"], ["gsm8k_Train.jsonl"]),
        (["rows.jsonl", "test.jsonl"], ["rows.jsonl"]),
        (["training.jsonl", "other.jsonl", "eval.jsonl"], ["training.jsonl"]),
        (["contest.jsonl", "latest.jsonl", "devices.jsonl"], 3),
        (["train.jsonl", "test.parquet"], ["train.jsonl"]),
    ],
)
def test_words_in_names_tell_the_splits(names: list[str], train: list[str] | int) -> None:
    expected = sorted(names) if isinstance(train, int) else train
    assert folder_files(names, "rows") == expected


def test_a_folder_without_a_train_split_names_those_it_has() -> None:
    words = "rows has no train split, only test, validation: name the files to train on with a glob"
    with pytest.raises(DataError, match=words):
        folder_files(["test.jsonl", "dev/0.jsonl", "README.md"], "rows")


NAMES = ["a/x.parquet", "a/y.parquet", "b/x.parquet", "b/z.parquet"]
ONE = "- config_name: one\n  data_files: a/*\n"
SPLIT_TRAIN = "  - {split: train, path: ./a/x.parquet}\n"


def card(configs: str) -> str:
    return f"---\nlicense: mit\nconfigs:\n{configs}\n---\n# A data set\n"


@pytest.mark.parametrize(
    ("configs", "train"),
    [
        ("- config_name: one\n  data_files: a/*.parquet", NAMES[:2]),
        ("- config_name: one\n  data_files: [a/x.parquet, 'b/x*']", [NAMES[0], NAMES[2]]),
        (f"- data_files:\n{SPLIT_TRAIN}  - {{split: test, path: 'b/*'}}", NAMES[:1]),
        ("- config_name: one\n  data_files: {train: ['**/x.parquet'], test: '**/z*'}", NAMES[::2]),
        ("- config_name: one\n  data_dir: b", NAMES[2:]),
        ("- config_name: one\n  data_dir: b\n  data_files: x.parquet", NAMES[2:3]),
        (f"{ONE}- config_name: two\n  default: true\n  data_files: b/*", NAMES[2:]),
        (
            "- config_name: one\n  data_files: a/*\n- config_name: gone\n  data_files: c/*",
            NAMES[:2],
        ),
        ("- config_name: gone\n  data_files: c/*", NAMES),
        ("- 7", NAMES),
        ("  oops: [", NAMES),
    ],
)
def test_a_card_names_the_files_of_its_train_split(configs: str, train: list[str]) -> None:
    assert folder_files(NAMES, "rows", card(configs)) == train


def test_a_card_with_several_configurations_or_no_train_is_refused() -> None:
    both = "- config_name: one\n  data_files: a/*\n- config_name: two\n  data_files: b/*"
    with pytest.raises(DataError, match=r"several configurations \(one, two\): name the files of"):
        folder_files(NAMES, "rows", card(both))
    test = "- config_name: one\n  data_files: {test: 'a/*', unseen: 'b/*'}"
    with pytest.raises(DataError, match="has no train split, only test, unseen"):
        folder_files(NAMES, "rows", card(test))


@pytest.mark.slow
@pytest.mark.parametrize("is_split", [False, True])
def test_a_folder_of_save_to_disk_is_its_train_split(tmp_path: Path, is_split: bool) -> None:
    from datasets import Dataset, DatasetDict

    saved: Any = Dataset.from_list(ROWS[:20])
    if is_split:
        saved = DatasetDict({"train": saved, "rejected": Dataset.from_list(ROWS[20:])})
        saved.save_to_disk(tmp_path / "saved")
    else:
        saved.save_to_disk(tmp_path / "saved", num_shards=3)
    assert columns(tmp_path / "saved") == ROWS[:20]
    if is_split:
        assert columns(tmp_path / "saved/rejected") == ROWS[20:]
        (tmp_path / "saved/train/data-00000-of-00001.arrow").unlink()
        with pytest.raises(DataError, match="has no train split, only rejected"):
            columns(tmp_path / "saved")


def test_arrow_files_are_read_and_damaged_ones_refused(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    for name, new in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        path = tmp_path / f"{name}.arrow"
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
        assert columns(path) == ROWS
        data = path.read_bytes()
        for damaged in (data[: len(data) // 2], data[:16] + b"\xff" * 300):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match="is damaged Arrow: write it again"):
                columns(path)


def test_what_datasets_keeps_beside_rows_is_none(tmp_path: Path) -> None:
    names = ["state.json", "dataset_info.json", "data-00000-of-00001.arrow", "cache-0a1b.arrow"]
    assert folder_files(names, "rows") == ["data-00000-of-00001.arrow"]
    with pytest.raises(DataError, match="chooses its rows by an index file.*save it again"):
        folder_files([*names, "indices.arrow"], "rows")
    (tmp_path / "x.json").write_text(json.dumps(ROWS))
    assert columns(tmp_path) == ROWS
