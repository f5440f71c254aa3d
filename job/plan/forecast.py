"""How long a trial takes and what it costs, before it runs: from shapes and counts, no GPU needed.

A frozen weight costs 2 FLOP a token in forward, 2 on the way back to the adapters, and 2 more where
activations are computed again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from job.training.footprint import Recompute
from job.training.memory import RECOMPUTED_SHARE
from job.training.shape import ModelShape

# FLOP a second that a T4 gets out of its 65 TFLOPS, the slow and the fast end: 210 tokens/s of a
# 7.25 B model with all layers recomputed, the lowest of the published figures, and 350, this
# project's target. Neither was measured here.
T4_FLOPS = (210 * 6 * 7.25e9, 350 * 6 * 7.25e9)
# A tiny 4-bit model reaches this share of a plain matrix product's speed on a CPU: the demo's 2.0 M
# weights on one core.
CPU_SHARE = (0.1, 0.3)


@dataclass(frozen=True)
class Throughput:
    """Real training tokens a second, from slow to fast, and where the numbers come from."""

    slow: float
    fast: float
    basis: str

    def times(self, factor: float) -> Throughput:
        return Throughput(self.slow * factor, self.fast * factor, self.basis)


@dataclass(frozen=True)
class Workload:
    """The work of a trial, at most."""

    steps: int
    train_tokens: int
    eval_tokens: int  # of all evaluations together


@dataclass(frozen=True)
class Span:
    """Seconds, from the fast to the slow end."""

    short: float
    long: float

    def times(self, factor: float) -> Span:
        return Span(self.short * factor, self.long * factor)


def throughput_on_a_t4(shape: ModelShape, recompute: Recompute) -> Throughput:
    """A T4's throughput, from this project's target and the lowest published figure."""
    needed = _flop_per_token(shape, recompute)
    slow, fast = (flops / needed for flops in T4_FLOPS)
    return Throughput(
        slow, fast, "a T4, by published figures and this project's target; not measured"
    )


def throughput_on_this_cpu(shape: ModelShape) -> Throughput:
    """This CPU's throughput, from a matrix product of the model's width, timed now."""
    needed = _flop_per_token(shape, "none")
    slow, fast = (share * _matrix_flops(shape) / needed for share in CPU_SHARE)
    return Throughput(slow, fast, "this CPU, from a matrix product; rough")


def throughput_of_trials(tokens_per_second: Sequence[float]) -> Throughput:
    """The throughput of the sweep's committed trials: their median, give or take 5 %."""
    middle = median(tokens_per_second)
    count = len(tokens_per_second)
    trials = "trial" if count == 1 else "trials"
    return Throughput(0.95 * middle, 1.05 * middle, f"measured by {count} committed {trials}")


def trial_seconds(work: Workload, throughput: Throughput, recompute: Recompute) -> Span:
    """The seconds of a trial's training clock: steps and evaluations, not starting and loading.

    An evaluation is one of the `2 + recomputed` forward passes that a training token costs.
    """
    tokens = work.train_tokens + work.eval_tokens / (2 + RECOMPUTED_SHARE[recompute])
    return Span(tokens / throughput.fast, tokens / throughput.slow)


def _flop_per_token(shape: ModelShape, recompute: Recompute) -> float:
    weights = shape.linear_weights + shape.vocabulary * shape.hidden  # the head is a product too
    return 2 * weights * (2 + RECOMPUTED_SHARE[recompute])


def _matrix_flops(shape: ModelShape) -> float:
    """FLOP a second of a product of 512 tokens with a feed-forward matrix, the best of five."""
    num_tokens = 512
    rows = np.ones((num_tokens, shape.hidden), dtype=np.float32)
    matrix = np.ones((shape.hidden, shape.intermediate), dtype=np.float32)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        rows @ matrix
        seconds.append(time.perf_counter() - started)
    return 2 * num_tokens * shape.hidden * shape.intermediate / max(1e-9, min(seconds))
