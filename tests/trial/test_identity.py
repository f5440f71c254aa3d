"""A sweep's identity, and a warning of other settings. `pytest tests/trial/test_identity.py`"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from job.errors import SettingsError
from job.ledger.ledger import Ledger
from job.ledger.records import Identity
from job.settings import Settings
from job.store.local import LocalStore
from job.sweep.definition import load_definition
from job.trial.identity import (
    CARD_SWEEP_FILE,
    check_rows,
    sweep_identity,
    warn_of_other_settings,
)


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


@pytest.mark.parametrize("frozen_as", ["out/sweeps/old", None])
@pytest.mark.parametrize("uri", ["out/sweeps/old", "{}/out/sweeps/old", "file://{}/out/sweeps/old"])
def test_a_sweep_goes_on_whichever_way_the_folder_of_its_warm_start_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, frozen_as: str | None
) -> None:
    """Frozen is the absolute path, and was, by an earlier version, what was written."""
    monkeypatch.chdir(tmp_path)
    definition = load_definition(CARD_SWEEP_FILE)
    base: Any = SimpleNamespace(revision="abc", name="base")
    rows: Any = SimpleNamespace(digest="d", vocabulary="v")

    def identity(warm_start_uri: str) -> Identity:
        settings = Settings(dataset_uri="rows", output_uri="out", warm_start_uri=warm_start_uri)
        return sweep_identity(settings, definition, base, rows)

    first = identity("out/sweeps/old")
    assert first.to_json()["JOB_WARM_START_URI"] == f"{tmp_path}/out/sweeps/old"
    ledger = Ledger(LocalStore(tmp_path), "s")
    ledger.open_sweep(first.changed(JOB_WARM_START_URI=frozen_as) if frozen_as else first)
    ledger.check_identity(identity(uri.format(tmp_path)))
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(SettingsError, match="JOB_WARM_START_URI: .* -> .*elsewhere/out/sweeps/old"):
        ledger.check_identity(identity("elsewhere/out/sweeps/old"))


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions", "max_seq_len"])
def test_rows_longer_than_the_base_has_positions_are_refused_with_what_to_set(name: str) -> None:
    def rows(*lengths: int) -> Any:
        return SimpleNamespace(lengths=np.array(lengths), input_ids=np.array([7]))

    base: Any = SimpleNamespace(name="mine", config={name: 512, "vocab_size": 100})
    check_rows(base, SimpleNamespace(train=rows(512, 3), eval=rows(9)))  # type: ignore[arg-type]
    for train, held_out in ((rows(513), rows(9)), (rows(9), rows(513))):
        data: Any = SimpleNamespace(train=train, eval=held_out)
        with pytest.raises(
            SettingsError, match="a row has 513 tokens, but mine knows 512 .* to 512"
        ):
            check_rows(base, data)
    base.config = {}  # ALiBi has no end
    check_rows(base, SimpleNamespace(train=rows(9000), eval=rows(9)))  # type: ignore[arg-type]
