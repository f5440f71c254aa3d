"""Sweep files are read as W&B reads them, mistakes all named: pytest tests/test_definition.py"""

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
    Constant,
    FloatRange,
    IntRange,
    SteppedFloats,
    contains,
    nearest,
    num_points,
    point,
    quantile,
)
from job.sweep.hyperband import Hyperband, brackets, should_stop
from job.sweep.hyperparameters import HYPERPARAMETERS

SWEEPS = Path(__file__).parents[1] / "job" / "sweep"
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
    ("name", "spec", "domain"),
    [
        ("lora_r", {"value": 8}, Constant(8)),
        ("lora_r", {"value": 8, "distribution": "constant"}, Constant(8)),
        ("lora_r", {"values": [16, 8]}, Choice((16, 8))),
        ("lora_r", {"values": [8, 16], "distribution": "categorical"}, Choice((8, 16))),
        (
            "lr_scheduler",
            {"values": ["linear", "cosine"], "probabilities": [0.75, 0.25]},
            Choice(("linear", "cosine"), (0.75, 0.25)),
        ),
        ("lora_r", {"min": 8, "max": 32}, IntRange(8, 32)),
        ("lora_r", {"min": 8, "max": 32, "distribution": "int_uniform"}, IntRange(8, 32)),
        ("lora_dropout", {"min": 0, "max": 0.5}, FloatRange(0.0, 0.5)),
        ("lora_alpha", {"min": 1, "max": 9, "distribution": "uniform"}, FloatRange(1.0, 9.0)),
        (
            "lora_dropout",
            {"min": 0.0, "max": 0.15, "q": 0.05, "distribution": "q_uniform"},
            SteppedFloats(0.0, 0.15, 0.05),
        ),
        ("lora_r", {"min": 8, "max": 32, "q": 8, "distribution": "q_uniform"}, IntRange(8, 32, 8)),
        ("learning_rate", RATE, FloatRange(5.0e-6, 2.0e-4, log=True)),
        (
            "learning_rate",
            {"min": -12, "max": -8.5, "distribution": "log_uniform"},
            FloatRange(math.exp(-12), math.exp(-8.5), log=True),
        ),
        (
            "lora_r",
            {"min": 4, "max": 64, "q": 1, "distribution": "q_log_uniform_values"},
            IntRange(4, 64, log=True),
        ),
        (
            "lora_r",
            {"min": 4, "max": 64, "distribution": "q_log_uniform_values"},
            IntRange(4, 64, log=True),
        ),
    ],
)
def test_every_distribution_is_read_as_wandb_reads_it(name: str, spec: Any, domain: Any) -> None:
    assert definition(name, spec).parameters == {name: domain}


@pytest.mark.parametrize(
    "name",
    [
        *("normal", "log_normal", "q_normal", "q_log_normal", "beta", "q_beta"),
        *("inv_log_uniform", "inv_log_uniform_values", "q_log_uniform"),
    ],
)
def test_other_distributions_are_refused_by_name(name: str) -> None:
    text = refusal(spec={"distribution": name, "min": 0.1, "max": 0.2})
    assert f"parameters.learning_rate.distribution: '{name}' is not supported" in text
    assert "allowed: constant, categorical" in text


def test_misspelt_distribution_names_the_nearest() -> None:
    assert "nearest: log_uniform_values" in refusal(spec=RATE | {"distribution": "loguniform_val"})


@pytest.mark.parametrize(
    ("name", "spec", "text"),
    [
        ("learning_rate", RATE | {"min": "5e-6"}, "min: is the text '5e-6': write 5.0e-6"),
        ("learning_rate", RATE | {"max": "2E4"}, "max: is the text '2E4': write 2.0e+4"),
        ("learning_rate", {"values": ["1e-4"]}, "values: is the text '1e-4': write 1.0e-4"),
        ("weight_decay", {"value": "0.1"}, "value: is the text '0.1': write 0.1"),
        ("learning_rate", RATE | {"min": "low"}, "min: is 'low', not a number"),
        ("learning_rate", RATE | {"min": math.nan}, "min: is nan, not a number"),
        ("learning_rate", RATE | {"min": True}, "min: is True, not a number"),
        ("learning_rate", RATE | {"min": 3.0e-4}, "min 0.0003 is not below max 0.0002"),
        ("learning_rate", RATE | {"min": 2.0e-4}, "min 0.0002 is not below max 0.0002"),
        ("learning_rate", RATE | {"min": 0}, "min: is 0: log_uniform_values needs a min above 0"),
        ("lora_r", {"values": []}, "values: is []: write a list of at least one"),
        ("lora_r", {"values": [8, 16, 8]}, "8 stands there twice"),
        ("lora_r", {"values": [8, 8.0]}, "8.0 stands there twice"),
        ("lora_r", {"values": [8, [16]]}, "values: is [16]; must be a whole number"),
        ("lora_r", {"values": [8, 16], "probabilities": [1.0]}, "must be a list of 2 numbers"),
        ("lora_r", {"values": [8, 16], "probabilities": [0.5, 0.6]}, "above 0 and sum to 1"),
        ("lora_r", {"values": [8, 16], "probabilities": [0, 1]}, "above 0 and sum to 1"),
        ("lora_r", {}, "says no value: give value, values, or min and max"),
        ("lora_r", {"min": 8}, "says no value: give value, values, or min and max"),
        ("lora_r", {"vales": [8]}, "vales is not a key; nearest: values"),
        ("lora_r", {"values": [8], "maximum": 9}, "maximum: is not a key; nearest: max"),
        ("lora_r", {"value": 8, "max": 9}, "max: does not go with constant, which takes value"),
        ("lora_r", {"min": 8, "max": 9, "q": 1}, "q: goes with distribution: q_uniform or"),
        ("lora_r", {"distribution": "q_uniform", "max": 9}, "min: is missing: q_uniform needs min"),
        ("lora_r", 8, "is 8, not a mapping: write value: 8 under it"),
        ("lora_r", [8, 16], "is [8, 16], not a mapping: write values: [8, 16] under it"),
        (
            "lora_r",
            {"distribution": "int_uniform", "min": 8, "max": 9.5},
            "int_uniform needs ints: write min 8 and max 9.5 without a point",
        ),
        (
            "lora_r",
            {"distribution": "q_uniform", "min": 8, "max": 30, "q": 8},
            "min 8 and max 30 must be multiples of q, 8",
        ),
        (
            "lora_r",
            {"distribution": "q_log_uniform_values", "min": 8, "max": 32, "q": 8},
            "q: is 8: q_log_uniform_values is supported with q: 1 only",
        ),
        (
            "lora_dropout",
            {"distribution": "q_uniform", "min": 0.0, "max": 0.9, "q": 1.0e-7},
            "gives too many values: 10000 at most",
        ),
        ("learning_rate", {"distribution": "log_uniform", "min": -800, "max": -8}, "-700 and 700"),
    ],
)
def test_mistake_in_a_parameter_is_named(name: str, spec: Any, text: str) -> None:
    told = refusal(name, spec)
    assert told.startswith(f"my.yaml: parameters.{name}")
    assert text in told
    assert "\n" not in told, "one mistake, one line"


@pytest.mark.parametrize(
    ("name", "spec", "text"),
    [
        ("learning_rate", {"value": 0}, "value: is 0; must be a number above 0 and below 1"),
        ("gradient_accumulation_steps", {"values": [0, 4]}, "values: is 0; must be a whole number"),
        ("gradient_accumulation_steps", {"values": [4.0]}, "values: is 4.0; must be a whole"),
        ("gradient_accumulation_steps", {"value": True}, "value: is True; must be a whole number"),
        ("lora_dropout", {"min": 0.0, "max": 1.0}, "max: gives 1.0; must be a number from 0 to"),
        ("weight_decay", {"min": -0.1, "max": 0.1}, "min: gives -0.1; must be a number from 0"),
        ("lora_r", {"min": 0.5, "max": 8.5}, "uniform gives fractions: write values or int_"),
        ("lora_alpha", {"values": [0, 16]}, "values: is 0; must be a number above 0"),
        ("lr_scheduler", {"values": ["polynomial"]}, "must be one of linear, cosine, constant"),
        ("lr_scheduler", {"min": 0, "max": 1}, "cannot be a range: write values"),
        ("warmup_ratio", {"value": 1}, "value: is 1; must be a number from 0 to below 1"),
        ("max_grad_norm", {"value": 0.0}, "value: is 0.0; must be a number above 0"),
    ],
)
def test_value_a_trial_cannot_use_is_refused(name: str, spec: Any, text: str) -> None:
    assert text in refusal(name, spec)


def test_rates_given_to_log_uniform_as_values_are_explained() -> None:
    told = refusal(spec=RATE | {"distribution": "log_uniform"})
    assert "log_uniform takes base-e exponents, log_uniform_values the values themselves" in told


def test_unknown_hyperparameter_names_the_nearest() -> None:
    told = refusal("learning_rat", {"value": 1.0e-4})
    assert "parameters.learning_rat: is not a hyper-parameter of this job" in told
    assert "nearest: learning_rate" in told
    assert all(name in told for name in HYPERPARAMETERS)


def test_nested_parameters_become_dotted_names() -> None:
    told = refusal("optimizer", {"parameters": {"learning_rate": RATE}})
    assert "parameters.optimizer.learning_rate: is nested under another" in told
    assert "nearest: learning_rate" in told


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


def test_points_of_a_stepped_range_are_written_as_a_person_would() -> None:
    steps = SteppedFloats(0.0, 0.3, 0.05)
    assert [point(steps, i) for i in range(num_points(steps) or 0)] == [
        *(0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
    ]


def test_quantiles_follow_the_probabilities() -> None:
    weighted = Choice(("linear", "cosine"), (0.75, 0.25))
    drawn = [quantile(weighted, i / 100) for i in range(100)]
    assert drawn.count("linear") == 75
    log = FloatRange(1.0e-6, 1.0e-2, log=True)
    assert quantile(log, 0.5) == pytest.approx(1.0e-4)
    assert {quantile(IntRange(1, 3), i / 9) for i in range(9)} == {1, 2, 3}
    log_ints = [quantile(IntRange(1, 4, log=True), i / 1000) for i in range(1000)]
    assert [log_ints.count(n) for n in (1, 2, 3, 4)] == [500, 233, 153, 114]  # ln 3 / ln 9, …


@pytest.mark.parametrize(
    ("domain", "value", "expected"),
    [
        (FloatRange(0.0, 0.5), 0.7, 0.5),
        (FloatRange(0.0, 0.5), None, 0.0),
        (IntRange(8, 32, 8), 19, 16),
        (IntRange(8, 32, 8), 100, 32),
        (SteppedFloats(0.0, 0.15, 0.05), 0.12, 0.1),
        (Choice((32, 8)), 8.0, 8),
        (Choice((32, 8)), 16, 8),
        (Choice(("cosine", "constant")), "linear", "cosine"),
        (Constant(0.2), 0.1, 0.2),
    ],
)
def test_nearest_is_spelt_as_the_domain_spells_it(domain: Any, value: Any, expected: Any) -> None:
    found = nearest(domain, value)
    assert (found, type(found)) == (expected, type(expected))
    assert contains(domain, found)


def test_brackets_are_wandbs() -> None:
    assert brackets(Hyperband(min_iter=3), up_to=80) == [3, 9, 27]
    assert brackets(Hyperband(max_iter=27, s=2), up_to=80) == [3, 9]
    assert brackets(Hyperband(max_iter=27, s=9), up_to=80) == [1, 3, 9]
    assert brackets(Hyperband(min_iter=1, eta=1.5), up_to=6) == [1, 1, 2, 3, 5]


def test_bottom_of_a_bracket_is_stopped_and_the_best_third_goes_on() -> None:
    rule = Hyperband(min_iter=2, eta=3)
    histories = [[2.0, 1.0 + i / 10] for i in range(6)]
    stopped = [
        should_stop(rule, own, [other for other in histories if other is not own])
        for own in histories
    ]
    assert stopped == [False, False, False, True, True, True]  # W&B lets the threshold itself pass


def test_nothing_is_stopped_before_the_first_bracket_alone_or_without_a_rule() -> None:
    rule = Hyperband(min_iter=2)
    assert not should_stop(rule, [9.0], [[1.0, 1.0]] * 5)
    assert not should_stop(rule, [9.0, 9.0], [])
    assert not should_stop(None, [9.0, 9.0], [[1.0, 1.0]] * 5)
    assert should_stop(rule, [9.0, math.nan, 9.0], [[1.0, 1.0]] * 5)


def test_without_strict_a_trial_is_judged_by_its_best_loss() -> None:
    others = [[1.5, 1.5]] * 5
    assert should_stop(Hyperband(min_iter=2), [1.0, 2.0], others)
    assert not should_stop(Hyperband(min_iter=2, strict=False), [1.0, 2.0], others)


def test_hyperband_is_read_with_wandbs_defaults() -> None:
    read = definition(early_terminate={"type": "hyperband", "max_iter": 27, "s": 2})
    assert read.early_terminate == Hyperband(max_iter=27, s=2, eta=3.0, strict=True)
