"""The base's precisions side by side: weights, peak, rate and hours of a trial in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from job.base_model import BaseModel
from job.data.prepared import PreparedData
from job.plan.forecast import Span, Throughput, Workload, trial_seconds
from job.plan.workload import memory_of, samples_of
from job.report.notation import amount, span
from job.settings import Settings
from job.training.memory import (
    FILL,
    RECOMPUTED_SHARE,
    TOKENS_PER_DEQUANTISATION,
    MemoryPlan,
    row_tokens,
)
from job.training.quantization import is_in_4_bits, words
from job.training.shape import ModelShape, model_shape
from job.trial.weights import Costliest

# A CPU dequantises a matrix in the time of a product with so many tokens (benchmarks/training.md).
CPU_TOKENS_PER_DEQUANTISATION = 20


@dataclass(frozen=True)
class Precision:
    """The memory of a trial with the base in one precision, and its speed against 4 bits."""

    quantization: str
    shape: ModelShape
    memory: MemoryPlan
    speed: float  # tokens a second, over those of the same plan in 4 bits; not measured

    @property
    def fits(self) -> bool:
        """Whether the peak is within what a plan may take of the card; a CPU's has no limit."""
        predicted, usable = self.memory.predicted, self.memory.usable_bytes
        return predicted is None or usable is None or predicted.total <= FILL * usable

    @property
    def relative_pace(self) -> float:
        """Tokens a second, in a unit that all precisions share."""
        return self.speed / (2 + RECOMPUTED_SHARE[self.memory.recompute])


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
            f"{words(self.precision.quantization)}: {size}"
            f"{rate if self.precision.fits else 'does not fit'}"
        )

    def numbers(self) -> dict[str, Any]:
        """The forecast for a program."""
        predicted, fits = self.precision.memory.predicted, self.precision.fits
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
    share = (cpu if settings.device == "cpu" else t4) / tokens  # of a product's time
    speed = (1 + share) / (1 + share * shape.quantised_share)
    return Precision(quantization, shape, memory, speed)


def forecast(
    precision: Precision, current: Precision, throughput: Throughput, works: Sequence[Workload]
) -> Forecast:
    """The rate and seconds in a precision, from the `throughput` that holds for another."""
    scaled = throughput.times(precision.relative_pace / current.relative_pace)
    return Forecast(precision, scaled, trial_seconds(works, scaled, precision.memory.recompute))


def modes_to_show(base: BaseModel, current: str, mixed: str | None) -> list[str]:
    """The precisions that this base's files allow, the sweep's own among them."""
    if is_in_4_bits(base.config):
        return [current]
    middle = [mode for mode in (mixed, current) if mode]
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
    if not whole.precision.fits:
        return f"{what} does not fit in 16 bits"
    predicted, usable = memory.predicted, memory.usable_bytes
    peak = f"{predicted.total / 2**30:.1f}" if predicted else "?"
    room = f" at {peak} of {usable / 2**30:.1f} GiB" if usable else ""
    factor = whole.throughput.fast / current.throughput.fast
    return (
        f"{what} fits in 16 bits{room} and would train {factor:.1f} times as fast"
        " (JOB_QUANTIZATION=none); 4 bits are the default"
    )


def _sizes(memory: MemoryPlan) -> str:
    predicted = memory.predicted
    assert predicted is not None
    weights, peak = (size / 2**30 for size in (predicted.weights, predicted.total))
    return f"weights {weights:.2f} GiB, peak {peak:.2f} GiB, "
