"""The numbers of `job plan`: the costliest trial, its memory, money; and its warnings.

`pytest tests/plan/test_forecast.py`
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from job.base_model import BaseModel
from job.data.prepared import PreparedData
from job.data.samples import SampleTable
from job.data.table_files import Counts
from job.ledger.ledger import Ledger
from job.plan import warnings
from job.plan.command import _estimated, _measured, _needs
from job.plan.forecast import Span, Throughput, Workload, throughput_on_a_t4, trial_seconds
from job.plan.precisions import (
    Precision,
    describe_precisions,
    estimate_on_a_t4,
    forecast,
    modes_to_show,
    over_all,
    precision_of,
)
from job.plan.sections import describe_cost, describe_coverages, describe_trial
from job.plan.workload import memory_of, samples_of, usable_bytes_of, workloads_of
from job.report.overview import read_overview
from job.settings import Settings
from job.store.bucket import Bucket, BucketStore
from job.store.local import LocalStore
from job.store.retries import Fault, FaultKind, Limits
from job.sweep.definition import parse_definition
from job.training.families import Coverage
from job.training.memory import RECOMPUTED_SHARE, T4_USABLE_BYTES, MemoryPlan
from job.training.shape import model_shape
from job.trial.weights import Costliest, choose_mixed
from tests.ledger.documents import make_result, make_spec
from tests.plan.test_command import MISTRAL_7B

BASE = BaseModel("base", "/base", "sha256:0", MISTRAL_7B)
COUNTS = Counts(
    rows_read=1000, unusable={}, duplicates=0, selected=1000, refused={}, too_long=20,
    truncated=30, context_answers=0, train=800, eval=192,
)  # fmt: skip


def _settings(**given: Any) -> Settings:
    return Settings(**{"dataset_uri": "rows", "output_uri": "out"} | given)


def _samples(count: int, tokens: int) -> SampleTable:
    each = [np.full(tokens, 7, dtype=np.int32)] * count
    return SampleTable.concatenate(each, [np.ones(tokens, dtype=np.bool_)] * count)


def _data(counts: Counts = COUNTS) -> PreparedData:
    return PreparedData("d", _samples(800, 300), _samples(192, 100), counts)


def _definition(**parameters: Any) -> Any:
    metric = {"name": "eval/loss", "goal": "minimize"}
    return parse_definition({"method": "random", "metric": metric, "parameters": parameters})


def test_the_costliest_values_that_may_be_drawn_are_planned_for() -> None:
    rates = {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-3}
    searched = _definition(
        learning_rate=rates,
        lora_r={"values": [8, 32, 16]},
        lora_dropout={"min": 0.0, "max": 0.2},
        gradient_accumulation_steps={"value": 2},
    )
    assert Costliest.of(_settings(), searched) == Costliest(32, 0.2, (2,))
    settings = _settings(lora_r=4, lora_dropout=0.1, gradient_accumulation_steps=3)
    assert Costliest.of(settings, _definition(learning_rate=rates)) == Costliest(4, 0.1, (3,))


def test_a_trial_is_as_long_as_the_accumulation_that_takes_longest() -> None:
    settings = _settings(
        per_device_train_batch_size=2, max_steps=1000, num_epochs=2, eval_rows=100,
        evals_per_trial=4,
    )  # fmt: skip
    *_, work = workloads_of(settings, _data(), Costliest(8, 0.0, (4, 8)))
    assert (work.steps, work.train_tokens) == (200, 200 * 8 * 300), "two epochs of 800 rows"
    assert work.eval_tokens % (100 * 100) == 0
    assert work.eval_tokens >= 4 * 100 * 100
    short = settings.model_copy(update={"max_steps": 50})
    *_, capped = workloads_of(short, _data(), Costliest(8, 0.0, (4, 8)))
    assert (capped.steps, capped.train_tokens) == (50, 50 * 16 * 300), "the longer steps count"


def test_steps_and_tokens_are_told_as_the_range_that_they_are() -> None:
    """A sweep of trials of 200 and of 100 steps."""
    throughput = Throughput(100, 200, "said")
    settings = _settings(max_steps=1000, num_epochs=2, eval_rows=100, evals_per_trial=4)
    works = workloads_of(settings, _data(), Costliest(8, 0.0, (8, 4)))
    span = trial_seconds(works, throughput, "none")
    told = describe_trial(works, throughput, span)
    assert told.startswith("100 to 200 steps, 480 k tokens at 100 to 200 tokens/s (said): ")
    settings = _settings(max_steps=50, num_epochs=2, eval_rows=100, evals_per_trial=4)
    works = workloads_of(settings, _data(), Costliest(8, 0.0, (8, 4)))
    span = trial_seconds(works, throughput, "none")
    evaluations = 4 * 100 * 100 / 2
    assert span == Span((50 * 8 * 300 + evaluations) / 200, (50 * 16 * 300 + evaluations) / 100)
    told = describe_trial(works, throughput, span)
    assert told.startswith("50 steps, 120 k to 240 k tokens at ")


def test_memory_is_planned_for_the_card_that_the_settings_describe() -> None:
    worst = Costliest(16, 0.05, (8,))
    t4 = memory_of(_settings(), BASE, _data(), worst)
    assert t4.usable_bytes == T4_USABLE_BYTES
    small = memory_of(_settings(gpu_memory_gb=10), BASE, _data(), worst)
    assert small.usable_bytes == 10 * 2**30
    assert small.predicted is not None
    assert t4.predicted is not None
    assert small.predicted.total < 10 * 2**30
    large = memory_of(_settings(gpu_memory_gb=80), BASE, _data(), worst)
    assert large.token_budget > 300, "several samples of 300 tokens share a row"


def test_the_cost_is_that_of_all_trials() -> None:
    span = Span(3600, 7200)
    told = describe_cost(_settings(num_trials=12, gpu_hourly_usd=0.5), span)
    assert told == "12 trials: 12.0 h to 24.0 h of GPU at most, $6.00 to $12.00"
    assert "JOB_GPU_HOURLY_USD" in describe_cost(_settings(), span)


def test_what_trials_did_is_believed_before_an_estimate(tmp_path: Path) -> None:
    ledger, shape = Ledger(LocalStore(tmp_path), "s"), model_shape(MISTRAL_7B)
    assert shape is not None
    settings, precision = _settings(), Precision("nf4", shape, MemoryPlan(64, "all"), 1024, 125)
    overview = read_overview(ledger, 12)
    assert _measured(overview) is None
    estimate = _estimated(settings, BASE, _data(), precision)
    assert estimate.fast == pytest.approx(350, rel=0.03)
    ledger.slot(0).specify(make_spec())
    ledger.slot(0).commit(make_result(tokens_per_second=500.0))
    overview = read_overview(ledger, 12)
    measured = _measured(overview)
    assert measured is not None
    assert (measured.slow, measured.fast) == pytest.approx((475, 525))


LLAMA_1B = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "vocab_size": 128_256, "tie_word_embeddings": True,
}  # fmt: skip


def _precisions(config: dict[str, Any], current: str = "nf4", **given: Any) -> list[str]:
    """What the plan says of each precision, from 100 to 200 tokens/s in the current one."""
    base: Any = SimpleNamespace(config=config)
    settings, worst = _settings(**given), Costliest(8, 0.05, (4,))
    mixed = choose_mixed(
        config, samples_of(settings, _data(), worst), worst=worst,
        per_device_train_batch_size=2, usable_bytes=usable_bytes_of(settings),
    )  # fmt: skip
    own = precision_of(settings, base, _data(), worst, current)
    work = [Workload(steps=1, train_tokens=10**6, eval_tokens=0)]
    found = [
        forecast(precision_of(settings, base, _data(), worst, mode), own, Throughput(100, 200, ""),
                 work)
        for mode in modes_to_show(base, [current], mixed)
    ]  # fmt: skip
    told = forecast(own, own, Throughput(100, 200, ""), work)
    assert (told.throughput.slow, told.taken) == (100, Span(5000, 10_000))
    return describe_precisions(found, told).splitlines()


def test_a_base_that_fits_in_16_bits_is_told_so_with_its_memory_and_speed() -> None:
    four, some, whole, advice = _precisions(LLAMA_1B)
    assert four.startswith("4 bits (NF4): weights 0.96 GiB, peak")
    assert "100 to 200 tokens/s, 83 min to 2.8 h a trial" in four
    assert some.startswith("4 bits (NF4), v_proj, k_proj, o_proj, q_proj, down_proj in 16 bits:")
    assert whole.startswith("16 bits: weights 2.30 GiB, peak")
    assert re.fullmatch(
        r"this 1\.24 B base fits in 16 bits at \d\.\d of 14\.6 GiB and would train 1\.\d times as"
        r" fast \(JOB_QUANTIZATION=none\); 4 bits are the default",
        advice,
    )
    chosen = _precisions(LLAMA_1B, "none")
    assert len(chosen) == 3, "nobody who has 16 bits is told that they are there"
    assert "100 to 200 tokens/s" in chosen[-1]


def test_a_base_that_is_too_large_or_in_4_bits_already_is_told_so() -> None:
    *_, whole, advice = _precisions(MISTRAL_7B)
    assert whole.endswith("GiB, does not fit")
    assert advice == "this 7.25 B base does not fit in 16 bits"
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    four, advice = _precisions(MISTRAL_7B | {"quantization_config": nf4})
    assert four.startswith("4 bits (NF4): weights")
    assert advice.startswith("the base's files are in 4 bits: 16 need the model that it was made")


def test_a_cpu_has_every_precision() -> None:
    four, _, whole, advice = _precisions(LLAMA_1B, device="cpu")
    assert "weights 1.45 GiB" in four
    assert "weights 4.60 GiB" in whole
    assert "fits in 16 bits and would train at the same pace" in advice, "as it was measured"


@pytest.mark.parametrize("length", [16, 60, 250, 1000])
@pytest.mark.parametrize("quantization", ["nf4", "mixed:down_proj", "none"])
def test_no_rate_is_above_what_a_t4_is_known_to_sustain(length: int, quantization: str) -> None:
    """24 TFLOPS; short rows make small micro-batches, which dequantise for few tokens."""
    base: Any = SimpleNamespace(config=LLAMA_1B)
    data = PreparedData("d", _samples(800, length), _samples(192, 100), COUNTS)
    found = precision_of(_settings(), base, data, Costliest(8, 0.05, (4,)), quantization)
    rate = estimate_on_a_t4([found]).fast
    weights = found.shape.linear_weights + found.shape.vocabulary * found.shape.hidden
    assert rate * 2 * weights * (2 + RECOMPUTED_SHARE[found.memory.recompute]) < 24e12
    whole = precision_of(_settings(), base, data, Costliest(8, 0.05, (4,)), "none")
    assert rate <= estimate_on_a_t4([whole]).fast


def test_a_small_micro_batch_is_slower_for_its_dequantising() -> None:
    """Of 125 tokens it takes as long as the products; 1,024 are behind the published figures."""
    shape, plain = model_shape(LLAMA_1B), model_shape(LLAMA_1B, "none")
    assert shape is not None
    assert plain is not None
    usual, small = throughput_on_a_t4(shape, "all"), throughput_on_a_t4(shape, "all", 125)
    assert small.fast / usual.fast == pytest.approx((1 + 125 / 1024) / 2)
    assert throughput_on_a_t4(plain, "all", 125).fast == pytest.approx(2 * small.fast)


@pytest.fixture
def needs_of(tmp_path: Path) -> Any:
    return partial(_needs_of, Ledger(LocalStore(tmp_path), "s"))


def _needs_of(ledger: Ledger, config: dict[str, Any], *modes: str, **given: Any) -> Any:
    """What a sweep that draws these precisions needs, in memory."""
    base: Any = SimpleNamespace(config=config)
    definition = _definition(quantization={"values": list(modes)})
    inputs: Any = SimpleNamespace(definition=definition, base=base, data=_data(), ledger=ledger)
    return _needs(_settings(**given), inputs)


def test_a_precision_that_does_not_fit_is_named_and_left_out_of_the_forecast(needs_of: Any) -> None:
    needs = needs_of(MISTRAL_7B, "none", "nf4")
    assert needs.modes == ["nf4"]
    (line,) = warnings.of_memory(needs.plans)
    assert line.startswith("a trial in 16 bits may not fit: its smallest plan needs 14 GiB")
    assert line.endswith("committed as infeasible: leave 'none' out of the sweep's quantization")
    (line,) = warnings.of_memory(needs_of(MISTRAL_7B, "none", "nf4", gpu_memory_gb=10).plans)
    assert line.startswith("a trial in 16 bits does not fit: its smallest plan needs 14 GiB")
    fixed = needs_of(MISTRAL_7B, "none", gpu_memory_gb=10)
    assert fixed.modes == ["none"], "the only one"
    (line,) = warnings.of_memory(fixed.plans)
    assert "it then ends without an adapter: lower JOB_MAX_SEQ_LENGTH, or take" in line
    assert "take JOB_QUANTIZATION=nf4, a smaller JOB_BASE_MODEL" in line
    (line,) = warnings.of_memory(needs_of(MISTRAL_7B, "none", "nf4", gpu_memory_gb=2).plans)
    assert line.startswith("a trial does not fit: "), "none of them does: said once"


def test_a_trial_takes_as_long_as_in_the_slowest_precision_that_it_may_be_drawn_in() -> None:
    base, worst = cast(Any, SimpleNamespace(config=LLAMA_1B)), Costliest(8, 0.05, (4,))
    four, whole = (precision_of(_settings(), base, _data(), worst, m) for m in ("nf4", "none"))
    assert whole.memory.fits
    throughput, work = Throughput(100, 200, "said"), [Workload(1, 10**6, 0)]
    drawn = [forecast(one, whole, throughput, work) for one in (four, whole)]
    pace, taken = over_all(drawn)
    assert (pace.slow, pace.fast, pace.basis) == (drawn[0].throughput.slow, 200, "said")
    assert pace.slow < 100
    assert taken == Span(drawn[1].taken.short, drawn[0].taken.long)


def test_shares_in_4_bits_are_told_of_all_precisions_that_may_be_drawn() -> None:
    assert describe_coverages([Coverage(1.0, 1.0)]) == str(Coverage(1.0, 1.0))
    told = describe_coverages([Coverage(0.0, 1.0), Coverage(0.75, 1.0), Coverage(1.0, 1.0)])
    assert told == "0% to 100% of its linear weights in 4 bits, 100% adapted"


def test_rows_that_lose_their_end_and_too_few_to_judge_by_are_foretold() -> None:
    settings = _settings(eval_rows=192, max_seq_length=512)
    assert list(warnings.of_rows(settings, _data())) == [], "5 % is not more than 5 %"
    (cut,) = warnings.of_rows(settings, _data(replace(COUNTS, truncated=31)))
    assert cut.startswith("5% of the rows are longer than JOB_MAX_SEQ_LENGTH (512 tokens)")
    unused = replace(COUNTS, columns_not_used=["choices", "image"])
    (columns,) = warnings.of_rows(settings, _data(unused))
    assert columns.startswith("columns not used: choices, image: if one belongs to the prompt")
    (few,) = warnings.of_rows(settings, _data(replace(COUNTS, eval=191)))
    assert few.startswith("only 191 rows are held out, JOB_EVAL_ROWS asks for 192")
    assert few.endswith("raise JOB_EVAL_FRACTION or JOB_SUBSAMPLE_FRACTION")
    whole = _settings(eval_rows=192, max_seq_length=512, use_full_dataset=True)
    (few,) = warnings.of_rows(whole, _data(replace(COUNTS, eval=191)))
    assert few.endswith("raise JOB_EVAL_FRACTION"), "all rows are taken already"


def test_a_checkpoint_that_just_misses_the_grace_is_foretold() -> None:
    settings = _settings(grace_seconds=15)  # of which 11 are left for it
    assert list(warnings.of_checkpoints(settings, 110_000_000, 10e6)) == []
    (line,) = warnings.of_checkpoints(settings, 120_000_000, 10e6)
    assert "120 MB takes 12 s" in line


class ClosedBucket:
    """A bucket that refuses to tell its lifecycle rules and allows everything else."""

    uri = "s3://closed"

    def expiries(self) -> Any:
        raise PermissionError("AccessDenied")

    def diagnose(self, error: Exception) -> Fault | None:
        denied = isinstance(error, PermissionError)
        return Fault(FaultKind.PERMISSION, "AccessDenied") if denied else None

    def renew(self) -> None:
        """There are no credentials."""


def test_a_bucket_that_does_not_show_its_rules_is_to_be_looked_at() -> None:
    store = BucketStore(cast(Bucket, ClosedBucket()), "sweeps", Limits(1.0), "JOB_OUTPUT_URI")
    (line,) = warnings.of_expiry(store)
    assert line.startswith("s3://closed/sweeps: the bucket's lifecycle rules cannot be read")
