"""A sweep file's parameters, mistakes all named: pytest tests/sweep/test_parameters.py"""

import math
from typing import Any, get_args

import pytest

from job.settings import Settings
from job.sweep.distributions import (
    Choice,
    Constant,
    FloatRange,
    IntRange,
    SteppedFloats,
)
from job.sweep.hyperparameters import HYPERPARAMETERS, LR_SCHEDULERS
from tests.sweep.test_definition import RATE, definition, refusal


@pytest.mark.parametrize(
    ("name", "spec", "domain"),
    [
        ("lora_r", {"value": 8}, Constant(8)),
        ("quantization", {"value": "mixed: q_proj,k_proj"}, Constant("mixed:k_proj,q_proj")),
        ("lora_r", {"value": 8, "distribution": "constant"}, Constant(8)),
        ("lora_r", {"values": [16, 8]}, Choice((16, 8))),
        ("lora_r", {"values": [8, 16], "distribution": "categorical"}, Choice((8, 16))),
        (
            "lr_scheduler",
            {"values": ["linear", "cosine"], "probabilities": [0.75, 0.25]},
            Choice(("linear", "cosine"), (0.75, 0.25)),
        ),
        (
            "quantization",
            {"values": ["nf4", "mixed:down_proj,v_proj", "none"]},
            Choice(("nf4", "mixed:v_proj,down_proj", "none")),
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
        ("quantization", {"values": ["nf4", "int8"]}, "is 'int8'; must be nf4, none, mixed, or"),
        ("quantization", {"values": ["mixed:"]}, "is 'mixed:'; must be nf4"),
        ("quantization", {"value": "mixed:v_proj,"}, "is 'mixed:v_proj,'; must be nf4"),
        ("quantization", {"value": 4}, "is 4; must be nf4"),
        ("quantization", {"min": 4, "max": 16}, "cannot be a range: write values"),
        ("warmup_ratio", {"value": 1}, "value: is 1; must be a number from 0 to below 1"),
        ("max_grad_norm", {"value": 0.0}, "value: is 0.0; must be a number above 0"),
    ],
)
def test_value_a_trial_cannot_use_is_refused(name: str, spec: Any, text: str) -> None:
    assert text in refusal(name, spec)


def test_rates_given_to_log_uniform_as_values_are_explained() -> None:
    told = refusal(spec=RATE | {"distribution": "log_uniform"})
    assert "log_uniform takes base-e exponents, log_uniform_values the values themselves" in told


def test_words_are_those_that_the_settings_allow() -> None:
    annotation = Settings.model_fields["lr_scheduler"].annotation
    assert get_args(annotation) == LR_SCHEDULERS


def test_unknown_hyperparameter_names_the_nearest() -> None:
    told = refusal("learning_rat", {"value": 1.0e-4})
    assert "parameters.learning_rat: is not a hyper-parameter of this job" in told
    assert "nearest: learning_rate" in told
    assert all(name in told for name in HYPERPARAMETERS)


def test_nested_parameters_become_dotted_names() -> None:
    told = refusal("optimizer", {"parameters": {"learning_rate": RATE}})
    assert "parameters.optimizer.learning_rate: is nested under another" in told
    assert "nearest: learning_rate" in told
