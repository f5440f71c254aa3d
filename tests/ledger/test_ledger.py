"""The ledger: identity, specs and commits, each written once.

`pytest tests/ledger/test_ledger.py`
"""

from __future__ import annotations

from pathlib import Path

import pytest

from job.errors import SettingsError, SlotError
from job.ledger.ledger import Ledger
from job.store.local import LocalStore
from job.trial.slots import open_slots

IDENTITY = {"JOB_MAX_STEPS": 1500, "JOB_SWEEP_FILE": {"method": "bayes"}, "_code_version": "1"}
SPEC: dict[str, object] = {"params": {}, "recipe": {}}
RESULT = {"status": "completed", "eval_loss": 1.5}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(LocalStore(tmp_path), "card")


def test_the_first_trial_freezes_the_identity(ledger: Ledger) -> None:
    assert ledger.identity() is None
    ledger.open_sweep(IDENTITY)
    ledger.open_sweep({**IDENTITY, "_code_version": "2"})  # information is not compared
    identity = ledger.identity()
    assert identity is not None
    assert identity["_code_version"] == "1"


def test_every_differing_setting_is_named_old_to_new(ledger: Ledger) -> None:
    ledger.open_sweep(IDENTITY)
    with pytest.raises(SettingsError) as caught:
        ledger.open_sweep(
            {"JOB_MAX_STEPS": 900, "JOB_SWEEP_FILE": {"method": "random"}, "JOB_SEED": 3}
        )
    assert str(caught.value).splitlines()[1:4] == [
        "  JOB_MAX_STEPS: 1500 -> 900",
        "  JOB_SEED: not set -> 3",
        "  JOB_SWEEP_FILE.method: bayes -> random",
    ]
    assert "JOB_SWEEP_NAME" in str(caught.value)


def test_a_slot_keeps_its_first_spec(ledger: Ledger) -> None:
    assert ledger.state(3) == "empty"
    assert ledger.specify(3, {**SPEC, "params": {"learning_rate": 1}})["params"] == {
        "learning_rate": 1
    }
    assert ledger.specify(3, {**SPEC, "params": {"learning_rate": 2}})["params"] == {
        "learning_rate": 1
    }
    assert ledger.state(3) == "specified"


def test_second_committer_loses_without_effect(ledger: Ledger) -> None:
    ledger.specify(0, SPEC)
    assert ledger.commit(0, RESULT)
    assert not ledger.commit(0, {**RESULT, "eval_loss": 1.0})
    result = ledger.result(0)
    assert result is not None
    assert result["eval_loss"] == 1.5
    assert ledger.state(0) == "committed"


def test_a_slot_is_open_until_it_is_committed_or_given_up(ledger: Ledger) -> None:
    ledger.commit(0, RESULT)
    ledger.specify(1, SPEC)
    ledger.close(2, "no progress")
    assert open_slots(ledger, 5) == [1, 3, 4]
    assert [ledger.state(slot) for slot in range(4)] == [
        "committed", "specified", "failed", "empty",
    ]  # fmt: skip


def test_two_sweeps_share_a_bucket(ledger: Ledger) -> None:
    other = Ledger(ledger.store, "wide")
    ledger.commit(0, RESULT)
    assert other.result(0) is None


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"{}", b"\xff\xfe"])
def test_a_damaged_result_is_an_error_and_never_open(ledger: Ledger, body: bytes) -> None:
    ledger.store.put_if_absent(f"{ledger.slot_prefix(0)}/result.json", body)
    with pytest.raises(SlotError, match=r"slots/0000/result\.json.*damaged"):
        open_slots(ledger, 1)


def test_what_is_behind_other_rows_is_named(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    rows = {"JOB_SUBSAMPLE_FRACTION": 0.15, "JOB_MAX_SEQ_LENGTH": 1024}
    ledger.check_identity({"JOB_DATASET_URI": {"prepared": "a"}})  # not begun: nothing to compare
    ledger.open_sweep({"JOB_DATASET_URI": {"prepared": "a"}, "_rows": rows})
    ledger.check_identity({"JOB_DATASET_URI": {"prepared": "a"}, "_rows": {}})
    other = {"JOB_DATASET_URI": {"prepared": "b"}, "_rows": rows | {"JOB_SUBSAMPLE_FRACTION": 0.1}}
    with pytest.raises(SettingsError) as caught:
        ledger.open_sweep(other)
    assert "JOB_SUBSAMPLE_FRACTION: 0.15 -> 0.1" in str(caught.value)
    assert "JOB_MAX_SEQ_LENGTH" not in str(caught.value)
