"""Warnings before GPUs are paid for: one sentence each, with what to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from job.data.prepared import PreparedData
from job.data.unusable import listing
from job.plan.cards import Offer, Price
from job.plan.forecast import Span
from job.process.stop import EXIT_MARGIN_SECONDS
from job.progress import size
from job.report import notation
from job.report.findings import BAYES_FROM_TRIALS
from job.settings import Settings
from job.store.base import Store
from job.store.bucket import BucketStore
from job.sweep.definition import SweepDefinition
from job.training.memory import FILL, MemoryPlan
from job.training.quantization import words
from job.training.shape import largest_rank, model_shape
from job.trial.budget import Room
from job.trial.notices import not_understood
from job.trial.weights import Costliest, megabytes, ranks

CUT_SHARE = 0.05  # a larger share of rows over JOB_MAX_SEQ_LENGTH is worth a warning


def of_time(settings: Settings, span: Span) -> Iterator[str]:
    """Warn of trials that will not end within their budget."""
    budget = settings.trial_budget_hours * 3600
    if span.long > budget:
        certainty = "will" if span.short > budget else "may"
        yield (
            f"trials {certainty} be truncated: they take {notation.span(span.short, span.long)},"
            f" JOB_TRIAL_BUDGET_HOURS is {settings.trial_budget_hours:g};"
            " raise it or lower JOB_MAX_STEPS"
        )


def of_budgets(rooms: Sequence[Room], num_left: int) -> Iterator[str]:
    """Warn of a sweep's budget that ends it before so many trials that are not drawn yet."""
    for room in rooms:
        if room.least < num_left:
            most = min(room.most, num_left)
            count = str(most) if room.least == most else f"{room.least} to {most}"
            yield (
                f"the budget has room for about {count} more {'trial' if most == 1 else 'trials'},"
                f" not {num_left}: {room.spent} are spent, {room.variable} is {room.limit:g};"
                " raise it or lower JOB_NUM_TRIALS"
            )


def of_memory(plans: Mapping[str, MemoryPlan]) -> Iterator[str]:
    """Warn of precisions in which not even the smallest plan fits; a CPU's has no limit.

    `plans` are those of the precisions that may be drawn, first of the one that takes least.
    """
    unfit = {mode: memory for mode, memory in plans.items() if not memory.fits}
    if len(unfit) < len(plans):
        for mode, memory in unfit.items():
            yield (
                f"a trial in {words(mode)} {_lack(memory)}; it is then committed as"
                f" infeasible: leave {mode!r} out of the sweep's quantization"
            )
        return
    mode, memory = next(iter(unfit.items()))
    smaller = "" if mode == "nf4" else "JOB_QUANTIZATION=nf4, "
    yield (
        f"a trial {_lack(memory)}; it then ends without an adapter: lower JOB_MAX_SEQ_LENGTH, or"
        f" take {smaller}a smaller JOB_BASE_MODEL or a larger card (JOB_GPU_MEMORY_GB)"
    )


def _lack(memory: MemoryPlan) -> str:
    """How much a plan that does not fit lacks."""
    predicted, usable = memory.predicted, memory.usable_bytes
    assert predicted is not None
    assert usable is not None
    needs = f"smallest plan needs {predicted.total / 2**30:.3g} GiB of {usable / 2**30:.3g}"
    if predicted.total > usable:
        return f"does not fit: its {needs}"
    return f"may not fit: its {needs}, of which {FILL:.0%} are what can be planned for"


def of_adapters(
    settings: Settings, definition: SweepDefinition, config: Mapping[str, Any]
) -> Iterator[str]:
    """Warn of searched ranks whose adapters are over their limit; `check_adapter` has the rest."""
    shape, largest = model_shape(config), largest_rank(config, settings.max_adapter_mb * 1e6)
    _, highest = ranks(settings, definition)
    if shape is not None and largest is not None and highest > largest:
        needed = megabytes(2 * shape.adapter_weights(highest))
        yield (
            f"the sweep draws lora_r up to {highest}, and adapters above {largest} are over"
            f" JOB_MAX_ADAPTER_MB ({settings.max_adapter_mb:g}): such a trial ends without one;"
            f" leave these ranks out, or raise it to {needed}"
        )


def of_checkpoints(settings: Settings, checkpoint_bytes: int, rate: float) -> Iterator[str]:
    """Warn of checkpoints too big for the time after SIGTERM; `rate` is uploaded bytes a second."""
    left, seconds = settings.grace_seconds - EXIT_MARGIN_SECONDS, checkpoint_bytes / rate
    if seconds > left:
        yield (
            f"a checkpoint of {size(checkpoint_bytes)} takes {seconds:.0f} s to upload, and"
            f" {left:.0f} s are left after SIGTERM: a preempted trial falls back by up to"
            f" JOB_CHECKPOINT_MINUTES ({settings.checkpoint_minutes:g}); lower lora_r, or use a"
            " bucket in the nodes' region"
        )


def of_expiry(store: Store) -> Iterator[str]:
    """Warn of rules of the bucket that would delete a sweep's documents, live or finished."""
    if not isinstance(store, BucketStore):
        return
    expiries = store.expiries()
    if expiries is None:
        yield (
            f"{store.uri}: the bucket's lifecycle rules cannot be read with these credentials; make"
            " sure that none deletes what a sweep needs"
        )
    for rule in expiries or []:
        yield (
            f"{store.uri}: a lifecycle rule deletes objects under {rule.prefix or '/'} {rule.when}:"
            " a slot that loses its spec or result is damaged; leave this prefix out of it"
        )


def of_rows(settings: Settings, data: PreparedData) -> Iterator[str]:
    """Warn of columns without use, rows that are cut off, and too few rows to be judged by."""
    counts = data.counts
    if counts.columns_not_used:
        yield (
            f"columns not used: {listing(counts.columns_not_used)}: if one belongs to the prompt,"
            " name it in JOB_PROMPT_TEMPLATE"
        )
    cut = counts.truncated + counts.too_long
    if cut > CUT_SHARE * counts.selected:
        yield (
            f"{cut / counts.selected:.0%} of the rows are longer than JOB_MAX_SEQ_LENGTH"
            f" ({settings.max_seq_length} tokens) and lose their end: raise it"
        )
    if counts.eval < settings.eval_rows:
        or_more = " or JOB_SUBSAMPLE_FRACTION" if settings.row_fraction < 1 else ""
        yield (
            f"only {counts.eval} rows are held out, JOB_EVAL_ROWS asks for {settings.eval_rows}:"
            f" raise JOB_EVAL_FRACTION{or_more}"
        )


def of_notices(settings: Settings) -> Iterator[str]:
    """Warn of notification URLs that nobody would hear of."""
    if settings.notify_urls is not None and (wrong := not_understood(settings)):
        numbers = ", ".join(map(str, wrong))
        yield (
            f"JOB_NOTIFY_URLS: URL {numbers} is not understood by apprise, nothing will be sent by"
            " it; its list of services says how each is written"
        )


def of_cards(prices: Sequence[Price], offers: Sequence[Offer]) -> Iterator[str]:
    """Warn of cards that have a price and no rate: the base's family is one without predictions."""
    known = {offer.price.card for offer in offers}
    for card in (price.card for price in prices if price.card not in known):
        yield (
            f"--price {card}: the base's family is one without predictions, so no rate of this card"
            " is known before a trial of the sweep has ended on it"
        )


def of_few(settings: Settings, definition: SweepDefinition) -> Iterator[str]:
    """Warn of too few trials for the method."""
    if definition.method == "bayes" and settings.num_trials < BAYES_FROM_TRIALS:
        yield (
            f"with {notation.trials(settings.num_trials)} the first learning rates decide, not the"
            f" Bayesian optimiser: it helps from {BAYES_FROM_TRIALS} trials on (JOB_NUM_TRIALS)"
        )


def of_steps(settings: Settings, definition: SweepDefinition, data: PreparedData) -> Iterator[str]:
    """Warn of optimizer steps that take more samples than there are rows to train on."""
    largest = max(Costliest.of(settings, definition).accumulation)
    samples, rows = settings.per_device_train_batch_size * largest, data.counts.train
    if samples > rows:
        yield (
            f"a step takes {samples:,} samples and there are {rows:,} rows to train on: it goes"
            f" over all of them {samples / rows:,.1f} times; lower JOB_GRADIENT_ACCUMULATION_STEPS"
            " (or the sweep's gradient_accumulation_steps) or JOB_PER_DEVICE_TRAIN_BATCH_SIZE"
        )
