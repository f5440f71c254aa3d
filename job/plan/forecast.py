"""How long a trial takes and what it costs, before it runs: from shapes and counts, no GPU needed.

A frozen weight costs 2 FLOP a token in forward, 2 on the way back to the adapters, and 2 more where
activations are computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from job.training.footprint import Recompute
from job.training.memory import RECOMPUTED_SHARE, token_cost
from job.training.shape import ModelShape

# FLOP a second that a T4 gets out of its 65 TFLOPS, the slow and the fast end: 210 tokens/s of a
# 7.25 B model with all layers recomputed, the lowest of the published figures, and 350, this
# project's target. Neither was measured here.
T4_FLOPS = (210 * 6 * 7.25e9, 350 * 6 * 7.25e9)
# The tokens of a micro-batch behind those figures, as two rows of 512: what it takes to dequantise
# the weights for it is a part of them.
T4_ROW_TOKENS = 1024
# A CPU's trials against a step measured before them: what else runs there comes and goes.
CPU_SPREAD = (0.7, 1.2)


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
    """The work of a trial with one gradient accumulation, at most."""

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


def throughput_on_a_t4(
    shape: ModelShape, recompute: Recompute, row_tokens: float = T4_ROW_TOKENS
) -> Throughput:
    """A T4's throughput, from this project's target and the lowest published figure.

    `row_tokens` are those of a micro-batch on average: weights are dequantised once for all.
    """
    products = _flop_per_token(shape, recompute, 1.0) / token_cost(T4_ROW_TOKENS, 1.0)
    needed = products * token_cost(row_tokens, shape.quantised_share)
    slow, fast = (flops / needed for flops in T4_FLOPS)
    return Throughput(
        slow, fast, "a T4, by published figures and this project's target; not measured"
    )


def throughput_on_this_cpu(
    shape: ModelShape, shallow: ModelShape, tokens_per_second: float, target_share: float
) -> Throughput:
    """This CPU's throughput, from that of the same shape with fewer layers, measured now.

    `target_share` is the share of tokens that are targets: the head computes no others.
    """
    rate = tokens_per_second * _flop_per_token(shallow, "none", target_share)
    middle = rate / _flop_per_token(shape, "none", target_share)
    slow, fast = (share * middle for share in CPU_SPREAD)
    return Throughput(slow, fast, f"this CPU, by steps of {shallow.num_layers} layers just now")


def throughput_of_trials(tokens_per_second: Sequence[float]) -> Throughput:
    """The throughput of the sweep's committed trials: their median, give or take 5 %."""
    middle = median(tokens_per_second)
    count = len(tokens_per_second)
    trials = "trial" if count == 1 else "trials"
    return Throughput(0.95 * middle, 1.05 * middle, f"measured by {count} committed {trials}")


def trial_seconds(works: Sequence[Workload], throughput: Throughput, recompute: Recompute) -> Span:
    """The seconds of a trial's training clock: steps and evaluations, not starting and loading.

    From the shortest of `works` at the fast end to the longest at the slow one. An evaluation is
    one of the `2 + recomputed` forward passes that a training token costs.
    """
    passes = 2 + RECOMPUTED_SHARE[recompute]
    tokens = [work.train_tokens + work.eval_tokens / passes for work in works]
    return Span(min(tokens) / throughput.fast, max(tokens) / throughput.slow)


def _flop_per_token(shape: ModelShape, recompute: Recompute, target_share: float) -> float:
    # The head is a product too.
    weights = shape.linear_weights + target_share * shape.vocabulary * shape.hidden
    return 2 * weights * (2 + RECOMPUTED_SHARE[recompute])
