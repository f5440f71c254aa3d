"""The adapter's card, read as the Hugging Face hub reads it.

`pytest tests/trial/test_model_card.py`
"""

from __future__ import annotations

from dataclasses import replace

import yaml
from huggingface_hub import ModelCard

from job.trial.model_card import Provenance, adapter_card

ORIGIN = Provenance(
    base_model="unsloth/mistral-7b-v0.3-bnb-4bit",
    base_model_revision="0123abcd",
    sweep="card",
    slot=3,
    recipe={"learning_rate": 2e-4, "lora_r": 8, "lr_scheduler": "linear", "eval_steps": [1, 2]},
    data_digest="d" * 64,
    train_rows=12000,
    eval_rows=192,
)


def test_the_hub_reads_base_metric_and_library() -> None:
    data = ModelCard(adapter_card(ORIGIN, eval_loss=1.25, step=900)).data
    assert data.base_model == ORIGIN.base_model
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert data.eval_results is not None
    (result,) = data.eval_results
    assert (result.metric_name, result.metric_value) == ("eval/loss", 1.25)
    assert data.model_name == "card-0003"


def test_a_base_that_is_no_hub_id_stays_out_of_the_metadata() -> None:
    folder = replace(ORIGIN, base_model="/models/base", base_model_revision="sha256:ab")
    text = adapter_card(folder, eval_loss=1.0, step=1)
    assert "base_model" not in yaml.safe_load(text.split("---\n")[1])
    assert "`/models/base`" in text


def test_equal_trials_have_equal_cards() -> None:
    first, second = (adapter_card(ORIGIN, eval_loss=1.0, step=1) for _ in range(2))
    assert first == second


def test_what_counts_is_told() -> None:
    text = adapter_card(ORIGIN, eval_loss=1.25, step=900)
    for word in (
        "1.250000",
        "900 optimizer steps",
        "0123abcd",
        "d" * 64,
        "| rows | 12000 to train on, 192 to judge by |",
        "| lora_r | 8 |",
    ):
        assert word in text
    assert "eval_steps" not in text
    assert "untuned base, in 4 bits" not in text
    measured = adapter_card(ORIGIN, eval_loss=1.25, step=900, untuned=1.5)
    assert "The untuned base, in 4 bits, has 1.500000." in measured


def test_a_pipe_in_a_value_makes_no_further_column() -> None:
    text = adapter_card(replace(ORIGIN, recipe={"schedule": "a|b"}), eval_loss=1.0, step=1)
    assert "| schedule | a\\|b |" in text


def test_the_price_of_4_bits_is_told_where_it_is_known() -> None:
    losses = {"untuned": 1.594, "untuned_16bit": 1.327}
    told = "4 bits cost the untuned base 0.267 nats on these 192 rows (1.594 against 1.327)."
    text = adapter_card(ORIGIN, eval_loss=1.4, step=9, **losses)
    assert told in text.splitlines()
    assert "cost" not in adapter_card(ORIGIN, eval_loss=1.4, step=9, untuned=1.594)
    assert "cost" not in adapter_card(ORIGIN, eval_loss=1.4, step=9, untuned_16bit=1.327)


def test_no_other_precision_is_called_4_bits() -> None:
    whole, some = (
        replace(ORIGIN, recipe={"quantization": mode}) for mode in ("none", "mixed:v_proj")
    )
    text = adapter_card(whole, eval_loss=1.2, step=9, untuned=1.327, untuned_16bit=1.327)
    assert "4 bits" not in text
    assert "The untuned base, in 16 bits, has 1.327000." in text
    text = adapter_card(some, eval_loss=1.3, step=9, untuned=1.5, untuned_16bit=1.327)
    assert "4 bits, v_proj in 16 bits, cost the untuned base 0.173 nats" in text
