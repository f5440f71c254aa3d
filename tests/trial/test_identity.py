"""A sweep's identity, and a warning of other settings. `pytest tests/trial/test_identity.py`"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.ledger.ledger import Ledger
from job.settings import Settings
from job.store.local import LocalStore
from job.sweep.definition import load_definition
from job.trial.identity import CARD_SWEEP_FILE, sweep_identity, warn_of_other_settings


def test_a_finished_sweep_says_what_it_was_not_made_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    given: dict[str, Any] = {"dataset_uri": "rows.jsonl", "output_uri": str(tmp_path)}
    made, definition = Settings(**given), load_definition(CARD_SWEEP_FILE)
    base: Any = SimpleNamespace(revision="abc", name=made.base_model)
    rows: Any = SimpleNamespace(digest="d", vocabulary="v")
    ledger.open_sweep(sweep_identity(made, definition, base, rows))
    warn_of_other_settings(made, definition, ledger)
    assert not caplog.records
    other = Settings(**given | {"dataset_uri": "more.jsonl", "seed": 99, "base_model": "mine"})
    warn_of_other_settings(other, definition, ledger)
    for line in (
        "JOB_SEED: 17 -> 99",
        "JOB_DATASET_URI: rows.jsonl -> more.jsonl",
        f"JOB_BASE_MODEL: {made.base_model} -> mine",
    ):
        assert line in caplog.text
    assert "JOB_MAX_STEPS" not in caplog.text
