"""`job gc` beside running workers, and what it leaves alone.

`pytest tests/ledger/test_garbage.py`
"""

from __future__ import annotations

import json
import os
import signal
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from job.ledger.folders import fetch_folder
from job.ledger.garbage import MEMORY_KEY, collect
from job.ledger.lease import HeldLease, acquire
from job.ledger.ledger import Ledger
from job.ledger.records import Checkpoint
from job.store.documents import create_document
from job.store.local import LocalStore
from tests.ledger.documents import make_identity, make_result
from tests.workers import make_inputs, start_worker, wait_for

A, B, C, D = (letter * 64 for letter in "abcd")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(LocalStore(tmp_path / "out"), "s")
    ledger.open_sweep(make_identity(JOB_DATASET_URI={"prepared": A}))
    return ledger


def _collect(ledger: Ledger, **given: Any) -> set[str]:
    """The keys that gc names, each by the part that tells it apart."""
    said: list[str] = []
    options = {"dry_run": False, "old_generations": False, "unused_hours": 24.0, **given}
    collect(ledger, **options, say=said.append)
    return {line.split(":")[0].split()[-1].partition("slots/")[2] or line.split(":")[0].split()[-1]
            for line in said if "kept" not in line}  # fmt: skip


def _folder(ledger: Ledger, slot: int, name: str) -> str:
    key = f"{ledger.slot(slot).folder}/{name}"
    for file in ("manifest.json", "adapter.safetensors"):
        ledger.store.put_if_absent(f"{key}/{file}", b"x")
    return key


def _take(ledger: Ledger, slot: int = 0) -> HeldLease:
    lease = acquire(ledger, [slot], lease_seconds=60, should_stop=lambda: None)
    assert lease is not None
    return lease


def _name(lease: HeldLease, *keys: str, best: str | None = None) -> None:
    named = tuple(Checkpoint(key=key, sha256="", step=1, best=best) for key in keys)
    lease.renew(checkpoints=named)


def _names(ledger: Ledger) -> set[str]:
    keys = ledger.store.list("sweeps/s/slots/")
    return {key.rpartition("/")[0].partition("slots/")[2] for key in keys if "manifest" in key}


def test_unnamed_checkpoints_go_once_a_later_epoch_holds_the_lease(ledger: Ledger) -> None:
    first = _take(ledger)
    named = _folder(ledger, 0, f"checkpoints/1-5-{A}")
    _folder(ledger, 0, f"checkpoints/1-9-{B}")  # uploaded, then killed before the lease named it
    _name(first, named)
    assert _collect(ledger) == set(), "epoch 1 holds the lease: it may name it yet"
    first.release()
    assert _collect(ledger) == set(), "released, and its last upload may still be on its way"
    _take(ledger)
    _folder(ledger, 0, f"checkpoints/2-9-{C}")
    assert _collect(ledger, dry_run=True) == {f"0000/checkpoints/1-9-{B}"}
    assert f"0000/checkpoints/1-9-{B}" in _names(ledger), "a dry run deletes nothing"
    assert _collect(ledger) == {f"0000/checkpoints/1-9-{B}"}
    assert _names(ledger) == {f"0000/checkpoints/1-5-{A}", f"0000/checkpoints/2-9-{C}"}


def test_adapters_and_histories_of_an_open_slot_are_left_alone(ledger: Ledger) -> None:
    for _ in range(3):
        _take(ledger).release()
    _folder(ledger, 0, f"adapter-{A}")  # the next attempt may compute these very bytes
    ledger.store.put_if_absent(f"{ledger.slot(0).folder}/history-{A}.jsonl", b"x")
    assert _collect(ledger) == set()


def _commit(ledger: Ledger) -> None:
    _take(ledger).release()
    keep = {"adapter_key": f"{ledger.slot(0).folder}/adapter-{A}",
            "history_key": f"{ledger.slot(0).folder}/history-{A}.jsonl",
            "rows_key": f"{ledger.slot(0).folder}/rows-{A}.json"}  # fmt: skip
    for name in (f"adapter-{A}", f"adapter-{B}", f"checkpoints/1-9-{C}"):
        _folder(ledger, 0, name)
    for letter in (A, B):
        for name in (f"history-{letter}.jsonl", f"rows-{letter}.json"):
            ledger.store.put_if_absent(f"{ledger.slot(0).folder}/{name}", b"x")
    ledger.slot(0).commit(make_result(**keep))


def test_a_committed_slot_keeps_what_its_result_names_and_its_documents(ledger: Ledger) -> None:
    _commit(ledger)
    ends = ("lease.json", "result.json", "sweep.json")
    documents = {key for key in ledger.store.list("sweeps/") if key.endswith(ends)}
    assert _collect(ledger) == {
        f"0000/adapter-{B}", f"0000/checkpoints/1-9-{C}", f"0000/history-{B}.jsonl",
        f"0000/rows-{B}.json",
    }  # fmt: skip
    left = set(ledger.store.list("sweeps/"))
    assert documents <= left
    assert _names(ledger) == {f"0000/adapter-{A}"}
    for name in (f"history-{A}.jsonl", f"rows-{A}.json"):
        assert f"{ledger.slot(0).folder}/{name}" in left
    assert _collect(ledger) == set(), "a second run finds nothing"


def test_what_was_before_a_redo_goes_only_when_asked(ledger: Ledger) -> None:
    _commit(ledger)
    _collect(ledger)
    ledger.store.put_if_absent(ledger.redo_key(0, 1), b"{}")
    _take(ledger)
    _folder(ledger, 0, f"checkpoints/1-3-{D}")
    assert _collect(ledger) == set()
    assert _collect(ledger, old_generations=True) == set(), "there is no newer adapter yet"
    folder = ledger.slot(0).folder
    ledger.slot(0).commit(make_result(folder, status="infeasible", eval_loss=None))
    assert _collect(ledger, old_generations=True) == {
        f"0000/adapter-{A}", f"0000/history-{A}.jsonl", f"0000/rows-{A}.json",
        f"0000/redo-1/checkpoints/1-3-{D}",
    }  # fmt: skip
    assert _names(ledger) == set()
    assert ledger.slot(0).earlier()[0].result() is not None, "documents stay"


def _shared(ledger: Ledger) -> str:
    probe = "probe-" + "0" * 32
    for key in (f"prepared/{A}/manifest.json", f"prepared/{B}/manifest.json", probe):
        ledger.store.put_if_absent(key, b"x")
    return probe


def test_prepared_data_and_probes_go_a_day_after_they_were_seen_unused(ledger: Ledger) -> None:
    probe = _shared(ledger)
    assert _collect(ledger, dry_run=True) == _collect(ledger) == set(), "perhaps just made"
    memory = Path(ledger.store.uri) / MEMORY_KEY
    content = json.loads(memory.read_text())
    assert set(content["unused_since"]) == {f"prepared/{B}", probe}
    for hours in (25, 2):
        long_ago = (datetime.now(UTC) - timedelta(hours=hours)).isoformat()
        content["unused_since"][f"prepared/{B}" if hours == 25 else probe] = long_ago
    memory.write_text(json.dumps(content))
    assert _collect(ledger) == {f"prepared/{B}"}
    assert _collect(ledger, unused_hours=0) == {probe}
    assert list(ledger.store.list("prepared/")) == [f"prepared/{A}/manifest.json"]


def test_prepared_data_that_a_sweep_began_to_use_is_forgotten_as_unused(ledger: Ledger) -> None:
    _shared(ledger)
    _collect(ledger)
    Ledger(ledger.store, "other").open_sweep(make_identity(JOB_DATASET_URI={"prepared": B}))
    assert f"prepared/{B}" not in _collect(ledger, unused_hours=0)


def test_a_sweep_that_cannot_be_read_protects_all_prepared_data(ledger: Ledger) -> None:
    _shared(ledger)
    ledger.store.put_if_absent("sweeps/torn/sweep.json", b"{")
    assert _collect(ledger, unused_hours=0) == set()


def test_a_damaged_slot_and_foreign_names_are_left_alone(ledger: Ledger) -> None:
    _take(ledger).release()
    _take(ledger)
    _folder(ledger, 0, f"checkpoints/1-9-{B}")
    ledger.store.put_if_absent(f"{ledger.slot(0).folder}/result.json", b"{")
    _folder(ledger, 1, f"checkpoints/1-9-{B}")  # no lease.json
    _folder(ledger, 2, "notes-of-mine")
    create_document(ledger.store, "prepared/by-hand/manifest.json", {})
    assert _collect(ledger, unused_hours=0) == set()


def _saved_step(ledger: Ledger) -> int:
    checkpoints = _checkpoints(ledger)
    return checkpoints[0].step if checkpoints else 0


def _checkpoints(ledger: Ledger) -> tuple[Checkpoint, ...]:
    stored = ledger.slot(0).lease()
    return stored.lease.checkpoints if stored else ()


def _missing(ledger: Ledger) -> set[str]:
    """The keys that the lease names and the store lacks at two looks: one may be pruned between."""
    missing: list[set[str]] = []
    for _ in range(2):
        entries = _checkpoints(ledger)
        named = {e.key for e in entries} | {e.best for e in entries if e.best}
        keys = set(ledger.store.list(f"{ledger.slot(0).folder}/"))
        missing.append({key for key in named if f"{key}/manifest.json" not in keys})
    return missing[0] & missing[1] if ledger.slot(0).result() is None else set()


def _leave_unnamed(ledger: Ledger, folder: Path) -> None:
    """Leave what a kill between an upload and the lease's swap leaves, at a random moment."""
    stored = ledger.slot(0).lease()
    assert stored is not None
    path = folder / "state.json"
    path.write_text("{}")
    name = f"{stored.lease.epoch}-1-{'0' * 64}"
    ledger.store.upload(f"{ledger.slot(0).folder}/checkpoints/{name}/state.json", path)


@pytest.mark.slow
def test_gc_beside_workers_that_are_killed_takes_nothing_they_need(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path) | {"num_trials": 1, "max_steps": 150, "completion_index": 0}
    inputs |= {"checkpoint_minutes": 1e-9}  # uploads all the time
    calm, store = LocalStore(tmp_path / "calm"), LocalStore(tmp_path / "out")
    assert wait_for(start_worker(inputs, lambda: calm)) == 0
    ledger = Ledger(store, "s")
    deleted = kills = 0
    while ledger.slot(0).result() is None:
        worker, kill_at_step = start_worker(inputs, lambda: store), _saved_step(ledger) + 20
        deadline = time.monotonic() + 30
        while ledger.slot(0).result() is None and _saved_step(ledger) < kill_at_step:
            assert time.monotonic() < deadline
            if ledger.identity() is not None:
                deleted += len(_collect(ledger))
                assert _missing(ledger) == set()
        if ledger.slot(0).result() is None:
            os.kill(worker, signal.SIGKILL)
            kills += 1
        wait_for(worker)
        if kills == 1 and ledger.slot(0).result() is None:
            _leave_unnamed(ledger, tmp_path)
    result, expected = ledger.slot(0).result(), Ledger(calm, "s").slot(0).result()
    assert result is not None
    assert expected is not None
    for key in ("adapter_key", "adapter_sha256", "curve", "history_key"):
        assert getattr(result, key) == getattr(expected, key), key
    assert result.adapter_key is not None
    assert result.adapter_sha256 is not None
    fetch_folder(store, result.adapter_key, result.adapter_sha256, tmp_path / "adapter")
    store.download(result.history_key, tmp_path / "history.jsonl")
    assert kills >= 2
    assert deleted >= 1
    _collect(ledger)
    left = list((tmp_path / "out/sweeps/s/slots/0000").rglob("*.safetensors"))
    assert [p.parent.name for p in left] == [result.adapter_key.rpartition("/")[2]]
