"""Pods that prepare the same data at once agree on it. `pytest tests/data/test_race.py`"""

from __future__ import annotations

import multiprocessing
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

from job.store.local import LocalStore
from tests.data.table_content import content_sha256
from tests.data.test_build import ROWS, settings_for, write_lines
from tests.data.test_prepared import prepare_in

NUM_RACERS = 12


def race(start: Barrier, results: Queue[list[str]], uri: str, store: Path, disk: Path) -> None:
    settings = settings_for(Path(uri))
    start.wait(timeout=60)
    data = prepare_in(settings, LocalStore(store), disk)
    results.put([data.digest, content_sha256(data.train), content_sha256(data.eval)])


def test_twelve_pods_at_once_publish_one_manifest_and_use_its_tables(tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", ROWS)
    context = multiprocessing.get_context("forkserver")
    # Once, instead of 12 times two seconds of imports.
    context.set_forkserver_preload([__name__, "transformers.tokenization_utils_tokenizers"])
    start, results = context.Barrier(NUM_RACERS), context.Queue()
    racers = []
    for number in range(NUM_RACERS):
        disk = tmp_path / f"disk{number // 2}"  # two processes on each
        arguments = (start, results, str(rows), tmp_path / "store", disk)
        racers.append(context.Process(target=race, args=arguments))
    for racer in racers:
        racer.start()
    outcomes = [tuple(results.get(timeout=60)) for _ in racers]
    for racer in racers:
        racer.join(timeout=60)
    assert [racer.exitcode for racer in racers] == [0] * NUM_RACERS
    assert len(set(outcomes)) == 1
    names = sorted(path.name for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert [name.split("-")[0] for name in names] == ["eval", "manifest.json", "train"]
