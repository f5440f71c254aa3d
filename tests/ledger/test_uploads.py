"""Background uploads under a lease, and their restoring. `pytest tests/ledger/test_uploads.py`"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from job.errors import PreemptedError, SlotError
from job.ledger.lease import HeldLease, acquire
from job.ledger.ledger import Ledger
from job.ledger.uploads import Uploads, restore
from job.store.local import LocalStore
from job.training.state import (
    SCHEMA,
    TrainState,
    read_state,
    saved_clock_seconds,
    unreadable,
    write_state,
)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(LocalStore(tmp_path / "bucket"), "s")


def _lease(ledger: Ledger) -> HeldLease:
    lease = acquire(ledger, [0], lease_seconds=30, should_stop=lambda: None)
    assert lease is not None
    return lease


def _uploads(lease: HeldLease, left: Callable[[], float | None] = lambda: None) -> Uploads:
    uploads = Uploads(lease, interval_seconds=0, seconds_left=left, clock_of=saved_clock_seconds)
    uploads.start()
    return uploads


def _checkpoint(tmp_path: Path, step: int, padding: int = 0) -> Path:
    folder = tmp_path / f"checkpoint-{step}"
    folder.mkdir()
    write_state(folder, TrainState(step=step), {})
    (folder / "adapter.safetensors").write_bytes(bytes(range(100)) + bytes(padding))
    return folder


def _best(tmp_path: Path, step: int) -> Path:
    folder = tmp_path / f"best-{step}"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_text(f"weights of step {step}")
    return folder


def _keys(ledger: Ledger, name: str) -> set[str]:
    keys = ledger.store.list(f"{ledger.slot(0).folder}/")
    return {key.split("/")[4] for key in keys if f"/{name}" in key and "manifest" in key}


def test_two_checkpoints_are_kept_and_the_best_adapters_they_need(
    ledger: Ledger, tmp_path: Path
) -> None:
    lease = _lease(ledger)
    uploads = _uploads(lease)
    bests = []
    for step in (1, 2, 3):
        bests.append(uploads.put_best(_best(tmp_path, step)).key)
        uploads.put_checkpoint(_checkpoint(tmp_path, step), step, bests[-1])
    assert uploads.flush(timeout=20)
    assert [entry.step for entry in lease.record.checkpoints] == [3, 2]
    kept = {key.rpartition("/")[2] for key in bests[1:]}
    assert _keys(ledger, "adapter-") == kept
    uploads.discard(keep=bests[2])
    assert list(ledger.store.list(f"{ledger.slot(0).folder}/checkpoints")) == []
    assert _keys(ledger, "adapter-") == {bests[2].rpartition("/")[2]}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove a file", "remove the manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    ledger: Ledger, tmp_path: Path, damage: str
) -> None:
    lease = _lease(ledger)
    uploads = _uploads(lease)
    for step in (1, 2):
        uploads.put_checkpoint(_checkpoint(tmp_path, step), step, None)
    assert uploads.flush(timeout=20)
    newest = Path(ledger.store.uri) / lease.record.checkpoints[0].key
    victim = newest / ("manifest.json" if "manifest" in damage else "adapter.safetensors")
    data = bytearray(victim.read_bytes())
    data[10] ^= 1
    victim.write_bytes(data if damage == "flip" else data[:-1])
    if "remove" in damage:
        victim.unlink()
    folder = restore(lease, tmp_path / "work", unreadable)
    assert folder is not None
    assert read_state(folder)[0].step == 1


def test_with_no_checkpoint_that_holds_the_trial_starts_again(
    ledger: Ledger, tmp_path: Path
) -> None:
    lease = _lease(ledger)
    assert restore(lease, tmp_path / "work", unreadable) is None
    uploads = _uploads(lease)
    uploads.put_checkpoint(_checkpoint(tmp_path, 1), 1, None)
    assert uploads.flush(timeout=20)
    key = lease.record.checkpoints[0].key
    (Path(ledger.store.uri) / key / "state.json").write_text("{}")
    assert restore(lease, tmp_path / "work", unreadable) is None


def test_a_checkpoint_of_newer_code_is_an_error_and_never_a_restart(
    ledger: Ledger, tmp_path: Path
) -> None:
    lease = _lease(ledger)
    uploads = _uploads(lease)
    folder = _checkpoint(tmp_path, 1)
    path = folder / "state.json"
    path.write_text(path.read_text().replace(f'"schema": {SCHEMA}', f'"schema": {SCHEMA + 1}'))
    uploads.put_checkpoint(folder, 1, None)
    assert uploads.flush(timeout=20)
    with pytest.raises(SlotError, match="use the image it began with"):
        restore(lease, tmp_path / "work", unreadable)


def test_what_a_lost_lease_uploads_counts_for_nothing(ledger: Ledger, tmp_path: Path) -> None:
    frozen = _lease(ledger)
    uploads = _uploads(frozen)
    frozen.release()
    newer = _lease(ledger)
    uploads.put_checkpoint(_checkpoint(tmp_path, 9), 9, None)
    with pytest.raises(PreemptedError, match="a newer attempt holds it"):
        uploads.flush(timeout=20)
    newer.renew()
    assert newer.record.checkpoints == ()


def test_an_upload_that_would_not_end_in_time_is_not_begun(ledger: Ledger, tmp_path: Path) -> None:
    lease = _lease(ledger)
    left: list[float | None] = [None]
    uploads = _uploads(lease, lambda: left[0])
    uploads.put_checkpoint(_checkpoint(tmp_path, 1, padding=10**6), 1, None)
    deadline = time.monotonic() + 20
    while not uploads.is_due():  # until the first one is up: then the rate is known
        assert time.monotonic() < deadline
    left[0] = 1e-9
    uploads.put_checkpoint(_checkpoint(tmp_path, 2, padding=10**6), 2, None)
    assert uploads.flush(timeout=20)
    assert [entry.step for entry in lease.record.checkpoints] == [1]


def test_a_small_upload_says_nothing_of_the_lines_rate(ledger: Ledger, tmp_path: Path) -> None:
    lease = _lease(ledger)
    left: list[float | None] = [None]
    uploads = _uploads(lease, lambda: left[0])
    uploads.put_best(_best(tmp_path, 1))  # 17 bytes in some milliseconds
    deadline = time.monotonic() + 20
    while not uploads.is_due():
        assert time.monotonic() < deadline
    left[0] = 5.0
    uploads.put_checkpoint(_checkpoint(tmp_path, 2, padding=10**6), 2, None)
    assert uploads.flush(timeout=20)
    assert [entry.step for entry in lease.record.checkpoints] == [2]
