"""SIGTERM at named moments, on a slow store. `pytest tests/trial/test_sigterm.py`"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sigterm import Case, measure
from job.ledger.ledger import Ledger
from job.ledger.records import Lease, Result
from job.store.local import LocalStore
from tests.throttled import BLOCK, BigTraining, ThrottledStore
from tests.volumes import small_volume
from tests.workers import check_accounts, make_inputs, start_worker, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_inputs(tmp_path_factory.mktemp("inputs")) | {
        "num_trials": 1, "completion_index": 0, "checkpoint_minutes": 0.2 / 60, "lease_seconds": 5,
    }  # fmt: skip


def _lease(out: Path) -> Lease:
    stored = Ledger(LocalStore(out), "s").slot(0).lease()
    assert stored is not None
    return stored.lease


def _stopped_at(
    inputs: dict[str, Any], out: Path, moment: str, *, megabytes: int, rate: float, **training: Any
) -> tuple[int, float]:
    """Send two SIGTERMs at the named moment; return the exit code and the seconds to the end."""
    read, write = os.pipe()

    def mark(name: str) -> None:
        os.write(write, f"{name}\n".encode())

    worker = start_worker(
        inputs | {"output_uri": str(out)},
        lambda: ThrottledStore(out, rate * 1e6, mark),
        training=BigTraining(megabytes, mark, **training).training(),
    )
    os.close(write)
    with os.fdopen(read) as marks:
        assert any(line.strip() == moment for line in marks)
        started = time.monotonic()
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGTERM)
        code = wait_for(worker)
    return code, time.monotonic() - started


def _finish(inputs: dict[str, Any], out: Path) -> Result:
    training = BigTraining(1, lambda _: None, num_steps=20).training()
    store = LocalStore(out)
    given = inputs | {"output_uri": str(out)}
    assert wait_for(start_worker(given, lambda: store, training=training)) == 0
    check_accounts(Ledger(store, "s"), 0)
    result = Ledger(store, "s").slot(0).result()
    assert result is not None
    return result


def test_sigterm_during_an_upload_saves_the_last_step_behind_it(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    code, seconds = _stopped_at(inputs, tmp_path, "upload", megabytes=4, rate=8)
    assert code == 75
    assert seconds < 4
    lease = _lease(tmp_path)
    assert lease.checkpoints[0].step == lease.attempt.step
    assert lease.attempt.exit_code == 75
    assert _finish(inputs, tmp_path).attempts == 2


def test_sigterm_during_an_upload_that_leaves_no_time_for_another_lets_it_stand(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    """8 MB at 4 MB/s take 2 s: with 1.5 s to go and another 4 s left, only the first can end."""
    code, seconds = _stopped_at(
        inputs | {"grace_seconds": 7}, tmp_path, "upload", megabytes=8, rate=4
    )
    assert code == 75
    assert seconds < 3, "it does not wait for what cannot end in time"
    lease = _lease(tmp_path)
    assert lease.checkpoints[0].step < (lease.attempt.step or 0)


def test_sigterm_during_the_commit_is_a_commit(inputs: dict[str, Any], tmp_path: Path) -> None:
    code, _ = _stopped_at(inputs, tmp_path, "commit", megabytes=1, rate=100, num_steps=3)
    assert code == 0
    result = Ledger(LocalStore(tmp_path), "s").slot(0).result()
    assert result is not None
    assert result.steps == 3
    check_accounts(Ledger(LocalStore(tmp_path), "s"), 0)


def test_a_small_round_of_the_benchmark_through_the_parent(tmp_path: Path) -> None:
    seen = measure(Case("training", 13, 20, number=signal.SIGINT), tmp_path / "run")
    assert seen.code == 75
    assert seen.seconds < 15
    assert seen.saved_step == seen.step
    assert "SIGINT: ending the trial" in (tmp_path / "run/log").read_text()


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    with small_volume(tmp_path / "small", "size=3m") as folder:
        yield folder


@pytest.mark.parametrize("told_to_end", [False, True], ids=["by itself", "after SIGTERM"])
def test_a_checkpoint_on_a_full_volume_ends_in_74_and_the_one_before_stands(
    inputs: dict[str, Any], tmp_path: Path, volume: Path, told_to_end: bool
) -> None:
    """The first checkpoint (1 MB) fits, the second (8 MB) does not."""
    out = tmp_path / "out"
    given = inputs | {"work_dir": str(volume)}
    if told_to_end:
        given |= {"checkpoint_minutes": 2 / 60}  # no second one is due before the signal
        code, _ = _stopped_at(given, out, "evaluation", megabytes=8, rate=100, eval_seconds=30)
    else:
        training = BigTraining(8, lambda _: None).training()
        store = LocalStore(out)
        code = wait_for(
            start_worker(given | {"output_uri": str(out)}, lambda: store, training=training)
        )
    assert code == 74
    lease = _lease(out)
    assert "JOB_WORK_DIR" in str(lease.attempt.reason)
    assert "No space left" in str(lease.attempt.reason)
    saved = lease.checkpoints[0].step
    assert 0 < saved < (lease.attempt.step or 0)
    kept = out / lease.checkpoints[0].key / "adapter.safetensors"
    assert kept.stat().st_size == len(BLOCK)
    _finish(inputs, out)
    assert _lease(out).attempt.first_step == saved, "the next attempt goes on from there"
