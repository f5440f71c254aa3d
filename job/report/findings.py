"""Findings that a person should know beside a sweep's numbers: a sentence each, with a way out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from job.report.charts import inner_range
from job.report.importance import WEAK_BELOW_TRIALS, searched
from job.report.notation import trials
from job.report.overview import COMMITTED, Overview
from job.sweep.distributions import FloatRange
from job.training.quantization import words

BAYES_FROM_TRIALS = 8  # with fewer the ladder of learning rates decides, not the optimiser
TRUNCATED_SHARE = 0.25


def findings(overview: Overview) -> list[str]:
    """Everything worth saying, the most important first."""
    return [
        *_broken(overview),
        *_at_the_edge(overview),
        *_price_of_4_bits(overview),
        *_cut_short(overview),
        *_few(overview),
    ]


def _broken(overview: Overview) -> Iterator[str]:
    for view in overview.slots:
        if view.state in ("damaged", "given up"):
            way_out = f"`job redo {view.slot}` begins it anew"
            yield f"slot {view.slot} is {view.state}: {view.reason}; {way_out}"


def _at_the_edge(overview: Overview) -> Iterator[str]:
    best, definition = overview.best, overview.definition
    if best is None or definition is None:
        return
    for name, domain in searched(definition.parameters).items():
        if not isinstance(domain, FloatRange) or best not in overview.comparable:
            continue
        low, high = inner_range(domain)
        value = float(best.params[name])
        if not low <= value <= high:
            edge, end = ("lower", domain.min) if value < low else ("upper", domain.max)
            yield (
                f"the best trial's {name}, {value:g}, is in the outer tenth of its range at the"
                f" {edge} edge ({end:g}): widen it there in another sweep"
            )


def _price_of_4_bits(overview: Overview) -> Iterator[str]:
    """Compare the untuned base's losses where they were measured in several precisions."""
    untuned = {
        view.result.quantization: loss
        for view in overview.slots
        if view.result is not None
        for step, loss in view.curve[:1]
        if step == 0
    }
    whole = untuned.pop("none", None)
    for mode, loss in sorted(untuned.items()):
        if whole is not None:
            yield (
                f"held in {words(mode)}, the untuned base's eval/loss is {loss:.3f}, in 16 bits"
                f" {whole:.3f}: {1000 * (loss - whole):.0f} milli-nats are the price, of which"
                " training may win back a part"
            )


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
