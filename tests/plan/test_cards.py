"""Kinds of card compared by their prices. `pytest tests/plan/test_cards.py`"""

from __future__ import annotations

from typing import Any

import pytest

from job.errors import SettingsError
from job.plan.cards import CARDS, Price, describe_offers, offers, read_prices
from job.plan.forecast import Workload, throughput_on_a_t4
from job.report.overview import Overview, SlotView
from job.training.shape import ModelShape, model_shape

CONFIG = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "vocab_size": 32000,
}  # fmt: skip
WORK = Workload(steps=1500, train_tokens=3_000_000, eval_tokens=400_000)


def _shape() -> ModelShape:
    shape = model_shape(CONFIG)
    assert shape is not None
    return shape


def _overview(**speeds: float) -> Overview:
    views = [
        SlotView(
            slot, "completed", eval_loss=1.0, tokens_per_second=speed, gpu=gpu.replace("_", " ")
        )
        for slot, (gpu, speed) in enumerate(speeds.items())
    ]
    return Overview("s", "/out", None, tuple(views))


def _offers(*prices: Price, **speeds: float) -> list[Any]:
    return offers(prices, _overview(**speeds), throughput_on_a_t4(_shape(), "all"), [WORK], "all")


def test_prices_are_read() -> None:
    assert read_prices(["t4=0.15", " L4=.28"]) == [Price("t4", 0.15), Price("l4", 0.28)]


@pytest.mark.parametrize(
    "text", ["t4", "t4=", "=1", "t4=-1", "t4=1e9x", "t4=$1", "a b=1", "t4=nan"]
)
def test_what_is_no_price_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"plan: --price is .* allowed: CARD=DOLLARS"):
        read_prices([text])


def test_a_t4_is_as_the_plan_forecasts_it() -> None:
    (offer,) = _offers(Price("t4", 0.15))
    assert offer.throughput == throughput_on_a_t4(_shape(), "all")
    low, high = offer.usd(12)
    assert low == pytest.approx(12 * offer.trial.short / 3600 * 0.15)
    assert low < high


def test_another_card_lies_between_its_two_published_ratios_and_is_told_as_not_measured() -> None:
    (t4,), (l4,) = _offers(Price("t4", 1)), _offers(Price("l4", 1))
    assert l4.throughput.slow == pytest.approx(t4.throughput.slow * 300 / 320)
    assert l4.throughput.fast == pytest.approx(t4.throughput.fast * 121 / 65)
    assert l4.throughput.basis.endswith("by data sheets; not measured")


def test_a_measured_card_is_believed_and_cards_are_not_mixed_up() -> None:
    measured = {"Tesla_T4": 350.0, "NVIDIA_L40S": 2000.0}
    l4, t4 = _offers(Price("l4", 1e-6), Price("t4", 1), **measured)
    assert t4.throughput.basis == "measured by 1 committed trial"
    assert t4.throughput.slow == pytest.approx(0.95 * 350)
    assert "not measured" in l4.throughput.basis, "an L40S is no L4"
    assert l4.throughput.basis.startswith("what trials of this sweep did on a T4, times 1.9 ")
    assert l4.throughput.fast == pytest.approx(1.05 * 350 * 121 / 65)


def test_the_cheapest_comes_first() -> None:
    found = _offers(Price("h100", 90), Price("t4", 0.15), Price("a100", 20))
    assert [offer.price.card for offer in found] == ["t4", "a100", "h100"]
    lines = describe_offers(found, 12).splitlines()
    assert lines[0].startswith("t4 at $0.15 an hour: ")
    assert (
        " for 12 (a T4, by published figures and this project's target; not measured)" in lines[0]
    )


def test_an_unknown_card_is_refused_unless_trials_ran_on_it() -> None:
    with pytest.raises(SettingsError, match="no rate of this card is known; allowed: t4, l4, "):
        _offers(Price("mi300", 1))
    (offer,) = _offers(Price("mi300", 1), AMD_MI300=900.0)
    assert offer.throughput.fast == pytest.approx(1.05 * 900)


def test_a_family_without_predictions_has_the_rates_that_its_trials_measured() -> None:
    def found(*prices: Price, **speeds: float) -> list[Any]:
        return offers(prices, _overview(**speeds), None, [WORK], "all")

    t4, h100 = Price("t4", 0.15), Price("h100", 3)
    assert found(t4, h100) == []
    (only,) = found(t4, h100, NVIDIA_H100=4000.0)
    assert (only.price, only.throughput.fast) == (h100, pytest.approx(1.05 * 4000))
    measured, by_sheets = found(t4, h100, Tesla_T4=300.0)
    assert measured.price == t4
    assert "what trials of this sweep did on a T4" in by_sheets.throughput.basis
    with pytest.raises(SettingsError, match="no rate of this card is known"):
        found(Price("mi300", 1))


def test_every_card_of_the_table_has_tensor_cores_and_a_rate() -> None:
    for card in CARDS:
        (offer,) = _offers(Price(card, 1))
        assert 0 < offer.trial.short <= offer.trial.long, card
