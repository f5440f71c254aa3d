"""A precision is one however its matrices are written. `pytest tests/test_quantization.py`"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.errors import SettingsError, SweepError
from job.ledger.ledger import Ledger
from job.ledger.records import Recipe, Result
from job.quantization import MIXED_ORDER, in_one_spelling
from job.report.importance import importances
from job.report.overview import read_overview
from job.settings import Settings
from job.store.documents import create_document
from job.store.local import LocalStore
from job.sweep.builtin import suggest, why_nothing_left
from job.sweep.definition import SweepDefinition, parse_definition
from job.training.quantization import mixed_of, names_in_16_bits
from job.trial.draw import freeze_spec, observe
from job.trial.end import gain_by
from job.trial.identity import other_settings, sweep_identity
from job.trial.warm_start import best_of, describe, warm_start_of
from job.wandb.sweeps import check_params, check_same
from tests.ledger.documents import make_identity, make_result, make_spec

ONE = "mixed:v_proj,down_proj"
OTHERS = [
    "mixed:down_proj,v_proj", "mixed:v_proj,down_proj,v_proj", "mixed: down_proj, v_proj",
    "mixed:down_proj ,\tv_proj ",
]  # fmt: skip
OLD = OTHERS[0]
RATE = {"distribution": "log_uniform_values", "min": 5.0e-6, "max": 2.0e-4}


def _settings(**given: Any) -> Settings:
    return Settings(dataset_uri="rows", output_uri="out", **given)


def _sweep(*modes: str, method: str = "bayes", **parameters: Any) -> SweepDefinition:
    metric = {"name": "eval/loss", "goal": "minimize"}
    searched = parameters | {"quantization": {"values": list(modes)}}
    return parse_definition({"method": method, "metric": metric, "parameters": searched})


def _identity(settings: Settings, definition: SweepDefinition) -> Any:
    base: Any = SimpleNamespace(revision="r", name=settings.base_model)
    data: Any = SimpleNamespace(digest="d", vocabulary="v")
    return sweep_identity(settings, definition, base, data)


def _begun(ledger: Ledger, settings: Settings, definition: SweepDefinition, mode: str) -> bytes:
    """Write the `sweep.json` of an earlier version, which froze modes as they were written."""
    content = _identity(settings, definition).to_json() | {"ledger_schema": 1}
    content["JOB_QUANTIZATION"] = mode
    key = f"{ledger.folder}/sweep.json"
    create_document(ledger.store, key, content)
    return _bytes(ledger, key)


def _drawn(ledger: Ledger, number: int, mode: str, **result: Any) -> None:
    """Write a slot's documents as an earlier version did, with the mode as it was written."""
    slot = ledger.slot(number)
    params = {"quantization": mode}
    spec = make_spec(measure_step_0=True).to_json()
    spec |= {"params": params, "recipe": spec["recipe"] | params}
    create_document(ledger.store, slot.key("spec.json"), spec)
    if result:
        content = make_result(slot.folder, **result).to_json()
        content |= {"params": params, "quantization": mode}
        create_document(ledger.store, slot.key("result.json"), content)


def _bytes(ledger: Ledger, key: str) -> bytes:
    found = ledger.store.get(key)
    assert found is not None
    return found.data


@pytest.mark.parametrize("mode", [ONE, *OTHERS])
def test_blanks_order_and_repetitions_mean_nothing(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("JOB_QUANTIZATION", mode)
    assert _settings().quantization == ONE
    assert names_in_16_bits(mode) == ("v_proj", "down_proj")
    assert Recipe.model_validate(make_spec().recipe.to_json() | {"quantization": mode}) == (
        Recipe.model_validate(make_spec().recipe.to_json() | {"quantization": ONE})
    )


@pytest.mark.parametrize("mode", ["mixed:,v_proj", "mixed:v_proj,", "mixed: ", "mixed:v_proj q"])
def test_what_names_no_matrix_is_refused_as_before(mode: str) -> None:
    with pytest.raises(ValueError, match="allowed: nf4, none, mixed, or mixed: and matrices"):
        _settings(quantization=mode)
    assert in_one_spelling(mode) == mode


def test_what_a_plain_mixed_froze_is_spelt_as_it_is() -> None:
    for count in range(len(MIXED_ORDER) + 1):
        chosen = mixed_of(MIXED_ORDER[:count])
        assert in_one_spelling(chosen) == chosen
    assert in_one_spelling("mixed:up_proj,gate_proj,q_proj") == "mixed:q_proj,gate_proj,up_proj"
    assert [in_one_spelling(value) for value in ("nf4", "none", "mixed", 8, True, None)] == [
        *("nf4", "none", "mixed"),
        *(8, True, None),
    ]


@pytest.mark.parametrize("given", OTHERS)
def test_a_sweep_goes_on_however_its_matrices_are_written(tmp_path: Path, given: str) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    rate = {"learning_rate": RATE}
    written = _sweep("nf4", OLD, **rate)
    as_found = _begun(ledger, _settings(), written, mode=OLD)
    for spelling in (given, ONE):
        settings, definition = _settings(quantization=spelling), _sweep("nf4", spelling, **rate)
        assert other_settings(settings, definition, ledger) == []
        ledger.open_sweep(_identity(settings, definition))
    assert _bytes(ledger, f"{ledger.folder}/sweep.json") == as_found
    other = _settings(quantization="mixed:down_proj")
    assert other_settings(other, written, ledger) == [f"JOB_QUANTIZATION: {ONE} -> mixed:down_proj"]
    with pytest.raises(SettingsError, match=r"JOB_SWEEP_FILE\.parameters\.quantization\.values"):
        ledger.check_identity(_identity(_settings(quantization=ONE), _sweep("nf4", "none", **rate)))


def test_a_listed_mode_is_drawn_in_one_spelling_and_never_again_in_another(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    definition = _sweep("nf4", *OTHERS[2:3], method="random")
    assert _sweep("nf4", ONE, method="random").parameters == definition.parameters
    _drawn(ledger, 0, OLD, eval_loss=1.2)
    observed, _ = observe(ledger, 3, but=1)
    drawn = suggest(
        definition, slot=1, sweep="s", observations=observed, step0_loss=None, defaults={}
    )
    assert drawn == {"quantization": "nf4"}
    _drawn(ledger, 1, "nf4", eval_loss=1.3)
    observed, _ = observe(ledger, 3, but=2)
    assert why_nothing_left(definition, slot=2, observations=observed) == "the sweep has 2 points"


def test_values_of_the_same_matrices_are_refused_as_others_that_stand_there_twice() -> None:
    for first, second in ((OLD, ONE), (ONE, OTHERS[1]), (ONE, OTHERS[2])):
        with pytest.raises(SweepError) as caught:
            _sweep("nf4", first, second)
        told = f"quantization.values: {second!r} means the same as {first!r}: keep one"
        assert str(caught.value).endswith(told)
    with pytest.raises(SweepError, match="'nf4' stands there twice: keep one"):
        _sweep("nf4", "nf4")


@pytest.mark.parametrize("drawn", [ONE, *OTHERS])
def test_what_wandb_draws_is_found_however_its_sweep_writes_it(tmp_path: Path, drawn: str) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    on_the_server = _sweep("nf4", drawn)
    frozen = _sweep("nf4", OLD)
    check_same(frozen, on_the_server, where="W&B", way_out="")
    check_params(frozen, {"quantization": drawn})
    with pytest.raises(SettingsError, match="quantization is 'mixed:down_proj'"):
        check_params(frozen, {"quantization": "mixed:down_proj"})
    _drawn(ledger, 0, OLD, eval_loss=1.2, curve=((0, 1.6), (50, 1.2)), untuned_16bit=1.3)
    observed, _ = observe(ledger, 2, but=1)
    data: Any = SimpleNamespace(train=[0] * 99, digest="d", vocabulary="v")
    spec = freeze_spec(
        *(ledger.slot(1), _settings(), data, observed),
        {"quantization": drawn},
        definition=frozen,
        run_id="r",
    )
    assert (spec.params, spec.recipe.quantization) == ({"quantization": ONE}, ONE)
    assert (spec.measure_step_0, spec.untuned, spec.untuned_16bit) == (False, 1.6, 1.3)


def test_a_report_groups_trials_by_their_matrices(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    _begun(ledger, _settings(), _sweep("nf4", OLD), mode="nf4")
    for number, mode in enumerate((*OTHERS, "nf4", ONE)):
        _drawn(ledger, number, mode, eval_loss=1.5 if mode == "nf4" else 1.2, curve=((0, 1.6),))
    before = {key: _bytes(ledger, key) for key in ledger.store.list("")}
    overview = read_overview(ledger, 6)
    assert overview.untuned == {ONE: 1.6, "nf4": 1.6}
    assert len(overview.comparable) == 6
    (importance,) = importances(overview)
    assert importance.share == pytest.approx(1.0)
    assert {key: _bytes(ledger, key) for key in ledger.store.list("")} == before


def test_a_warm_start_takes_a_mode_from_a_sweep_that_wrote_it_otherwise(tmp_path: Path) -> None:
    earlier = Ledger(LocalStore(tmp_path), "old")
    # Such a file is refused today; a sweep that began with one still is what it was.
    twice = _sweep("nf4", OLD).to_json()
    twice["parameters"]["quantization"]["values"].append(ONE)
    content = make_identity(JOB_SWEEP_FILE=twice).to_json() | {"ledger_schema": 1}
    create_document(earlier.store, f"{earlier.folder}/sweep.json", content)
    _drawn(earlier, 0, OLD, eval_loss=1.2)
    best = best_of(earlier, "sweeps/old")
    definition = _sweep("nf4", OTHERS[2])
    assert warm_start_of(best, definition).params == {"quantization": ONE}
    assert "cannot draw" not in describe(best, definition, _settings())
    assert "not searched here" not in describe(
        best,
        parse_definition({"method": "random", "parameters": {"lora_r": {"value": 8}}}),
        _settings(**best.recipe.to_json() | {"quantization": OTHERS[1]}),
    )
    assert gain_by(earlier.identity(), sweep="old", step_0_loss=None) is not None
    assert read_overview(earlier, 1).definition is not None


def test_a_result_says_how_the_base_was_held_in_one_spelling() -> None:
    content = make_result().to_json() | {"quantization": OLD, "params": {"quantization": OLD}}
    result = Result.model_validate(content)
    assert (result.quantization, result.params) == (ONE, {"quantization": ONE})
