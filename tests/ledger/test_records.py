"""Documents as records: what is kept, what is refused, and in which words.

`pytest tests/ledger/test_records.py`
"""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from job.ledger.accounts import FRESH, taken_over
from job.ledger.records import Identity, Lease, Record, Result, Spec, damage
from tests.ledger.documents import make_identity, make_lease, make_recipe, make_result, make_spec


@pytest.mark.parametrize(
    "record",
    [make_spec(), make_result(), make_lease(), make_identity(), taken_over(FRESH, "o"),
     make_result(eval_loss=None)],
    ids=["spec", "result", "lease", "identity", "a lease just taken", "a result without adapter"],
)  # fmt: skip
def test_a_record_comes_back_as_it_was_written(record: Record) -> None:
    again = type(record).model_validate(record.to_json())
    assert again == record
    assert again.to_json() == record.to_json()


def test_only_the_keys_that_were_given_are_written() -> None:
    lease = make_lease()
    assert set(lease.to_json()) == {"owner", "epoch", "state"}
    assert set(lease.changed(beat=1).to_json()) == {"owner", "epoch", "state", "beat"}
    assert lease.fruitless == 0, "what a key stood for before it came"


def test_a_number_stays_as_it_was_written() -> None:
    recipe = make_recipe(lora_alpha=16, warmup_ratio=0.0)
    assert str(recipe.to_json()["lora_alpha"]) == "16", "the adapter's card shows it so"
    assert str(make_recipe(lora_alpha=16.0).to_json()["lora_alpha"]) == "16.0"
    spec = make_spec(params={"lora_r": 8, "learning_rate": 1e-4, "lr_scheduler": "linear"})
    assert list(map(type, spec.params.values())) == [int, float, str]


def test_keys_of_a_newer_version_outlive_a_renewal_and_a_takeover_of_this_one() -> None:
    """An older worker beside a newer one must not destroy what it does not know."""
    found = Lease.model_validate(
        make_lease().to_json()
        | {"later": [1], "attempt": {"later": 2}, "checkpoints": [_checkpoint() | {"later": 3}]}
    )
    renewed = found.changed(beat=7, attempt=found.attempt.changed(step=5)).to_json()
    assert (renewed["later"], renewed["attempt"]) == ([1], {"later": 2, "step": 5})
    taken = taken_over(found, "next").to_json()
    assert (taken["later"], taken["checkpoints"][0]["later"]) == ([1], 3)


def _checkpoint(**changes: Any) -> dict[str, Any]:
    return {"key": "a/b", "sha256": "0", "step": 1, "best": None} | changes


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (Spec, {"recipe": {}}, "recipe.learning_rate: field required (and 13 more)"),
        (Spec, {"params": {"lora_r": None}}, "params.lora_r"),
        (Spec, {"wandb_sweep": "one/two"}, "wandb_sweep: string should match"),
        (Spec, {"created_at": "yesterday"}, "created_at: invalid isoformat string: 'yesterday'"),
        (Spec, {"created_at": "2026-01-02T03:04:05"}, "created_at: should have a time zone"),
        (Result, {"status": "won"}, "status: should be 'completed', 'truncated', 'stopped'"),
        (Result, {"adapter_sha256": None}, "it has an adapter, but not its adapter_sha256"),
        (Result, {"eval_loss": None}, "it has an adapter, but not its adapter_sha256"),
        (Result, {"curve": [[1]]}, "curve.0.1: field required"),
        (Result, {"steps": -1}, "steps: should be greater than or equal to 0"),
        (Result, {"adapter_key": "../../x"}, "adapter_key: not a store key: '../../x'"),
        (Lease, {"attempt": []}, "attempt: should be a valid dictionary"),
        (Lease, {"checkpoints": [{}]}, "checkpoints.0.key: field required (and 3 more)"),
        (Lease, {"epoch": "second"}, "epoch: should be a valid integer"),
        (Lease, {"state": "lost"}, "state: should be 'held' or 'released'"),
        (Lease, {"gpu_seconds_before": float("inf")}, "gpu_seconds_before: should be a finite"),
        (Identity, {"JOB_DATASET_URI": "rows.jsonl"}, "JOB_DATASET_URI: should be a valid dict"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_the_key_is_named(
    kind: type[Record], changes: dict[str, Any], words: str
) -> None:
    makers: dict[type[Record], Any] = {
        Spec: make_spec, Result: make_result, Lease: make_lease, Identity: make_identity,
    }  # fmt: skip
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(makers[kind]().to_json() | changes)
    assert damage(caught.value).startswith(words)


def test_a_change_is_checked_like_a_new_record() -> None:
    with pytest.raises(ValidationError):
        make_result().changed(steps="all")
    with pytest.raises(ValidationError):
        make_recipe(eval_steps=("last",))


def test_information_is_no_part_of_what_an_identity_compares() -> None:
    identity = make_identity(JOB_SEED=17, _code_version="1", _rows={"JOB_MAX_SEQ_LENGTH": 9})
    assert set(identity.compared()) == {
        "JOB_SEED", "JOB_DATASET_URI", "JOB_QUANTIZATION",
    }  # fmt: skip
    assert identity.rows == {"JOB_MAX_SEQ_LENGTH": 9}
