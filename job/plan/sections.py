"""The parts of a plan in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from job.base_model import BaseModel, is_hub_name
from job.data.prepared import PreparedData
from job.data.table_files import count_lines
from job.errors import OutageError
from job.ledger.accounts import dollars
from job.plan.forecast import Span, Throughput, Workload
from job.progress import size
from job.report.gain import Outlook, gain_lines
from job.report.importance import searched
from job.report.notation import amount, span, trials
from job.report.overview import Overview
from job.settings import Settings
from job.staged_base import find_staged, hub_files
from job.store.base import Store
from job.sweep.builtin import most_trials
from job.sweep.definition import SweepDefinition
from job.sweep.stopping import MIN_ENDED
from job.training.families import Coverage
from job.training.memory import MemoryPlan
from job.training.quantization import words
from job.training.shape import ModelShape


def describe_sweep(
    settings: Settings, definition: SweepDefinition, sweep: str, num_excluded: int = 0
) -> str:
    names = ", ".join(searched(definition.parameters)) or "nothing"
    count, why = num_drawable(settings, definition, num_excluded)
    told = trials(count)
    if why is not None:
        told = f"{count} of {settings.num_trials} trials can be drawn ({why})"
    return f"{sweep}: {told}, {definition.method} over {names}"


def num_drawable(
    settings: Settings, definition: SweepDefinition, num_excluded: int = 0
) -> tuple[int, str | None]:
    """The number of trials that can be drawn; why these are not all of JOB_NUM_TRIALS, or None.

    `num_excluded` slots can never be: a person excluded them before they were drawn.
    """
    limit = None if settings.wandb_sweep_id is not None else most_trials(definition)
    left = settings.num_trials - num_excluded
    if limit is not None and limit[0] < left:
        return limit
    excluded = f"{num_excluded} {'is' if num_excluded == 1 else 'are'} excluded"
    return left, excluded if num_excluded else None


def num_excluded(settings: Settings, overview: Overview) -> int:
    """The number of the sweep's slots that were excluded before they were drawn."""
    return sum(
        view.state == "excluded" and view.planned_steps is None
        for view in overview.slots[: settings.num_trials]
    )


def num_left(num_drawable: int, overview: Overview) -> int:
    """The number of trials that are not drawn yet, of so many that can be."""
    num_empty = sum(view.state == "empty" for view in overview.slots)
    return max(0, min(num_empty, num_drawable - (len(overview.slots) - num_empty)))


def describe_base(base: BaseModel, shape: ModelShape | None) -> str:
    if shape is None:
        family = base.config.get("model_type")
        return (
            f"{base.name} at {base.revision[:19]}: {family}, a family without predictions; whether"
            " its adapters are within JOB_MAX_ADAPTER_MB is known once one is made"
        )
    weights = amount(shape.quantised_weights + shape.plain_weights)
    return f"{base.name} at {base.revision[:19]}: {weights} weights"


def describe_coverages(found: Sequence[Coverage]) -> str:
    """The shares in 4 bits and adapted; from the lowest where the sweep draws the precision."""
    low, high = (choose(one.quantised for one in found) for choose in (min, max))
    if low == high:
        return str(found[0])
    adapted = f"{found[0].adapted:.0%} adapted"
    return f"{low:.0%} to {high:.0%} of its linear weights in 4 bits, {adapted}"


def describe_memory(memory: MemoryPlan, drawn: str | None) -> str:
    """The plan, with the precision that it is for where that is `drawn`."""
    return str(memory) if drawn is None else f"{words(drawn)}: {memory}"


def describe_copies(settings: Settings, store: Store, base: BaseModel) -> Iterator[str]:
    """How much of the base each worker with an empty disk fetches, and from where."""
    if not is_hub_name(base.name):
        return
    if (staged := find_staged(store, base.name, base.revision)) is not None:
        yield f"staged: workers take its {size(staged.size_bytes)} from {store.uri}, not the hub"
        return
    try:
        num_bytes = sum(file.size_bytes for file in hub_files(base.name, base.revision))
    except OutageError:  # offline, or the hub is slow: a plan without this line is still one
        return
    yield (
        f"every worker with an empty disk fetches {size(num_bytes)} from the hub, up to"
        f" {size(settings.num_trials * num_bytes)} in all; `job stage` copies it once to the bucket"
    )


def describe_rows(data: PreparedData) -> str:
    """One line, and below it a table of what became of the rows."""
    counts, lengths = data.counts, data.train.lengths
    summary = (
        f"{counts.rows_read} read, {counts.train} to train on and {counts.eval} held out,"
        f" {lengths.mean():.0f} tokens each on average, {lengths.max()} at most"
    )
    return "\n".join([summary, *count_lines(counts)])


def describe_trial(works: Sequence[Workload], throughput: Throughput, taken: Span) -> str:
    steps = _range(map(str, sorted(work.steps for work in works)))
    tokens = _range(map(amount, sorted(work.train_tokens for work in works)))
    return (
        f"{steps} steps, {tokens} tokens at {amount(throughput.slow)} to"
        f" {amount(throughput.fast)} tokens/s ({throughput.basis}): {span(taken.short, taken.long)}"
    )


def _range(ascending: Iterable[str]) -> str:
    """The first and the last value as words, or the one that both are."""
    values = list(ascending)
    return values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def describe_cost(settings: Settings, trial: Span) -> str:
    sweep = trial.times(settings.num_trials)
    processor = "CPU" if settings.device == "cpu" else "GPU"
    time = f"{span(sweep.short, sweep.long)} of {processor}"
    if (price := settings.gpu_hourly_usd) is None:
        money = "dollars with JOB_GPU_HOURLY_USD"
    else:
        low, high = (seconds / 3600 * price for seconds in (sweep.short, sweep.long))
        money = "under a cent" if high < 0.01 else f"{dollars(low)} to {dollars(high)}"
    return f"{trials(settings.num_trials)}: {time} at most, {money}"


def describe_end(
    settings: Settings, definition: SweepDefinition, overview: Overview, outlook: Outlook
) -> str:
    """When the sweep ends, and, once it runs, what another trial is expected to gain."""
    min_gain, num_trials = settings.min_gain, trials(settings.num_trials)
    price = settings.gpu_hourly_usd
    if said := gain_lines(overview, outlook, min_gain=min_gain, usd_per_hour=price):
        return said[0]
    if settings.wandb_sweep_id is not None:
        return f"after {num_trials}, or earlier: W&B decides when its sweep ends"
    if definition.method != "bayes" or settings.num_trials <= MIN_ENDED:
        return f"after {num_trials}"
    if not min_gain:
        return f"after {num_trials}, whatever another one is expected to gain (JOB_MIN_GAIN=0)"
    return (
        f"after {num_trials}, or from {MIN_ENDED} on once another one is expected to gain less than"
        f" {min_gain:g} nats of eval/loss twice running (JOB_MIN_GAIN; 0 switches that off)"
    )
