"""The choice of a trial's token budget and recompute mode, by predicted memory. Imports no torch.

It needs only the base model's config.json, so `job plan` can make it before a GPU is paid for.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from job.training.families import is_packed
from job.training.footprint import FP16_CUDA, Footprint, Recompute, Work, footprint
from job.training.shape import ModelShape, model_shape

CPU_TOKEN_BUDGET = 4096
MAX_TOKEN_BUDGET = 8192  # beyond it a T4's matrix products get no faster
BUDGET_STEP = 256  # tokens between two budgets that are considered
# Share of the usable memory that a predicted peak may take: 13.5 GB of a T4. The rest is left for
# what cannot be predicted, such as kernels' own memory and gaps between the allocator's blocks.
FILL = 0.86
# Dequantising a weight (0.5 bytes read, 2 written, at a T4's 240 GB/s) takes as long as multiplying
# it with this many tokens (2 FLOP each at 24 TFLOPS). From the data sheet, not measured.
TOKENS_PER_DEQUANTISATION = 125
RECOMPUTED_SHARE: dict[Recompute, float] = {"none": 0.0, "second": 0.5, "all": 1.0}
# Steps of a normal distribution that stand for all: what they hold is a sum of lengths.
QUANTILES = [statistics.NormalDist().inv_cdf((i + 0.5) / 9) for i in range(9)]
T4_USABLE_BYTES = int(14.6 * 2**30)  # the most that torch's allocator gets on a T4


@dataclass(frozen=True)
class Samples:
    """What a memory plan needs to know of the rows; lengths in tokens."""

    longest: int
    mean: float
    deviation: float  # standard deviation of the lengths
    per_step: int  # samples of an optimizer step

    @classmethod
    def of(cls, lengths: NDArray[np.int64], per_step: int) -> Samples:
        """Of rows with these lengths."""
        return cls(int(lengths.max()), float(lengths.mean()), float(lengths.std()), per_step)


@dataclass(frozen=True)
class MemoryPlan:
    """How much a micro-batch holds, and which layers' activations are recomputed in backward."""

    token_budget: int  # tokens of a micro-batch, at most (a longer sample goes alone)
    recompute: Recompute = "none"
    predicted: Footprint | None = None  # None: on a CPU, or a family that we cannot predict
    usable_bytes: int | None = None
    warm_up: bool = False  # try the heaviest micro-batch before the first step
    relative_cost: float = math.nan  # time of a token; 1 is a forward pass without dequantising
    rivals: tuple[MemoryPlan, ...] = ()  # fit as well; the warm-up times them against this one

    @property
    def fits(self) -> bool:
        """Whether the peak is within what a plan may take of the card; a CPU's has no limit."""
        predicted, usable = self.predicted, self.usable_bytes
        return predicted is None or usable is None or predicted.total <= FILL * usable

    @property
    def words(self) -> str:
        """The plan itself, without what is predicted of it."""
        layers = {"none": "no layer", "second": "every second layer", "all": "all layers"}
        return f"{self.token_budget} tokens a micro-batch, {layers[self.recompute]} recomputed"

    def __str__(self) -> str:
        text = self.words
        if self.predicted is None:
            return text
        limit = "" if self.usable_bytes is None else f" of {_gib(self.usable_bytes)}"
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in vars(self.predicted).items())
        return f"{text}; predicted peak {_gib(self.predicted.total)}{limit} GiB ({parts})"


def plan_memory(
    config: Mapping[str, Any],
    samples: Samples,
    *,
    lora_r: int,
    lora_dropout: float,
    per_device_train_batch_size: int,
    usable_bytes: int | None,
    quantization: str = "nf4",
) -> MemoryPlan:
    """Choose the plan of least predicted cost whose peak fits `usable_bytes` (None: a CPU).

    The cost is a T4's by its data sheet; on a card that its host keeps waiting the order is another
    (an H100: up to 1.5 times as fast with the costliest of three). So the best plan of each other
    recompute mode comes with it, as a rival that the warm-up times.
    On a CPU memory is no concern and nothing is recomputed. A family whose memory cannot be
    predicted gets room for `per_device_train_batch_size` longest samples, with all layers
    recomputed. Where no plan fits, it is the smallest one, which the warm-up then tries.
    """
    if usable_bytes is None:
        return MemoryPlan(CPU_TOKEN_BUDGET)
    shape = model_shape(config, quantization)
    if shape is None or not is_packed(config.get("model_type")):
        budget = per_device_train_batch_size * samples.longest
        return MemoryPlan(budget, "all", usable_bytes=usable_bytes, warm_up=True)
    plans = list_plans(
        shape, samples, lora_r=lora_r, lora_dropout=lora_dropout, usable_bytes=usable_bytes
    )
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return min(plans, key=_peak)
    # Of equal cost, as all budgets are where nothing is dequantised: the fewest micro-batches.
    fitting.sort(
        key=lambda plan: (
            round(plan.relative_cost, 3),
            -round(row_tokens(plan.token_budget, samples)),
            _peak(plan),
        )
    )
    best_of_mode = {plan.recompute: plan for plan in reversed(fitting)}
    first, *rivals = sorted(best_of_mode.values(), key=fitting.index)
    return replace(first, rivals=tuple(rivals))


def list_plans(
    shape: ModelShape, samples: Samples, *, lora_r: int, lora_dropout: float, usable_bytes: int
) -> list[MemoryPlan]:
    """List the plans of all budgets from the longest sample to a whole step, in every mode."""
    whole_step = min(MAX_TOKEN_BUDGET, samples.longest * samples.per_step)
    budgets = {samples.longest, *range(BUDGET_STEP, whole_step, BUDGET_STEP), whole_step}
    plans = []
    for budget in sorted(b for b in budgets if b >= samples.longest):
        for recompute in RECOMPUTED_SHARE:
            # All tokens count as targets: the memory of those that are none is small.
            work = Work(budget, budget, lora_r, lora_dropout > 0, recompute)
            plans.append(
                MemoryPlan(
                    budget,
                    recompute,
                    footprint(shape, work, FP16_CUDA),
                    usable_bytes,
                    warm_up=True,
                    relative_cost=_relative_cost(budget, recompute, samples, shape.quantised_share),
                )
            )
    return plans


def _relative_cost(
    budget: int, recompute: Recompute, samples: Samples, quantised_share: float
) -> float:
    """Estimate the time of a token: forward, backward and recomputing, each dequantises once.

    As weights are frozen, backward costs one product with each weight, as forward does.
    """
    return (2 + RECOMPUTED_SHARE[recompute]) * token_cost(
        row_tokens(budget, samples), quantised_share
    )


def token_cost(
    row_tokens: float,
    quantised_share: float,
    tokens_per_dequantisation: float = TOKENS_PER_DEQUANTISATION,
) -> float:
    """The time of a token in a weight's product and in dequantising it, over the product's alone.

    A micro-batch of `row_tokens` shares one dequantising, which takes as long as the product with
    `tokens_per_dequantisation` tokens: by default a T4's, by its data sheet.
    """
    return 1 + quantised_share * tokens_per_dequantisation / row_tokens


def row_tokens(budget: int, samples: Samples) -> float:
    """The tokens of a micro-batch with this budget, on average over steps light and heavy."""
    mean = samples.mean * samples.per_step
    deviation = samples.deviation * math.sqrt(samples.per_step)
    full = max(samples.mean, budget - samples.mean / 2)  # half a sample stays free on average
    steps = [max(samples.mean, mean + deviation * quantile) for quantile in QUANTILES]
    return mean / statistics.mean(1 if s <= budget else math.ceil(s / full) for s in steps)


def _peak(plan: MemoryPlan) -> int:
    assert plan.predicted is not None
    return plan.predicted.total


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
