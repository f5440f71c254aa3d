"""What trial 1 and trial N read, and that every file format gives the same rows.

`python -m benchmarks.data`: 100,000 rows in 170 MB of JSON lines; fails if the tokens differ
between formats. `python -m benchmarks.data memory`: a 2 GB file, each stage in its own process;
`--rows N` makes it smaller.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich import box
from rich.console import Console
from rich.table import Table

from job.data.formats import Layout
from job.data.prepared import DataSettings, PreparedData, prepare
from job.data.selection import Selection, SelectionRule
from job.data.sources import open_source
from job.data.tokenisation import tokenisation_of
from job.data.tokens import load_tokenizer
from job.store.local import LocalStore
from tests.data.table_content import content_sha256
from tests.tiny_tokenizer import TEXTS, byte_level_tokenizer

NUM_ROWS = 100_000
ROW_WORDS = 148  # of each of two long columns: 1.7 kB a row
NUM_SHARDS = 16
MEMORY_ROWS = 1_200_000  # 2 GB


def main() -> None:
    arguments = _parse()
    if arguments.stage:
        _stage(arguments.stage[0], Path(arguments.stage[1]))
        return
    console = Console(width=100, highlight=False)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    with tempfile.TemporaryDirectory() as name:
        if arguments.what == "memory":
            _measure_memory(console, Path(name), arguments.rows)
        else:
            _measure_trials(console, Path(name))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=("trials", "memory"), default="trials")
    parser.add_argument("--rows", type=int, default=MEMORY_ROWS, help="of the file for `memory`")
    parser.add_argument("--stage", nargs=2, help=argparse.SUPPRESS)  # one of `memory`'s processes
    return parser.parse_args()


def _rows(num_rows: int, *, num_texts: int) -> Iterator[dict[str, str]]:
    """Rows of 1.7 kB, all different by a number; fewer texts are quicker to make."""
    rng = random.Random(17)
    words = " ".join(TEXTS).split()  # which the small tokenizer knows, as a real one knows English
    texts: list[str] = []
    for number in range(num_rows):
        if len(texts) < num_texts:
            texts.append(" ".join(rng.choices(words, k=2 * ROW_WORDS)))
        text = texts[number % num_texts]
        middle = text.index(" ", len(text) // 3)
        yield {
            "instruction": f"{number}: {text[:middle]}?",
            "input": "",
            "output": text[middle + 1 :] + ".",
        }


def _write(rows: Iterator[dict[str, str]], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def _settings(path: Path, **changes: Any) -> DataSettings:
    fields: dict[str, Any] = {
        "dataset_uri": str(path),
        "prompt_column": None,
        "completion_column": None,
        "prompt_template": None,
        "system_prompt": None,
        "chat_template": None,
        "max_seq_length": 1024,
        "seed": 17,
        "subsample_fraction": 0.15,
        "eval_fraction": 0.2,
    }
    return DataSettings(**{**fields, **changes})


def _prepare(path: Path, store: Path, disk: Path) -> tuple[PreparedData, str]:
    """The data, and the seconds on the clock and of CPU, which a busy machine does not stretch."""
    byte_level_tokenizer().save_pretrained(disk.parent / "tokenizer")
    tokenizer = load_tokenizer(str(disk.parent / "tokenizer"))  # as a trial does: imports torch
    started, cpu_started = time.monotonic(), time.process_time()
    data = prepare(
        _settings(path),
        tokenisation=tokenisation_of(tokenizer, None),
        store=LocalStore(store),
        cache_dir=disk,
        should_stop=lambda: None,
    )
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
    return data, f"{seconds:.1f} ({cpu_seconds:.1f})"


def _measure_trials(console: Console, folder: Path) -> None:
    lines = _write(_rows(NUM_ROWS, num_texts=NUM_ROWS), folder / "rows.jsonl")
    table = Table(
        "", "read from", "MB", "seconds (CPU)", "train rows", "eval rows", box=box.MARKDOWN
    )
    tables = set()
    for title, path in _formats(lines, folder).items():
        size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
        data, seconds = _prepare(path, folder / title / "store", folder / title / "first")
        tables.add((content_sha256(data.train), content_sha256(data.eval)))
        table.add_row(*_cells("trial 1", title, size, seconds, data))
        if path == lines:
            data, seconds = _prepare(path, folder / title / "store", folder / title / "second")
            stored = folder / title / "store" / "prepared" / data.digest
            size = sum(file.stat().st_size for file in stored.iterdir())
            table.add_row(*_cells("trial N", "store", size, seconds, data))
    console.print(table)
    if len(tables) != 1:
        raise RuntimeError("the tables differ between the formats")
    console.print(f"the same tables from all {len(_formats(lines, folder))} sources")


def _cells(trial: str, title: str, size: int, seconds: str, data: PreparedData) -> list[str]:
    rows = [str(len(data.train)), str(len(data.eval))]
    return [trial, title, f"{size / 1e6:.1f}", seconds, *rows]


def _formats(lines: Path, folder: Path) -> dict[str, Path]:
    """The same rows as Parquet, and shuffled in compressed shards."""
    formats = {
        "JSON lines": lines,
        "Parquet": folder / "rows.parquet",
        "shuffled gzip shards": folder / "gz",
        "shuffled zstd shards": folder / "zst",
    }
    if formats["Parquet"].exists():
        return formats
    raw = lines.read_bytes().splitlines(keepends=True)
    rows = pa.Table.from_pylist([json.loads(line) for line in raw])
    pq.write_table(rows, formats["Parquet"], row_group_size=10_000)
    random.Random(1).shuffle(raw)
    for number in range(NUM_SHARDS):
        shard = b"".join(raw[number::NUM_SHARDS])
        for kind, packed in (
            ("gz", gzip.compress(shard, 3)),
            ("zst", pa.compress(shard, codec="zstd", asbytes=True)),
        ):
            (folder / kind).mkdir(exist_ok=True)
            (folder / kind / f"{number:02}.jsonl.{kind}").write_bytes(packed)
    return formats


def _measure_memory(console: Console, folder: Path, num_rows: int) -> None:
    lines = _write(_rows(num_rows, num_texts=2000), folder / "rows.jsonl")
    table = Table("stage", "MB read", "rows kept", "seconds", "peak MB", box=box.MARKDOWN)
    for stage in ("imports only", "subsample", "tokenizer only", "subsample and tokenise"):
        shown = subprocess.run(
            [sys.executable, "-m", "benchmarks.data", "--stage", stage, str(lines)],
            capture_output=True,
            text=True,
            check=True,
        )
        table.add_row(stage, f"{lines.stat().st_size / 1e6:.0f}", *json.loads(shown.stdout))
    console.print(table)


def _stage(stage: str, lines: Path) -> None:
    """One row of that table, from a process of its own."""
    started = time.monotonic()
    kept = 0
    with tempfile.TemporaryDirectory(dir=lines.parent) as name:
        folder = Path(name)
        if stage == "subsample":
            with Selection(SelectionRule(Layout(), 17, 0.15), folder) as selection:
                selection.read(open_source(str(lines), folder), lambda: None)
                kept = sum(1 for _ in selection.rows())
        elif stage == "tokenizer only":
            byte_level_tokenizer().save_pretrained(folder)
            load_tokenizer(str(folder))
        elif stage != "imports only":
            data, _ = _prepare(lines, folder / "store", folder / "disk")
            kept = len(data.train) + len(data.eval)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    shown = [str(kept), f"{time.monotonic() - started:.0f}", f"{peak:.0f}"]
    sys.stdout.write(json.dumps(shown))


if __name__ == "__main__":
    logging.getLogger("job").setLevel(logging.ERROR)
    main()
