"""Findings that a person should know beside a sweep's numbers: a sentence each, with a way out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from job.report.charts import inner_range
from job.report.importance import WEAK_BELOW_TRIALS, searched
from job.report.notation import trials
from job.report.overview import COMMITTED, Overview
from job.sweep.distributions import FloatRange, IntRange

BAYES_FROM_TRIALS = 8  # with fewer the ladder of learning rates decides, not the optimiser
TRUNCATED_SHARE = 0.25


def findings(overview: Overview) -> list[str]:
    """Everything worth saying, the most important first."""
    kinds = (_broken, _four_bits, _at_the_edge, _cut_short, _few)
    return [finding for kind in kinds for finding in kind(overview)]


def _broken(overview: Overview) -> Iterator[str]:
    for view in overview.slots:
        if view.state in ("damaged", "given up"):
            way_out = f"`job redo {view.slot}` begins it anew"
            yield f"slot {view.slot} is {view.state}: {view.reason}; {way_out}"


def _four_bits(overview: Overview) -> Iterator[str]:
    yield from overview.prices_of_4_bits
    best = overview.merges.get(overview.best.slot) if overview.best else None
    if best is not None and best.written is not None:
        way = "its 16-bit base" if best.written == "16bit" else "the dequantised base"
        loss = best.merged_16bit if best.written == "16bit" else best.merged_4bit
        told = "not measured" if loss is None else f"{loss:.4f}"
        yield f"the best adapter merged into {way}: eval/loss {told}"


def _at_the_edge(overview: Overview) -> Iterator[str]:
    best, definition = overview.best, overview.definition
    if best is None or definition is None:
        return
    for name, domain in searched(definition.parameters).items():
        if not isinstance(domain, FloatRange | IntRange) or best not in overview.comparable:
            continue
        low, high = inner_range(domain)
        value = float(best.params[name])
        if low <= value <= high:
            continue
        edge, end = ("lower", domain.min) if value < low else ("upper", domain.max)
        where = f"at the {edge} edge ({end:g})"
        if value == end:
            place = f"is {where} of its range"
        else:
            place = f"is in the outer tenth of its range {where}"
        yield f"the best trial's {name}, {value:g}, {place}: widen it there in another sweep"


def _cut_short(overview: Overview) -> Iterator[str]:
    states: Counter[str] = Counter(view.state for view in overview.slots)
    committed = sum(states[state] for state in COMMITTED)
    if states["truncated"] > TRUNCATED_SHARE * committed:
        yield (
            f"{states['truncated']} of {committed} trials were cut short by their budget: raise"
            " JOB_TRIAL_BUDGET_HOURS, or lower JOB_MAX_STEPS in another sweep"
        )
    if states["infeasible"]:
        reasons = sorted({v.reason or "" for v in overview.slots if v.state == "infeasible"})
        yield f"{states['infeasible']} of {committed} trials could not run: {'; '.join(reasons)}"
    if states["diverged"] > TRUNCATED_SHARE * committed:
        yield (
            f"{states['diverged']} of {committed} trials diverged: lower the learning rate's max in"
            " another sweep"
        )


def _few(overview: Overview) -> Iterator[str]:
    definition = overview.definition
    if definition is None:
        return
    num_slots = len(overview.slots)
    if definition.method == "bayes" and num_slots < BAYES_FROM_TRIALS:
        yield (
            f"with {trials(num_slots)} the first learning rates decide, not the Bayesian optimiser:"
            f" it helps from {BAYES_FROM_TRIALS} trials on (JOB_NUM_TRIALS)"
        )
    judged = sum(view.judged for view in overview.slots)
    if 0 < judged < WEAK_BELOW_TRIALS:
        yield (
            f"importances rest on {trials(judged)} and are weak evidence below {WEAK_BELOW_TRIALS}"
        )
