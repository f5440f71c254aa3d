"""The early end of a sweep through the command line. `pytest tests/trial/test_end.py`"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from job.ledger.records import Ended
from tests.ledger.documents import NOW
from tests.objective import NUM_TRIALS, Sweep

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A sweep whose every trial ends at the same loss, run as the pods of an Indexed Job."""
    sweep = Sweep(tmp_path_factory.mktemp("flat"))
    for slot in range(6):
        done = sweep.job(OBJECTIVE="flat", JOB_COMPLETION_INDEX=slot)
        assert done.returncode == 0, done.stderr
    return sweep


def test_a_sweep_ends_where_another_trial_gains_nothing(flat: Sweep) -> None:
    committed = flat.states().count("committed")
    assert 5 <= committed < 7
    assert flat.states() == ["committed"] * committed + ["empty"] * (NUM_TRIALS - committed)
    ended = flat.ledger.ended()
    assert ended is not None
    assert (ended.results, ended.min_gain) == (committed, 0.001)
    assert ended.holds(0.001)


def test_the_pods_that_are_left_end_with_0_before_they_load_anything(flat: Sweep) -> None:
    loads = flat.num_loads()
    for slot in range(6, NUM_TRIALS):
        started = time.monotonic()
        done = flat.job(OBJECTIVE="flat", JOB_COMPLETION_INDEX=slot)
        print(f"slot {slot}: {time.monotonic() - started:.2f} s")
        assert done.returncode == 0
        last = done.stderr.splitlines()[-1]
        assert f"exit 0 (ok): slot {slot}: no new trial is begun, the sweep ended after" in last
        assert "expected to gain 0 nats of eval/loss" in last
        assert "GPU-hours (under a cent at $0.35 an hour); JOB_MIN_GAIN=0 goes on" in last
    assert flat.num_loads() == loads
    assert flat.states()[6:] == ["empty"] * 6


def test_whoever_takes_the_first_open_slot_finds_none(flat: Sweep) -> None:
    done = flat.job(OBJECTIVE="flat")
    assert done.returncode == 0
    assert "sweep s, all 12 slots: no new trial is begun, the sweep ended after" in done.stderr


def test_a_queue_in_an_ended_sweep_ends_with_0(flat: Sweep) -> None:
    done = flat.job("queue", OBJECTIVE="flat", JOB_NUM_TRIALS=8)
    assert done.returncode == 0
    *lines, last = done.stderr.splitlines()
    assert "queue: each of the 8 slots is committed, or its own line says why not" in last
    for slot, state in enumerate(flat.states()[:8]):
        why = "committed before" if state == "committed" else "no new trial is begun, the sweep"
        assert any(f"exit 0 (ok): slot {slot}: {why}" in line for line in lines)


def test_people_see_that_it_ended_and_why(flat: Sweep, tmp_path: Path) -> None:
    status = flat.job("status")
    assert "the sweep ended after" in status.stdout
    told = json.loads(flat.job("status", "--json").stdout)
    assert told["expected_gain_nats"] == 0
    assert told["ended"]["min_gain"] == 0.001
    assert told["trial_usd"] >= 0
    assert "qlora_sweep_expected_gain_nats" in flat.job("status", "--prometheus").stdout
    # Nothing can change any more: it shows the table once and ends.
    watched = flat.job("status", "--watch")
    assert (watched.returncode, watched.stdout.count("sweep s in")) == (0, 1)
    assert flat.job("report", "--output", str(tmp_path)).returncode == 0
    page, short = ((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert "Expected gain of the next trial" in page
    assert "the sweep ended after" in page
    assert "> the sweep ended after" in short
    assert "- expected of another trial: **0 nats**" in short


def test_a_drawn_slot_is_finished_and_one_begun_again_is_run_in_an_ended_sweep(
    flat: Sweep, tmp_path: Path
) -> None:
    assert flat.job("redo", "2").returncode == 0
    before = flat.ledger.slot(2).spec()
    done = flat.job(OBJECTIVE="flat", JOB_COMPLETION_INDEX=2)
    assert "slot 2 committed: completed" in done.stderr
    assert flat.ledger.slot(2).spec() == before, "with the parameters that it was drawn with"
    assert flat.job("redo", "3").returncode == 0
    done = flat.job(OBJECTIVE="flat")  # the first open slot
    assert "slot 3 committed: completed" in done.stderr
    assert flat.ledger.ended() is not None


def test_gc_leaves_the_end_alone(flat: Sweep) -> None:
    assert flat.job("gc").returncode == 0
    assert flat.ledger.ended() is not None


@pytest.fixture(scope="module")
def gone_on(flat: Sweep) -> Sweep:
    """The same sweep after two more of its pods were started with JOB_MIN_GAIN=0."""
    for slot in (6, 7):
        done = flat.job(OBJECTIVE="flat", JOB_COMPLETION_INDEX=slot, JOB_MIN_GAIN=0)
        assert f"slot {slot} committed: completed" in done.stderr
    return flat


def test_a_least_gain_of_0_goes_on(gone_on: Sweep) -> None:
    assert gone_on.states()[6:8] == ["committed"] * 2
    again = gone_on.job(OBJECTIVE="flat", JOB_COMPLETION_INDEX=8)
    assert "slot 8: no new trial is begun" in again.stderr, "without it the end holds again"


def test_a_sweep_that_still_gains_runs_all_its_trials(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    done = sweep.job("queue", OBJECTIVE="rough")
    assert done.returncode == 0, done.stderr
    assert sweep.states() == ["committed"] * NUM_TRIALS
    assert sweep.ledger.ended() is None
    told = json.loads(sweep.job("status", "--json").stdout)
    assert told["expected_gain_nats"] > 0.001
    assert "another trial is expected to gain" in sweep.job("status").stdout


def _ended(**changes: Any) -> Ended:
    values = {"gain": 2e-4, "gain_before": 5e-4, "results": 6, "min_gain": 1e-3, "ended_at": NOW}
    return Ended(**values | changes)


@pytest.mark.parametrize(
    ("min_gain", "holds"), [(1e-3, True), (2e-3, True), (6e-4, True), (5e-4, False), (0.0, False)]
)
def test_an_end_holds_while_both_gains_are_below_the_present_least_gain(
    min_gain: float, holds: bool
) -> None:
    assert _ended().holds(min_gain) is holds
