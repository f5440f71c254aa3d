"""A sweep's precisions, frozen and drawn. `pytest tests/trial/test_weights.py`"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.errors import SettingsError
from job.ledger.ledger import Ledger
from job.ledger.records import Recipe, Spec
from job.settings import Settings
from job.store.local import LocalStore
from job.sweep.builtin import suggest
from job.sweep.definition import SweepDefinition, parse_definition
from job.sweep.observations import Observation
from job.training.memory import (
    FILL,
    RECOMPUTED_SHARE,
    T4_USABLE_BYTES,
    Samples,
    plan_memory,
)
from job.training.shape import model_shape
from job.trial.draw import freeze_spec, observe
from job.trial.identity import sweep_identity
from job.trial.train import refuse_too_large
from job.trial.weights import (
    BaseWeights,
    Costliest,
    check_adapter,
    choose_mixed,
    quantizations,
)
from tests.ledger.documents import make_identity, make_result, make_spec

LLAMA_1B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "vocab_size": 128_256, "tie_word_embeddings": True,
}  # fmt: skip
MISTRAL_7B: dict[str, Any] = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32768,
}  # fmt: skip
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
SAMPLES = Samples(longest=1024, mean=220.0, deviation=190.0, per_step=8)
ATTENTION = "v_proj,k_proj,o_proj,q_proj"
RATE = {"distribution": "log_uniform_values", "min": 5.0e-6, "max": 2.0e-4}


def _settings(**given: Any) -> Settings:
    return Settings(dataset_uri="rows", output_uri="out", **given)


def _sweep(method: str = "bayes", **parameters: Any) -> SweepDefinition:
    metric = {"name": "eval/loss", "goal": "minimize"}
    return parse_definition({"method": method, "metric": metric, "parameters": parameters})


def _plan(config: dict[str, Any], quantization: str) -> Any:
    return plan_memory(
        config, SAMPLES, lora_r=8, lora_dropout=0.05, per_device_train_batch_size=2,
        usable_bytes=T4_USABLE_BYTES, quantization=quantization,
    )  # fmt: skip


def _mixed(config: dict[str, Any], usable_bytes: int | None = T4_USABLE_BYTES) -> str:
    return choose_mixed(
        config, SAMPLES, worst=Costliest(8, 0.05, (4,)), per_device_train_batch_size=2,
        usable_bytes=usable_bytes,
    )  # fmt: skip


def test_weights_of_16_bits_take_what_they_take() -> None:
    whole, quarter = model_shape(MISTRAL_7B, "none"), model_shape(MISTRAL_7B, "mixed:down_proj")
    assert whole is not None
    assert quarter is not None
    assert (whole.quantised_weights, whole.quantised_share) == (0, 0.0)
    assert whole.plain_weights == pytest.approx(7.25e9, rel=0.01)
    assert quarter.quantised_weights == whole.linear_weights - 32 * 4096 * 14336
    assert whole.adapter_weights(8) == quarter.adapter_weights(8) == 20_971_520
    assert _plan(MISTRAL_7B, "none").predicted.weights == pytest.approx(2 * 7.25e9, rel=0.01)


def test_a_checkpoint_with_parts_in_16_bits_is_counted_as_what_it_is() -> None:
    """As dynamic 4-bit checkpoints name them: modules, whole parts of a layer, the head."""
    kept = ["lm_head", "model.layers.3.mlp", "model.layers.1.self_attn.q_proj", "multi_modal"]
    dynamic = MISTRAL_7B | {"quantization_config": NF4 | {"llm_int8_skip_modules": kept}}
    shape, whole = model_shape(dynamic), model_shape(MISTRAL_7B)
    assert shape is not None
    assert whole is not None
    assert whole.quantised_weights - shape.quantised_weights == 3 * 4096 * 14336 + 4096 * 4096
    assert shape.is_dequantised("down_proj"), "of the other layers"
    assert not model_shape(MISTRAL_7B, "mixed:down_proj").is_dequantised("down_proj")  # type: ignore[union-attr]
    everywhere = NF4 | {"llm_int8_skip_modules": ["q_proj"]}
    shape = model_shape(MISTRAL_7B | {"quantization_config": everywhere})
    assert shape is not None
    assert whole.quantised_weights - shape.quantised_weights == 32 * 4096 * 4096


def test_a_token_costs_less_where_nothing_is_dequantised() -> None:
    four, some, whole = (_plan(LLAMA_1B, mode) for mode in ("nf4", f"mixed:{ATTENTION}", "none"))
    assert (four.recompute, whole.recompute) == ("none", "none")
    assert whole.relative_cost < some.relative_cost < four.relative_cost
    assert whole.relative_cost == 2.0
    assert whole.token_budget >= 8 * 220, "a step is one micro-batch, not one for each sample"


def test_a_plain_mixed_keeps_attention_first_and_as_much_as_memory_allows() -> None:
    assert _mixed(LLAMA_1B) == f"mixed:{ATTENTION},down_proj"
    assert _mixed(MISTRAL_7B, None) == f"mixed:{ATTENTION},down_proj", "a CPU"
    assert _mixed(MISTRAL_7B) == f"mixed:{ATTENTION}"
    assert _plan(MISTRAL_7B, f"mixed:{ATTENTION}").recompute == "none", "speed is not paid for it"
    for gib in (6, 7, 9, 11, 13):
        four, some = (
            plan_memory(
                MISTRAL_7B, SAMPLES, lora_r=8, lora_dropout=0.05, per_device_train_batch_size=2,
                usable_bytes=gib * 2**30, quantization=mode,
            )
            for mode in ("nf4", _mixed(MISTRAL_7B, gib * 2**30))
        )  # fmt: skip
        assert some.predicted is not None
        assert some.predicted.total <= FILL * gib * 2**30
        assert RECOMPUTED_SHARE[some.recompute] <= RECOMPUTED_SHARE[four.recompute]
    assert _mixed(MISTRAL_7B, 5 * 2**30) == "nf4"
    assert _mixed(MISTRAL_7B | {"quantization_config": NF4}) == "mixed", "as its maker left it"
    with pytest.raises(SettingsError, match="JOB_QUANTIZATION: .* opt model .* name the matrices"):
        _mixed({"model_type": "opt"})


def test_a_sweeps_precisions_begin_with_the_lightest() -> None:
    assert quantizations(_settings(), _sweep(learning_rate=RATE)) == ("nf4",)
    assert quantizations(_settings(quantization="none"), _sweep(learning_rate=RATE)) == ("none",)
    listed = _sweep(quantization={"values": ["none", "mixed:q_proj", "nf4"]})
    assert quantizations(_settings(), listed) == ("nf4", "mixed:q_proj", "none")
    fixed = _sweep(quantization={"value": "mixed"}, learning_rate=RATE)
    assert quantizations(_settings(), fixed) == ("mixed",)


@pytest.mark.parametrize(
    ("given", "searched", "says"),
    [
        ({}, None, None),
        ({"lora_r": 38}, None, None),
        ({"lora_r": 39}, None, r"of JOB_LORA_R \(39\) .* 200 MB: lower JOB_LORA_R to 38, or raise"),
        ({"lora_r": 64}, None, r"would be 336 MB, .* raise JOB_MAX_ADAPTER_MB to 335.6$"),
        ({"lora_r": 64}, {"values": [64, 8]}, None),
        ({}, {"values": [64, 128]}, r"of the sweep's smallest lora_r \(64\) would be 336 MB"),
        ({}, {"min": 40, "max": 90}, r"smallest lora_r \(40\)"),
        ({}, {"value": 64}, r"smallest lora_r \(64\)"),
        ({"max_adapter_mb": 5}, None, r"is 5 MB: raise JOB_MAX_ADAPTER_MB to 42$"),
    ],
)  # fmt: skip
def test_a_sweep_whose_smallest_adapter_is_over_the_limit_is_refused(
    given: dict[str, Any], searched: dict[str, Any] | None, says: str | None
) -> None:
    settings = _settings(**given)
    sweep = _sweep(learning_rate=RATE, **({} if searched is None else {"lora_r": searched}))
    if says is None:
        check_adapter(settings, sweep, MISTRAL_7B)
        return
    with pytest.raises(SettingsError, match=says) as caught:
        check_adapter(settings, sweep, MISTRAL_7B)
    assert str(caught.value).startswith("JOB_MAX_ADAPTER_MB: ")
    check_adapter(settings, sweep, MISTRAL_7B | {"model_type": "olmo2"})


def test_where_adapters_are_not_known_beforehand_the_first_one_gives_the_same_words() -> None:
    settings, sweep, shape = (
        _settings(lora_r=64),
        _sweep(learning_rate=RATE),
        model_shape(MISTRAL_7B),
    )
    assert shape is not None
    with pytest.raises(SettingsError) as caught:
        check_adapter(settings, sweep, MISTRAL_7B)
    num_bytes = 2 * shape.adapter_weights(64)
    attempt: Any = SimpleNamespace(
        settings=settings, definition=sweep, spec=make_spec(recipe={"lora_r": 64})
    )
    with pytest.raises(SettingsError) as refused:
        refuse_too_large(attempt, num_bytes)
    assert str(refused.value) == str(caught.value)
    attempt.definition = _sweep(lora_r={"values": [8, 64]})
    refuse_too_large(attempt, num_bytes)  # another trial may have a smaller one


def test_the_weights_of_one_precision_go_before_those_of_another_come() -> None:
    alive: set[str] = set()

    class Model:
        def __init__(self, mode: str) -> None:
            assert not alive, "the memory of one is needed for the other"
            self.mode, self.itself = mode, self
            alive.add(mode)

        def __del__(self) -> None:
            alive.discard(self.mode)

    loads: list[str] = []
    weights = BaseWeights(lambda mode: loads.append(mode) or Model(mode))  # type: ignore[func-returns-value]
    for mode in ("nf4", "nf4", "none", "none", "nf4"):
        assert weights.model(mode).mode == mode
    assert loads == ["nf4", "none", "nf4"]


def test_a_precision_that_could_not_be_loaded_leaves_none_behind() -> None:
    def load(mode: str) -> str:
        if mode == "none":
            raise MemoryError
        return mode

    weights = BaseWeights(load)
    assert weights.model("nf4") == "nf4"
    with pytest.raises(MemoryError):
        weights.model("none")
    assert weights.model("nf4") == "nf4"


def _identity(settings: Settings, mixed: str | None = None) -> Any:
    base: Any = SimpleNamespace(revision="r", name="b")
    data: Any = SimpleNamespace(digest="d", vocabulary="v")
    return sweep_identity(settings, _sweep(learning_rate=RATE), base, data, mixed=mixed)


def test_a_sweep_from_before_the_setting_is_one_in_4_bits(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    old = _identity(_settings()).to_json()
    del old["JOB_QUANTIZATION"]
    ledger.open_sweep(make_identity(**old))
    assert "JOB_QUANTIZATION" not in (ledger.identity() or make_identity()).to_json()
    ledger.check_identity(_identity(_settings()))
    with pytest.raises(SettingsError, match="JOB_QUANTIZATION: nf4 -> none"):
        ledger.check_identity(_identity(_settings(quantization="none")))
    recipe = make_spec().recipe.to_json()
    assert "quantization" not in recipe
    assert Recipe.model_validate(recipe).quantization == "nf4"


def test_a_plain_mixed_is_in_all_trials_what_it_was_in_the_first(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    settings, data = (
        _settings(quantization="mixed"),
        SimpleNamespace(train=[0] * 99, digest="d", vocabulary="v"),
    )
    ledger.open_sweep(_identity(settings, mixed="mixed:v_proj"))
    ledger.open_sweep(_identity(settings, mixed="mixed:v_proj,k_proj"))  # a larger card
    for number, params in enumerate(({}, {"quantization": "mixed"}, {"quantization": "none"})):
        slot = ledger.slot(number)
        spec = freeze_spec(
            slot,
            settings,
            data,
            [],
            params,
            definition=_sweep(learning_rate=RATE),
            run_id="r",  # type: ignore[arg-type]
        )
        assert spec.params == params, "as it was drawn"
        expected = params.get("quantization", "mixed").replace("mixed", "mixed:v_proj")
        assert spec.recipe.quantization == expected


def _begin(ledger: Ledger, number: int, mode: str, **quantization: Any) -> Spec:
    """Freeze a slot's spec in the sweep whose `quantization` is this."""
    seen, _ = observe(ledger, 4, but=number)
    data: Any = SimpleNamespace(train=[0] * 99, digest="d", vocabulary="v")
    return freeze_spec(
        ledger.slot(number),
        _settings(),
        data,
        seen,
        {"quantization": mode},
        definition=_sweep(learning_rate=RATE, quantization=quantization),
        run_id="r",
    )


def _measured(ledger: Ledger, number: int, spec: Spec, **changes: Any) -> None:
    """Commit the slot with what its spec says is measured, or with these changes."""
    lossy = spec.recipe.quantization != "none"
    start = ((0, 1.6 if lossy else 1.3),) if spec.measure_step_0 else ()
    values: dict[str, Any] = {"curve": (*start, (50, 1.2)), "eval_loss": 1.2}
    values |= {"untuned_16bit": 1.3 if spec.measure_16bit else None} | changes
    slot = ledger.slot(number)
    slot.commit(make_result(slot.folder, quantization=spec.recipe.quantization, **values))


def test_the_untrained_model_is_measured_once_in_each_precision(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    measured, known = [], []
    for number, mode in enumerate(("nf4", "none", "nf4", "none")):
        spec = _begin(ledger, number, mode, values=["nf4", "none"])
        measured.append((spec.measure_step_0, spec.measure_16bit))
        known.append((spec.untuned, spec.untuned_16bit))
        _measured(ledger, number, spec)
    assert [step_0 for step_0, _ in measured] == [True, True, False, False]
    assert not any(in_16 for _, in_16 in measured), "a trial in 16 bits measures it anyway"
    assert known == [(None, None), (None, None), (1.6, 1.3), (1.3, 1.3)]
    assert observe(ledger, 4)[1] == 1.6, "no loss of a trial in 4 bits is cut off"


def test_one_slot_of_a_sweep_measures_16_bits_beside_its_own(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    modes = {"values": ["nf4", "mixed:v_proj"]}
    first = _begin(ledger, 0, "mixed:v_proj", **modes)
    beside = _begin(ledger, 1, "nf4", **modes)
    assert (first.measure_16bit, beside.measure_16bit) == (True, False), "the other is at it"
    assert beside.measure_step_0
    _measured(ledger, 0, first, status="infeasible", eval_loss=None, curve=(), untuned_16bit=None)
    third = _begin(ledger, 2, "nf4", **modes)
    assert third.measure_16bit, "the first one's weights did not fit, and nothing was measured"
    _measured(ledger, 2, third)
    fourth = _begin(ledger, 3, "nf4", **modes)
    assert (fourth.measure_16bit, fourth.measure_step_0) == (False, False)
    assert (fourth.untuned, fourth.untuned_16bit) == (1.6, 1.3)


def test_a_sweep_in_16_bits_measures_nothing_twice(tmp_path: Path) -> None:
    spec = _begin(Ledger(LocalStore(tmp_path), "s"), 0, "none", value="none")
    assert (spec.measure_step_0, spec.measure_16bit) == (True, False)


def test_a_spec_from_before_measures_no_16_bits() -> None:
    old = make_spec().to_json()
    assert "measure_16bit" not in old
    assert not Spec.model_validate(old).measure_16bit


def test_the_engine_draws_a_precision_as_a_listed_word_and_learns_that_one_does_not_fit() -> None:
    definition = _sweep(
        learning_rate=RATE, quantization={"values": ["nf4", "none", "mixed:down_proj"]}
    )
    defaults = _settings().hyperparameters
    seen: list[Observation] = []
    drawn = []
    for slot in range(12):
        params = suggest(
            definition, slot=slot, sweep="s", observations=seen, step0_loss=1.6, defaults=defaults
        )
        assert params is not None
        drawn.append(params["quantization"])
        start = {"nf4": 1.3, "mixed:down_proj": 1.2}.get(str(params["quantization"]))
        loss = start and start + 0.1 * abs(math.log10(float(params["learning_rate"]) / 1e-4))
        seen.append(Observation(slot, params, "completed" if loss else "infeasible", loss))
    assert drawn[:3] == ["nf4"] * 3, "the opening stays at the setting's value"
    assert set(drawn) == {"nf4", "none", "mixed:down_proj"}
    assert drawn.count("mixed:down_proj") > drawn.count("none")


def _attempt(weights: BaseWeights, config: dict[str, Any]) -> Any:
    import numpy as np
    import torch

    lengths = np.array([1024, 200])
    return SimpleNamespace(
        settings=_settings(gpu_memory_gb=14.6),
        spec=make_spec(recipe={"quantization": "none"}, measure_step_0=False),
        clock=SimpleNamespace(load_seconds=0.0),
        loaded=SimpleNamespace(
            base=SimpleNamespace(config=config),
            data=SimpleNamespace(train=SimpleNamespace(lengths=lengths)),
            device=torch.device("cpu"),
            weights=weights,
        ),
    )


@pytest.mark.slow
def test_a_precision_that_does_not_fit_the_card_is_infeasible_unless_it_had_room_before(
    tmp_path: Path,
) -> None:
    from job.training.model import TooSmallError
    from job.trial.train import real_training

    def load(mode: str) -> Any:
        raise TooSmallError(f"{mode} does not fit this GPU's free memory")

    attempt, fit = _attempt(BaseWeights(load), LLAMA_1B), real_training().fit
    fitted = fit(attempt, SimpleNamespace(resume_dir=None), tmp_path)  # type: ignore[arg-type]
    assert (fitted.status, fitted.state.step) == ("infeasible", 0)
    assert fitted.reason == "none does not fit this GPU's free memory"
    assert fitted.history_path.read_text() == ""
    with pytest.raises(TooSmallError):
        fit(attempt, SimpleNamespace(resume_dir=tmp_path), tmp_path)  # type: ignore[arg-type]


@pytest.mark.slow
def test_weights_that_are_larger_than_the_card_are_not_even_loaded() -> None:
    from job.training.model import TooSmallError
    from job.trial.train import _base

    loads: list[str] = []
    weights = BaseWeights(loads.append)  # type: ignore[func-returns-value]
    attempt = _attempt(weights, MISTRAL_7B)
    smaller = plan_memory(
        MISTRAL_7B, SAMPLES, lora_r=8, lora_dropout=0.05, per_device_train_batch_size=2,
        usable_bytes=12 * 2**30, quantization="none",
    )  # fmt: skip
    with pytest.raises(TooSmallError, match=r"16 bits does not fit .* take 13\.5 GiB of 12\.0"):
        _base(attempt, smaller)
    assert loads == []
