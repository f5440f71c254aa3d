"""Importances and findings, from sweeps made by hand. `pytest tests/report/test_importance.py`"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from job.report.charts import inner_range
from job.report.findings import findings
from job.report.importance import MIN_TRIALS, importances
from job.report.overview import Overview, SlotView
from job.sweep.distributions import FloatRange
from tests.ledger.documents import make_identity

PARAMETERS: dict[str, Any] = {
    "learning_rate": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-3},
    "gradient_accumulation_steps": {"values": [4, 8]},
    "weight_decay": {"values": [0.01, 0.05]},
    "lora_r": {"value": 8},
}


def _overview(views: list[SlotView]) -> Overview:
    sweep = {
        "method": "bayes",
        "metric": {"name": "eval/loss", "goal": "minimize"},
        "parameters": PARAMETERS,
    }
    return Overview("s", "/out", make_identity(JOB_SWEEP_FILE=sweep), tuple(views))


def _trial(slot: int, loss: float, state: Any = "completed", **params: Any) -> SlotView:
    params = {"gradient_accumulation_steps": 4, "weight_decay": 0.01, "lora_r": 8} | params
    return SlotView(slot, state, "reason", params, eval_loss=loss)


def _trials(count: int, seed: int = 3) -> list[SlotView]:
    """Trials whose loss is best in the middle of the rates; accumulation matters a little."""
    rng = np.random.default_rng(seed)
    views = []
    for slot in range(count):
        rate = float(10 ** rng.uniform(-5, -3))
        accumulation = int(rng.choice([4, 8]))
        loss = 1 + math.log10(rate / 1e-4) ** 2 + 0.1 * (accumulation == 8)
        params = {"learning_rate": rate, "gradient_accumulation_steps": accumulation}
        decay = float(rng.choice([0.01, 0.05]))
        views.append(_trial(slot, loss, **params, weight_decay=decay))
    return views


def test_a_rate_that_is_best_in_the_middle_is_important() -> None:
    found = importances(_overview(_trials(24)))
    assert found[0].name == "learning_rate"
    assert found[0].share > 0.8
    assert {importance.name for importance in found} == {
        "learning_rate", "gradient_accumulation_steps", "weight_decay",
    }  # fmt: skip
    assert next(i.share for i in found if i.name == "weight_decay") < 0.3


def test_too_few_trials_have_no_importances() -> None:
    assert importances(_overview(_trials(MIN_TRIALS - 1))) == []
    assert importances(_overview([])) == []


def test_what_chance_alone_explains_is_no_importance() -> None:
    """Of four ranks, two groups explain a fifth on average by nothing but their number."""
    decays = zip((0.01, 0.05, 0.01, 0.05), (1.0, 1.3, 1.2, 1.1), strict=True)
    views = [
        _trial(slot, loss, learning_rate=1e-4, weight_decay=decay)
        for slot, (decay, loss) in enumerate(decays)
    ]
    found = {importance.name: importance.share for importance in importances(_overview(views))}
    assert found["weight_decay"] == 0


def test_equal_losses_make_nothing_important() -> None:
    views = [_trial(slot, 1.0, learning_rate=1e-4 * (slot + 1)) for slot in range(6)]
    assert {importance.share for importance in importances(_overview(views))} == {0.0}


def test_the_outer_tenth_is_that_of_the_ranges_own_scale() -> None:
    assert inner_range(FloatRange(1e-5, 1e-3, log=True)) == pytest.approx((10**-4.8, 10**-3.2))
    assert inner_range(FloatRange(0, 10)) == pytest.approx((1, 9))


@pytest.mark.parametrize(
    ("rate", "edge"), [(9.9e-4, "upper edge (0.001)"), (1.1e-5, "lower edge (1e-05)"), (1e-4, "")]
)
def test_a_best_trial_at_the_edge_is_called_out(rate: float, edge: str) -> None:
    notes = "\n".join(findings(_overview([_trial(0, 1.0, learning_rate=rate)])))
    assert ("outer tenth" in notes) == bool(edge)
    assert edge in notes


def test_a_best_trial_at_the_very_end_of_a_range_is_called_out() -> None:
    notes = "\n".join(findings(_overview([_trial(0, 1.0, learning_rate=1e-3)])))
    assert "learning_rate, 0.001, is at the upper edge (0.001) of its range: widen it" in notes
    whole = {"lora_r": {"min": 4, "max": 64}}
    best = SlotView(0, "completed", params={"lora_r": 62}, eval_loss=1.0)
    sweep = {
        "method": "random",
        "metric": {"name": "eval/loss", "goal": "minimize"},
        "parameters": whole,
    }
    notes = "\n".join(findings(Overview("s", "/out", make_identity(JOB_SWEEP_FILE=sweep), (best,))))
    assert "lora_r, 62, is in the outer tenth of its range at the upper edge (64)" in notes


def test_damage_is_named_before_everything_else() -> None:
    views = [SlotView(0, "damaged", "no spec"), _trial(1, 1.0, learning_rate=1e-3)]
    assert findings(_overview(views))[0].startswith("slot 0 is damaged: no spec")


def test_trials_cut_short_ask_for_a_larger_budget() -> None:
    views = [_trial(slot, 1.0, "truncated", learning_rate=1e-4) for slot in range(3)]
    assert any("JOB_TRIAL_BUDGET_HOURS" in note for note in findings(_overview(views)))
    calm = [_trial(slot, 1.0, learning_rate=1e-4) for slot in range(9)]
    assert not any("BUDGET" in note for note in findings(_overview([*calm, *views])))


def test_few_trials_are_said_to_be_few() -> None:
    notes = findings(_overview([_trial(0, 1.0, learning_rate=1e-4)]))
    assert any("8 trials on" in note for note in notes)
    assert any("weak evidence" in note for note in notes)


def test_a_diverged_trial_is_never_the_best() -> None:
    views = [_trial(0, 0.5, "diverged"), _trial(1, 1.0), _trial(2, 1.0)]
    best = _overview(views).best
    assert best is not None
    assert best.slot == 1, "the first of equals"
