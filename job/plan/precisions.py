"""The base's precisions side by side: weights, peak, rate and hours of a trial in each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from job.base_model import BaseModel
from job.data.prepared import PreparedData
from job.plan.forecast import Span, Throughput, Workload, throughput_on_a_t4, trial_seconds
from job.plan.workload import memory_of, samples_of
from job.report.notation import amount, span
from job.settings import Settings
from job.training.memory import (
    RECOMPUTED_SHARE,
    TOKENS_PER_DEQUANTISATION,
    MemoryPlan,
    row_tokens,
    token_cost,
)
from job.training.quantization import is_in_4_bits, words
from job.training.shape import ModelShape, model_shape
from job.trial.weights import Costliest

# A CPU dequantises a matrix in the time of a product with so many tokens (benchmarks/training.md).
CPU_TOKENS_PER_DEQUANTISATION = 20


@dataclass(frozen=True)
class Precision:
    """The memory of a trial with the base in one precision, and what it dequantises."""

    quantization: str
    shape: ModelShape
    memory: MemoryPlan
    row_tokens: float  # of a micro-batch, on average
    tokens_per_dequantisation: float  # whose product takes as long as to dequantise the matrix

    @property
    def speed_against_4_bits(self) -> float:
        """Tokens a second, over those of the same plan in 4 bits; not measured."""
        return self._token_cost(1.0) / self._token_cost(self.shape.quantised_share)

    @property
    def relative_pace(self) -> float:
        """Tokens a second, in a unit that all precisions and plans share."""
        passes = 2 + RECOMPUTED_SHARE[self.memory.recompute]
        return 1 / (passes * self._token_cost(self.shape.quantised_share))

    def _token_cost(self, quantised_share: float) -> float:
        return token_cost(self.row_tokens, quantised_share, self.tokens_per_dequantisation)


@dataclass(frozen=True)
class Forecast:
    """A precision with the rate and the seconds of a trial."""

    precision: Precision
    throughput: Throughput
    taken: Span

    def __str__(self) -> str:
        memory = self.precision.memory
        size = "" if memory.predicted is None else _sizes(memory)
        rate = (
            f"{amount(self.throughput.slow)} to {amount(self.throughput.fast)} tokens/s,"
            f" {span(self.taken.short, self.taken.long)} a trial"
        )
        return (
            f"{words(self.precision.quantization)}: {size}{rate if memory.fits else 'does not fit'}"
        )

    def numbers(self) -> dict[str, Any]:
        """The forecast for a program."""
        predicted, fits = self.precision.memory.predicted, self.precision.memory.fits
        return {
            "quantization": self.precision.quantization,
            "weight_bytes": predicted.weights if predicted else None,
            "peak_bytes": predicted.total if predicted else None,
            "fits": fits,
            "pace": asdict(self.throughput) if fits else None,
            "trial_seconds": asdict(self.taken) if fits else None,
        }


def precision_of(
    settings: Settings, base: BaseModel, data: PreparedData, worst: Costliest, quantization: str
) -> Precision:
    """A trial's memory plan in this precision. The base's family is one with predictions."""
    memory = memory_of(settings, base, data, worst, quantization)
    shape = model_shape(base.config, quantization)
    assert shape is not None
    tokens = row_tokens(memory.token_budget, samples_of(settings, data, worst))
    cpu, t4 = CPU_TOKENS_PER_DEQUANTISATION, TOKENS_PER_DEQUANTISATION
    return Precision(quantization, shape, memory, tokens, cpu if settings.device == "cpu" else t4)


def forecast(
    precision: Precision, current: Precision, throughput: Throughput, works: Sequence[Workload]
) -> Forecast:
    """The rate and seconds in a precision, from the `throughput` that holds for another."""
    scaled = throughput.times(precision.relative_pace / current.relative_pace)
    return Forecast(precision, scaled, trial_seconds(works, scaled, precision.memory.recompute))


def over_all(found: Sequence[Forecast]) -> tuple[Throughput, Span]:
    """The rate and the seconds of a trial that may be in any of these precisions."""
    taken = [one.taken for one in found]
    span = Span(min(one.short for one in taken), max(one.long for one in taken))
    return _spanning([one.throughput for one in found]), span


def estimate_on_a_t4(found: Sequence[Precision]) -> Throughput:
    """A T4's rate in any of these precisions, by published figures."""
    return _spanning(
        [throughput_on_a_t4(one.shape, one.memory.recompute, one.row_tokens) for one in found]
    )


def _spanning(rates: Sequence[Throughput]) -> Throughput:
    slow, fast = min(rate.slow for rate in rates), max(rate.fast for rate in rates)
    return Throughput(slow, fast, rates[0].basis)


def modes_to_show(base: BaseModel, drawn: Iterable[str], mixed: str | None) -> list[str]:
    """The precisions that this base's files allow, those of the sweep among them."""
    if is_in_4_bits(base.config):
        return list(drawn)
    middle = [mode for mode in (mixed, *drawn) if mode]
    return list(dict.fromkeys(["nf4", *(mode for mode in middle if mode != "none"), "none"]))


def describe_precisions(found: Sequence[Forecast], current: Forecast) -> str:
    """A line for each precision, and a sentence on what 16 bits would bring."""
    lines = [str(one) for one in found]
    if len(found) == 1:
        lines.append(
            "the base's files are in 4 bits: 16 need the model that it was made of, in"
            " JOB_BASE_MODEL"
        )
    elif current.precision.quantization != "none":
        lines += [_advice(one, current) for one in found if one.precision.quantization == "none"]
    return "\n".join(lines)


def _advice(whole: Forecast, current: Forecast) -> str:
    """What 16 bits would bring; nothing is said of quality, which is not known beforehand."""
    shape, memory = whole.precision.shape, whole.precision.memory
    what = f"this {amount(shape.quantised_weights + shape.plain_weights)} base"
    if not memory.fits:
        return f"{what} does not fit in 16 bits"
    predicted, usable = memory.predicted, memory.usable_bytes
    peak = f"{predicted.total / 2**30:.1f}" if predicted else "?"
    room = f" at {peak} of {usable / 2**30:.1f} GiB" if usable else ""
    factor = f"{whole.throughput.fast / current.throughput.fast:.1f}"
    pace = "at the same pace" if factor == "1.0" else f"{factor} times as fast"
    return (
        f"{what} fits in 16 bits{room} and would train {pace} (JOB_QUANTIZATION=none);"
        " 4 bits are the default"
    )


def _sizes(memory: MemoryPlan) -> str:
    predicted = memory.predicted
    assert predicted is not None
    weights, peak = (size / 2**30 for size in (predicted.weights, predicted.total))
    return f"weights {weights:.2f} GiB, peak {peak:.2f} GiB, "
