"""Sweep files are read as W&B reads them, mistakes all named.

`pytest tests/sweep/test_definition.py`
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.errors import ExitCode, SweepError
from job.sweep.definition import SweepDefinition, load_definition, parse_definition
from job.sweep.distributions import (
    Choice,
    FloatRange,
)

SWEEPS = Path(__file__).parents[2] / "job" / "sweep"
METRIC = {"name": "eval/loss", "goal": "minimize"}
RATE = {"distribution": "log_uniform_values", "min": 5.0e-6, "max": 2.0e-4}


def definition(name: str = "learning_rate", /, spec: Any = RATE, **others: Any) -> SweepDefinition:
    base = {"method": "bayes", "metric": METRIC, "parameters": {name: spec}}
    return parse_definition(base | others, where="my.yaml")


def refusal(name: str = "learning_rate", /, spec: Any = RATE, **others: Any) -> str:
    with pytest.raises(SweepError) as caught:
        definition(name, spec=spec, **others)
    return str(caught.value)


@pytest.mark.parametrize(
    ("others", "text"),
    [
        ({"method": "bayesian"}, "method: is 'bayesian'; nearest: bayes; allowed: bayes, random"),
        ({"method": None}, "method: is None; allowed"),
        ({"method": "grid"}, "parameters.learning_rate: a grid needs countable values"),
        ({"metric": {"name": "train/loss"}}, "metric.name: is 'train/loss'; must be eval/loss"),
        ({"metric": METRIC | {"goal": "maximize"}}, "metric.goal: is 'maximize'; must be minimize"),
        ({"metric": METRIC | {"gaol": "x"}}, "metric.gaol: is not a key; nearest: goal"),
        ({"metric": METRIC | {"target": 1.0}}, "metric.target: is not supported"),
        ({"metric": None}, "metric: must be a mapping: name: eval/loss"),
        ({"paramters": {}}, "paramters: is not a key; nearest: parameters"),
        ({"metrics": []}, "metrics: is not supported"),
        ({"parameters": {}}, "parameters: must be a mapping of at least one"),
        ({"name": "my sweep"}, "name: 'my sweep' names a folder"),
        ({"name": "../x"}, "name: '../x' names a folder"),
        ({"name": 2026}, "name: 2026 names a folder"),
        ({"run_cap": 0}, "run_cap: is 0; must be a whole number above 0"),
        ({"description": math.nan}, "cannot be kept as JSON"),
        ({"early_terminate": {"type": "envelope"}}, "must be a mapping with type: hyperband"),
        ({"early_terminate": {"type": "hyperband"}}, "needs min_iter, or max_iter and s"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 27}}, "needs min_iter, or max_iter"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 0}}, "min_iter: is 0; must be"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 1}}, "eta: is 1; must be"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 2, "s": 2}}, "leaves no bracket"),
        ({"early_terminate": {"type": "hyperband", "min_itr": 3}}, "nearest: min_iter"),
    ],
)
def test_mistake_at_the_top_is_named(others: dict[str, Any], text: str) -> None:
    assert text in refusal(**others)


def test_every_mistake_is_told_at_once_and_ends_with_64() -> None:
    with pytest.raises(SweepError) as caught:
        parse_definition(
            {
                "method": "bayse",
                "metric": {"name": "loss"},
                "parameters": {"lora_rank": {"value": 8}, "lora_r": {"vales": [8]}},
                "run_cap": -1,
            },
            where="my.yaml",
        )
    lines = str(caught.value).split("\n")
    assert len(lines) == 5
    assert all(line.startswith("my.yaml: ") for line in lines)
    assert caught.value.exit_code is ExitCode.SETTINGS


def test_keys_of_wandb_that_do_not_matter_are_accepted() -> None:
    ignored = {"program": "train.py", "command": ["${env}"], "project": "p", "entity": "e"}
    read = definition(description="d", name="n-1.0_x", run_cap=5, kind="sweep", **ignored)
    assert (read.name, read.run_cap) == ("n-1.0_x", 5)


def test_metric_may_be_left_out_where_nothing_uses_it() -> None:
    read = parse_definition({"method": "random", "parameters": {"learning_rate": RATE}})
    assert (read.metric_name, read.metric_goal) == ("eval/loss", "minimize")


def test_definition_survives_the_bucket() -> None:
    for path in SWEEPS.glob("*.yaml"):
        read = load_definition(path)
        for sort_keys in (False, True):
            text = json.dumps(read.to_json(), sort_keys=sort_keys)
            assert parse_definition(json.loads(text)) == read


def test_changing_the_json_does_not_change_the_definition() -> None:
    read = definition()
    read.to_json()["parameters"]["learning_rate"]["min"] = 1.0e-6
    assert read.to_json()["parameters"]["learning_rate"] == RATE


def test_the_cards_sweep_is_the_card() -> None:
    card = load_definition(SWEEPS / "sweep.yaml")
    assert (card.name, card.method, card.early_terminate) == ("card", "bayes", None)
    assert card.parameters == {
        "learning_rate": FloatRange(5.0e-6, 2.0e-4, log=True),
        "gradient_accumulation_steps": Choice((4, 8)),
        "lora_dropout": Choice((0.05, 0.1)),
        "weight_decay": Choice((0.01, 0.05)),
    }


def test_the_wide_sweep_adds_rank_and_alpha_to_the_cards() -> None:
    card, wide = (load_definition(SWEEPS / f"{name}.yaml") for name in ("sweep", "sweep-wide"))
    assert wide.name == "wide"
    assert dict(wide.parameters) == dict(card.parameters) | {
        "learning_rate": FloatRange(3.0e-5, 1.0e-3, log=True),
        "lora_r": Choice((8, 16, 32)),
        "lora_alpha": Choice((16, 32)),
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("method: [", "is not YAML"),
        ("", "must be a mapping with method"),
        ("- 1", "must be a mapping with method"),
        ("a: &a {b: *a}", "a: is not a key"),
        ("method: bayes\nmethod: grid", "method: stands twice, on line 2 too"),
        ("created: 2026-01-01", "created: is not a key"),
    ],
)
def test_file_that_is_not_a_sweep_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(SweepError, match="s.yaml") as caught:
        load_definition(tmp_path / "s.yaml")
    assert told in str(caught.value)


def test_missing_or_binary_file_is_a_sweep_error(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="cannot be read: No such file"):
        load_definition(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SweepError, match="is not YAML"):
        load_definition(tmp_path / "b.yaml")


@pytest.mark.parametrize("text", ["5e-6", "5.e-6", ".5e6", "1E3", "-2e+1", "7", "0.25", "+3.5"])
def test_advice_on_numbers_is_read_as_a_number_by_yaml(text: str) -> None:
    told = refusal(spec=RATE | {"min": text})
    advice = told.split("write ")[1]
    assert yaml.safe_load(advice) == float(text)


@pytest.mark.parametrize("name", ["My first sweep", "größe", "../x"])
def test_a_name_that_names_no_folder_is_any_text(tmp_path: Path, name: str) -> None:
    mapping = {"name": name, "method": "random", "parameters": {"lora_r": {"values": [8, 16]}}}
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps(mapping), encoding="utf-8")
    read = load_definition(path, free_name=True)
    assert read.name == name
    assert parse_definition(read.to_json(), free_name=True) == read
    with pytest.raises(SweepError, match="or set JOB_SWEEP_NAME"):
        load_definition(path)
