"""Rows from a history file, parameters from a server, paths of sweeps. No W&B, no torch.

`pytest tests/wandb/test_rows.py`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job.errors import SettingsError
from job.settings import Settings
from job.sweep.definition import parse_definition
from job.wandb.rows import Rows
from job.wandb.sweeps import check_params, sweep_path

DEFINITION = parse_definition(
    {
        "method": "random",
        "parameters": {"learning_rate": {"min": 1e-4, "max": 1e-2}, "lora_r": {"values": [8, 16]}},
    }
)


def _write(path: Path, *entries: dict[str, Any], end: str = "\n") -> None:
    with path.open("a") as file:
        file.write("\n".join(json.dumps(entry) for entry in entries) + end)


def _step(step: int) -> dict[str, Any]:
    return {"step": step, "train/loss": 2.0, "learning_rate": 1e-4, "tokens": 30, "seconds": 0.5}


def test_a_row_is_sent_only_when_nothing_can_be_added_to_it(tmp_path: Path) -> None:
    path, rows = tmp_path / "history.jsonl", Rows()
    rows.read(path)
    assert list(rows.after(-1)) == [], "the file is not there yet"
    _write(path, {"step": 0, "eval/loss": 3.0}, _step(1))
    rows.read(path)
    assert [step for step, _ in rows.after(-1)] == [0]
    _write(path, {"step": 1, "eval/loss": 1.5}, _step(2))
    rows.read(path)
    ((step, row),) = rows.after(0)
    assert step == 1
    assert row == {
        "train/loss": 2.0, "learning_rate": 1e-4, "tokens_per_second": 60.0, "eval/loss": 1.5,
    }  # fmt: skip
    rows.is_whole = True
    assert [step for step, _ in rows.after(-1)] == [0, 1, 2]
    assert len(rows) == 3


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    path, rows = tmp_path / "history.jsonl", Rows()
    _write(path, _step(1), _step(2), end="")
    rows.read(path)
    _write(path, end="\n")
    rows.read(path)
    rows.is_whole = True
    assert [step for step, _ in rows.after(-1)] == [1, 2]


def test_a_loss_that_overflowed_is_left_out(tmp_path: Path) -> None:
    path, rows = tmp_path / "history.jsonl", Rows()
    _write(path, _step(1) | {"train/loss": None}, {"step": 1, "eval/loss": None}, _step(2))
    rows.read(path)
    ((_, row),) = rows.after(0)
    assert set(row) == {"learning_rate", "tokens_per_second"}


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"learning_rate": 1e-3, "lora_r": 8}, None),
        ({"learning_rate": 1e-3}, "lora_r is missing"),
        ({"learning_rate": 0.5, "lora_r": 8}, "learning_rate is 0.5"),
        ({"learning_rate": "1e-3", "lora_r": 8}, "learning_rate is '1e-3'"),
        ({"learning_rate": 1e-3, "lora_r": 12}, "lora_r is 12"),
        ({"learning_rate": 1e-3, "lora_r": 8, "seed": 1}, "seed is not a parameter"),
    ],
)
def test_parameters_from_the_server_are_checked(params: dict[str, Any], says: str | None) -> None:
    if says is None:
        check_params(DEFINITION, params)
        return
    with pytest.raises(SettingsError, match=says):
        check_params(DEFINITION, params)


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("abc123", "qlora-sweep/abc123"),
        ("mine/abc123", "mine/abc123"),
        ("team/mine/abc123", "team/mine/abc123"),
        ("a/b/c/d", None),
        ("../abc", None),
        ("team//abc", None),
        ("https://wandb.ai/team/mine/sweeps/abc", None),
    ],
)
def test_the_ways_to_name_a_sweep(
    monkeypatch: pytest.MonkeyPatch, given: str, path: str | None
) -> None:
    for name in ("WANDB_ENTITY", "WANDB_PROJECT", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SWEEP_ID", given)
    settings = Settings(dataset_uri="rows.jsonl", output_uri="out")
    if path is None:
        with pytest.raises(SettingsError, match="WANDB_SWEEP_ID"):
            sweep_path(settings)
    else:
        assert str(sweep_path(settings)) == path
