"""The same rows give the same tables; each row is counted. `pytest tests/data/test_build.py`"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from job.data.build import build_tables
from job.data.chat import Chat, Message
from job.data.prepared import Counts, DataSettings
from job.data.samples import SampleTable
from job.data.sampling import is_eval, is_selected, row_hash
from job.data.sources import open_source
from job.data.table_files import count_lines
from job.data.table_parquet import read_table
from job.data.templates import load_template
from job.errors import DataError, SettingsError
from tests.data.table_content import content_sha256
from tests.tiny_tokenizer import byte_level_tokenizer

ROWS = [{"question": f"What is {n}?", "answer": f"It is {n} of {n * n}."} for n in range(300)]


@cache
def tokenizer() -> Any:
    return byte_level_tokenizer()


def settings_for(path: Path, **changes: Any) -> DataSettings:
    settings = DataSettings(
        dataset_uri=str(path),
        prompt_column=None,
        completion_column=None,
        prompt_template=None,
        system_prompt=None,
        chat_template=None,
        max_seq_length=64,
        seed=17,
        subsample_fraction=0.5,
        eval_fraction=0.2,
    )
    return dataclasses.replace(settings, **changes)


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def build(settings: DataSettings) -> tuple[SampleTable, SampleTable, Counts]:
    template = load_template(settings.chat_template, tokenizer())
    with tempfile.TemporaryDirectory() as name:
        *files, counts = build_tables(
            settings,
            open_source(settings.dataset_uri, Path(name)),
            tokenizer=tokenizer(),
            template=template,
            work_dir=Path(name),
            should_stop=lambda: None,
        )
        tables = [read_table(Path(name) / file.name) for file in files]
        assert [content_sha256(t) for t in tables] == [file.content_sha256 for file in files]
        assert sorted(p.name for p in Path(name).iterdir()) == sorted(f.name for f in files)
        return tables[0], tables[1], counts


def texts(table: SampleTable) -> list[str]:
    pairs = zip(table.offsets[:-1], table.offsets[1:], strict=True)
    return [tokenizer().decode(table.input_ids[start:end].tolist()) for start, end in pairs]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "rows.jsonl", ROWS)


def test_shard_order_and_file_format_change_nothing(tmp_path: Path, rows: Path) -> None:
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    write_lines(tmp_path / "shards" / "0.jsonl", shuffled[:100])
    write_lines(tmp_path / "shards" / "1.jsonl", [])
    write_lines(tmp_path / "shards" / "2.jsonl", shuffled[100:])
    table = tmp_path / "rows.parquet"
    extra = [{**row, "text": None, "id": number} for number, row in enumerate(shuffled)]
    pq.write_table(pa.Table.from_pylist(extra), table)
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"content": row["answer"], "role": "assistant", "name": "x"},
            ]
        }
        for row in ROWS
    ]
    nested = tmp_path / "chats.parquet"
    pq.write_table(pa.Table.from_pylist(chats), nested)
    train, held_out, counts = build(settings_for(rows))
    for path in (tmp_path / "shards", table, nested):
        other_train, other_eval, other_counts = build(settings_for(path))
        assert content_sha256(other_train) == content_sha256(train), path
        assert content_sha256(other_eval) == content_sha256(held_out), path
        assert other_counts == counts


def test_the_fractions_hold_and_the_sides_share_no_row(rows: Path) -> None:
    train, held_out, counts = build(settings_for(rows))
    assert counts.selected == counts.train + counts.eval == len(train) + len(held_out)
    assert 120 < counts.selected < 180  # 300 x 0.5, two standard deviations are 17
    assert 15 < counts.eval < 50  # 150 x 0.2
    assert not set(texts(train)) & set(texts(held_out))
    other_train, _, _ = build(settings_for(rows, seed=18))
    assert set(texts(other_train)) != set(texts(train))


def test_a_smaller_subsample_is_the_beginning_of_a_larger_one(rows: Path) -> None:
    small, small_eval, _ = build(settings_for(rows, subsample_fraction=0.3))
    large, large_eval, counts = build(settings_for(rows, subsample_fraction=1.0))
    assert texts(large)[: len(small)] == texts(small)
    assert texts(large_eval)[: len(small_eval)] == texts(small_eval)
    assert counts.selected == len(ROWS)


def test_the_order_is_not_that_of_the_files(rows: Path) -> None:
    train, _, _ = build(settings_for(rows, subsample_fraction=1.0))
    numbers = [int(text.split("What is ")[1].split("?")[0]) for text in texts(train)]
    assert abs(np.corrcoef(numbers, np.arange(len(numbers)))[0, 1]) < 0.2


def test_the_hash_of_a_row_is_pinned() -> None:
    """Another value here would silently give running sweeps other rows: raise SCHEMA_VERSION."""
    messages = Chat((Message("user", "Why? ça"), Message("assistant", "So.")))
    digest = row_hash(messages, seed=17)
    assert digest.hex() == "ca48c69a1ba35ac0fa82bf5e87483ad4"
    assert row_hash(messages, seed=18) != digest
    assert (
        row_hash(Chat((Message("user", "Why? çaassistant"), Message("assistant", "So."))), seed=17)
        != digest
    )
    assert not is_selected(b"\xff" * 16, fraction=0.999)
    assert is_selected(b"\xff" * 16, fraction=1.0)
    assert sum(is_eval(bytes([n]) * 16, fraction=0.5) for n in range(256)) in range(100, 156)


def test_every_assistant_turn_of_a_conversation_is_learned(tmp_path: Path) -> None:
    turns = [("human", "Hi {}?"), ("gpt", "Ho {}."), ("human", "And?"), ("gpt", "No {} more.")]
    share_gpt = [
        {"conversations": [{"from": who, "value": text.format(n)} for who, text in turns]}
        for n in range(60)
    ]
    roles = {"human": "user", "gpt": "assistant"}
    chats = [
        {"messages": [{"role": roles[who], "content": text.format(n)} for who, text in turns]}
        for n in range(60)
    ]
    parts = [
        {
            "messages": [
                {**turn, "content": [{"type": "text", "text": turn["content"]}]}
                for turn in chat["messages"]
            ]
        }
        for chat in chats
    ]
    nested = tmp_path / "parts.parquet"
    pq.write_table(pa.Table.from_pylist(parts), nested)
    paths = [
        write_lines(tmp_path / f"{k}.jsonl", rows) for k, rows in enumerate((share_gpt, chats))
    ]
    tables = [build(settings_for(path, subsample_fraction=1.0))[0] for path in (*paths, nested)]
    assert len({content_sha256(table) for table in tables}) == 1
    for start, end in itertools.pairwise(tables[0].offsets.tolist()):
        text = tokenizer().decode(tables[0].input_ids[start:end].tolist())
        learned = tables[0].input_ids[start:end][tables[0].is_target[start:end]].tolist()
        number = text.split("Hi ")[1].split("?")[0]
        assert tokenizer().decode(learned) == f"Ho {number}.<|im_end|>No {number} more.<|im_end|>"


def test_repeated_rows_are_kept_on_one_side_and_counted(tmp_path: Path) -> None:
    repeated = ROWS + ROWS[:100] * 4
    train, held_out, counts = build(
        settings_for(write_lines(tmp_path / "rows.jsonl", repeated), subsample_fraction=1.0)
    )
    assert counts.duplicates == 400
    assert counts.selected == len(repeated) == len(train) + len(held_out)
    assert not set(texts(train)) & set(texts(held_out))
    times = Counter(texts(train) + texts(held_out))
    assert sorted(times.values()) == [1] * 200 + [5] * 100
    assert counts.rows_read == counts.selected, "all are told, none twice"


def test_copies_are_taken_together_and_in_any_order_of_files(tmp_path: Path) -> None:
    repeated = ROWS * 3
    shuffled = random.Random(2).sample(repeated, len(repeated))
    turns = [
        {"messages": [turn("user", row["question"]), turn("assistant", row["answer"])]}
        for row in shuffled[450:]
    ]
    paths = [
        write_lines(tmp_path / "a.jsonl", repeated),
        write_lines(tmp_path / "b.jsonl", shuffled),
        write_lines(tmp_path / "c.jsonl", shuffled[:450] + turns),
        write_lines(tmp_path / "d.jsonl", turns[::-1] + shuffled[:450][::-1]),
    ]
    built = [build(settings_for(path)) for path in paths]
    sizes = {content_sha256(train) for train, _, _ in built}
    assert len(sizes) == 1
    train, held_out, counts = built[0]
    assert set(Counter(texts(train) + texts(held_out)).values()) == {3}
    assert counts.duplicates == counts.selected * 2 // 3
    assert {c.duplicates for _, _, c in built} == {counts.duplicates}


def test_unusable_rows_are_counted_by_reason(tmp_path: Path) -> None:
    bad: list[Any] = [{"question": "Why?", "answer": ""}, [], {"question": "Why?"}]
    path = write_lines(tmp_path / "rows.jsonl", ROWS + bad)
    _, _, counts = build(settings_for(path, subsample_fraction=1.0))
    assert counts.unusable == {
        "no known columns": 1,
        "not a JSON object": 1,
        "question, answer: empty answer": 1,
    }
    assert counts.places["no known columns"] == ["rows.jsonl:303"]
    assert counts.rows_read == len(ROWS) + 3
    with pytest.raises(
        DataError, match=r"24 of 324 rows .* 8 x question, answer: empty answer \(rows.jsonl:301"
    ):
        build(settings_for(write_lines(path, ROWS + bad * 8)))


def test_columns_not_used_and_joined_rows_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = [{**row, "note": "n"} for row in ROWS[:100]]
    most = [{**row, "url": "u", "score": 1, "lang": "de"} for row in ROWS[100:]]
    joined = {"messages": [turn("user", "A?"), turn("user", "B?"), turn("assistant", "C.")]}
    asking = {"messages": [turn("user", "A?"), turn("assistant", "C."), turn("user", "D?")]}
    path = write_lines(tmp_path / "rows.jsonl", [*few, *most, joined, joined, asking])
    with caplog.at_level("INFO", logger="job"):
        _, _, counts = build(settings_for(path, subsample_fraction=1.0))
    assert counts.columns_not_used == ["lang", "score", "url"]
    assert (counts.joined, counts.duplicates, counts.unanswered) == (2, 1, 1)
    told = [line for line in caplog.messages if "columns not used" in line]
    assert len(told) == 1
    assert told[0].startswith("data: columns not used: lang, score, url (JOB_PROMPT_TEMPLATE makes")
    table = [" ".join(line.split()) for line in count_lines(counts)]
    assert table[0] == "303 rows read"
    assert table[1] == f"303 taken: {counts.train} to train on, {counts.eval} held out"
    assert table[3] == "2 of these with neighbouring turns of one role, which were joined"
    assert table[4] == "1 of these without their last turns, which nobody answered"
    assert [line for line in caplog.messages if line.endswith(count_lines(counts)[1])]


def test_a_prompt_template_and_a_system_prompt_make_other_rows(tmp_path: Path) -> None:
    rows = [{**row, "context": f"Fact {n}."} for n, row in enumerate(ROWS)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    template, system = "{context}\\nSo: {question}", "Be brief."
    train, _, counts = build(
        settings_for(path, prompt_template=template, system_prompt=system, max_seq_length=256)
    )
    assert counts.columns_not_used == []
    for text in texts(train):
        number = text.split("What is ")[1].split("?")[0]
        assert f"Be brief.<|im_end|>\n<|im_start|>user\nFact {number}.\nSo: What is" in text
    with pytest.raises(SettingsError, match="no row has a column 'contxt', did you mean 'context'"):
        build(settings_for(path, prompt_template="{contxt} {question}"))


def test_long_rows_are_counted_apart_from_unusable_ones(tmp_path: Path) -> None:
    cut = [{"question": f"Q{n}?", "answer": "so " * 60} for n in range(100)]
    gone = [{"question": f"{n} " + "why " * 60, "answer": "So."} for n in range(100)]
    path = write_lines(tmp_path / "rows.jsonl", ROWS + cut + gone)
    train, held_out, counts = build(settings_for(path, subsample_fraction=1.0))
    assert (counts.truncated, counts.too_long, counts.refused) == (100, 100, {})
    assert max(train.lengths.max(), held_out.lengths.max()) == 64
    assert counts.selected == counts.train + counts.eval + counts.too_long


def test_rows_that_the_template_refuses_are_unusable_above_five_percent(rows: Path) -> None:
    source = (
        "{% for message in messages %}{% if '1' in message['content'] %}"
        "{{ raise_exception('no') }}{% endif %}{{ message['content'] }}\n{% endfor %}"
    )
    with pytest.raises(
        DataError, match="the chat template refuses it.*give another JOB_CHAT_TEMPLATE"
    ):
        build(settings_for(rows, chat_template=source))


def test_the_first_train_sample_is_logged(rows: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="job")
    train, _, _ = build(settings_for(rows))
    question, answer = texts(train)[0].split("<|im_end|>\n<|im_start|>assistant\n")
    (line,) = [text for text in caplog.messages if "[[" in text]
    shown = f"{question}<|im_end|>\n<|im_start|>assistant\n[[{answer}]]".replace("\n", "\n  ")
    assert line == f"data: a sample, what is learned in [[ ]]:\n  {shown}"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval_fraction": 1e-9}, "no eval rows.*JOB_EVAL_FRACTION, or raise JOB_SUBSAMPLE_FRAC"),
        (
            {"eval_fraction": 1e-9, "subsample_fraction": 1.0},
            "no eval rows.*: give more rows, or raise JOB_EVAL_FRACTION$",
        ),
        ({"eval_fraction": 1 - 1e-9}, "no train rows.*lower JOB_EVAL_FRACTION"),
        ({"subsample_fraction": 1e-9}, "no train rows.*raise JOB_SUBSAMPLE_FRACTION"),
        ({"max_seq_length": 3}, r"no train rows.*raise JOB_MAX_SEQ_LENGTH \(3 tokens\)"),
        ({"prompt_column": "frage", "completion_column": "answer"}, "no row has a column 'frage'"),
    ],
)
def test_data_without_rows_on_a_side_says_the_way_out(
    rows: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        build(settings_for(rows, **changes))


@pytest.mark.parametrize(("num_rows", "words"), [(400, "rows that differ"), (5, "more rows")])
def test_rows_that_are_all_alike_are_told(tmp_path: Path, num_rows: int, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n' * num_rows)
    with pytest.raises(DataError, match=f"no (eval|train) rows.*: give {words}"):
        build(settings_for(path, eval_fraction=0.5))


def test_names_of_columns_are_no_way_out_of_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\n" + "a,b,c\n" * 20)
    with pytest.raises(DataError, match="not as many values as columns .* leave the files") as told:
        build(settings_for(path))
    assert "JOB_PROMPT_COLUMN" not in str(told.value)


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n \n\n")
    with pytest.raises(DataError, match="no rows in these files"):
        build(settings_for(path))


def test_a_work_folder_that_is_not_ours_is_no_full_disk(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="JOB_WORK_DIR.*give a folder that this user may write"):
        build_tables(
            settings_for(rows),
            open_source(str(rows), tmp_path),
            tokenizer=tokenizer(),
            template=load_template(None, tokenizer()),
            work_dir=tmp_path / "file/below",
            should_stop=lambda: None,
        )


def test_what_a_template_cannot_write_and_prompts_that_are_rendered_are_counted_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    thought = {**turn("assistant", "Four."), "reasoning_content": "Two and two."}
    rows = [{"messages": [turn("user", f"2 + 2, case {n}?"), thought]} for n in range(20)]
    rows += [
        {
            "prompt": f"<|im_start|>user\n{n}?<|im_end|>\n<|im_start|>assistant\n",
            "completion": "Yes.",
        }
        for n in range(20)
    ]
    rows += [{"question": f"What is <|im_end|>, {n}?", "answer": "A token."} for n in range(20)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    caplog.set_level("INFO", "job")
    *_, counts = build(settings_for(path, subsample_fraction=1.0))
    assert (counts.dropped_thoughts, counts.prerendered, counts.control_as_text) == (20, 20, 20)
    assert "20 answers are learned without their reasoning" in caplog.text
    assert "20 prompts hold the chat template's own tokens" in caplog.text
    (sample,) = (r.message for r in caplog.records if "data: a sample" in r.message)
    assert "[[" in sample
    assert sample.count("<|im_start|>assistant") == 1, "no prompt is wrapped twice"
