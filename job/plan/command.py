"""`job plan`: what a sweep will do, need and cost, tried as far as is possible without a GPU."""

from __future__ import annotations

import json
import os
import tempfile
import time
import uuid
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from job.base_model import BaseModel
from job.data.prepared import PreparedData
from job.data.preview import Piece, bracketed, coloured, preview
from job.data.tokens import load_tokenizer
from job.ledger.ledger import Ledger
from job.ledger.records import Recipe
from job.plan import advice, warnings
from job.plan.cards import Price, check_cards, describe_offers, offers, read_prices
from job.plan.forecast import (
    Span,
    Throughput,
    Workload,
    throughput_of_trials,
    throughput_on_this_cpu,
    trial_seconds,
)
from job.plan.precisions import (
    Precision,
    describe_precisions,
    estimate_on_a_t4,
    forecast,
    modes_to_show,
    over_all,
    precision_of,
)
from job.plan.sections import (
    describe_base,
    describe_copies,
    describe_cost,
    describe_coverages,
    describe_end,
    describe_memory,
    describe_rows,
    describe_sweep,
    describe_trial,
    num_drawable,
    num_excluded,
    num_left,
)
from job.plan.workload import memory_of, usable_bytes_of, workloads_of
from job.progress import size
from job.report.gain import outlook_of
from job.report.overview import Overview, read_overview
from job.settings import Settings
from job.store import open_store, probe
from job.store.base import Store
from job.sweep.definition import SweepDefinition
from job.training.families import check_base
from job.training.memory import MemoryPlan
from job.training.shape import largest_rank, model_shape
from job.trial.budget import rooms
from job.trial.identity import check_rows, load_sweep, sweep_identity
from job.trial.prepare import find_base, mixed_of_sweep, prepare_data
from job.trial.slots import check_work_dir
from job.trial.warm_start import describe as describe_warm_start
from job.trial.warm_start import read_earlier_best
from job.trial.weights import Costliest, quantizations

RATE_PROBE_BYTES = 4 * 2**20  # uploaded once to learn how fast checkpoints will go


@dataclass
class Plan:
    """The plan as far as it is known; printed as it comes, or as JSON at the end."""

    sections: dict[str, str] = field(default_factory=dict)
    sample: list[Piece] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Inputs:
    """What the trials of the sweep will be made of."""

    definition: SweepDefinition
    ledger: Ledger
    base: BaseModel
    data: PreparedData
    overview: Overview
    prices: Sequence[Price] = ()  # of kinds of card


def run_plan(options: Namespace, settings: Settings) -> None:
    """Print the plan. Raises what the trial would raise, so that the exit code is the job's."""
    plan = Plan()
    console = Console(stderr=options.json, highlight=False, soft_wrap=True)
    prices = read_prices(options.price or ())
    for section in _sections(settings, plan, prices):
        console.print(section_text(plan, section, console))
    if options.json:
        said = {"warnings": plan.warnings, "advice": plan.advice}
        print(json.dumps({"sections": plan.sections, **plan.numbers, **said}))
        return
    for warning in plan.warnings:
        console.print(f"[yellow]warning[/]    {warning}")
    for line in plan.advice:
        console.print(f"[cyan]advice[/]     {line}")


def section_text(plan: Plan, section: str, console: Console) -> Text:
    """The section under its name; on a terminal colours mark what a sample teaches."""
    text = plan.sections[section]
    if section == "sample" and console.is_terminal and not console.no_color:
        text = coloured(plan.sample)
    words = Text.from_ansi(text.replace("\n", "\n" + " " * 11))
    return Text.assemble((f"{section:11}", "bold"), words)


def _sections(settings: Settings, plan: Plan, prices: Sequence[Price] = ()) -> Iterator[str]:
    """Work the plan out section by section; yield the name of each as soon as it is known."""
    store = open_store(settings.output_uri, outage_seconds=60 * settings.outage_minutes)
    definition, sweep = load_sweep(settings, store, lambda: None)
    check_work_dir(settings.work_dir)
    rate = _try_store(store)
    ledger = Ledger(store, sweep)
    overview = read_overview(ledger, settings.num_trials)
    excluded = num_excluded(settings, overview)
    plan.sections["sweep"] = describe_sweep(settings, definition, sweep, excluded)
    yield "sweep"
    plan.numbers["upload_bytes_per_second"] = round(rate)
    plan.sections["store"] = f"{store.uri}: conditional writes hold, {size(rate)}/s up"
    yield "store"
    plan.warnings += warnings.of_expiry(store)
    check_cards(prices, overview)
    # From here on for what can be drawn: the rest takes no hours and no money.
    drawable, _ = num_drawable(settings, definition, excluded)
    settings = settings.model_copy(update={"num_trials": drawable})
    earlier = read_earlier_best(settings, definition, ledger)
    base = find_base(settings, definition, ledger, lambda: None)
    _show_base(settings, plan, definition, store, base)
    yield "base"
    data = prepare_data(settings, base, ledger, lambda: None)
    check_rows(base, data)
    ledger.check_identity(sweep_identity(settings, definition, base, data, earlier))
    plan.numbers["data"] = {"digest": data.digest, **asdict(data.counts)}
    plan.sections["rows"] = describe_rows(data)
    yield "rows"
    plan.sample = _sample(data, base)
    plan.sections["sample"] = bracketed(plan.sample)
    yield "sample"
    if earlier is not None:
        plan.sections["warm start"] = describe_warm_start(earlier, definition, settings)
        yield "warm start"
    inputs = Inputs(definition, ledger, base, data, overview, prices)
    yield from _forecast(settings, plan, inputs, rate)
    _warn_and_advise(settings, plan, definition, data)


def _show_base(
    settings: Settings, plan: Plan, definition: SweepDefinition, store: Store, base: BaseModel
) -> None:
    """What the base is, in every precision that may be drawn, and where workers take it from."""
    modes = quantizations(settings, definition)
    coverages = [check_base(base.name, base.config, mode) for mode in reversed(modes)]
    plan.numbers["base"] = asdict(coverages[-1])
    described = f"{describe_base(base, model_shape(base.config))}; {describe_coverages(coverages)}"
    plan.sections["base"] = "\n".join([described, *describe_copies(settings, store, base)])


def _warn_and_advise(
    settings: Settings, plan: Plan, definition: SweepDefinition, data: PreparedData
) -> None:
    """What is said of rows and settings whatever the forecast is."""
    plan.warnings += warnings.of_rows(settings, data)
    plan.warnings += warnings.of_steps(settings, definition, data)
    plan.warnings += warnings.of_few(settings, definition)
    plan.warnings += warnings.of_notices(settings)
    plan.advice += advice.of_range(settings, definition)
    plan.advice += advice.of_trials(settings, definition)


def _forecast(settings: Settings, plan: Plan, inputs: Inputs, rate: float) -> Iterator[str]:
    """The sections on what trials need and cost, and when the sweep ends."""
    needs, config = _needs(settings, inputs), inputs.base.config
    modes, memory = needs.modes, needs.plans[needs.modes[-1]]
    plan.sections["memory"] = describe_memory(memory, modes[-1] if len(needs.plans) > 1 else None)
    plan.numbers["memory"] = _memory_numbers(memory)
    yield "memory"
    plan.warnings += warnings.of_memory(needs.plans)
    plan.warnings += warnings.of_adapters(settings, inputs.definition, config)
    on_a_t4 = None
    if model_shape(config) is not None:
        own = [
            precision_of(settings, inputs.base, inputs.data, needs.costliest, mode)
            for mode in modes
        ]
        on_a_t4 = estimate_on_a_t4(own)
        yield from _precision_sections(settings, plan, inputs, needs, own)
        plan.warnings += warnings.of_checkpoints(settings, needs.checkpoint_bytes(config), rate)
        fits = partial(_fits, settings, inputs, needs.costliest, modes[-1])
        plan.advice += advice.of_rank(settings, inputs.definition, fits)
    else:
        pace = None
        if (measured := _measured(inputs.overview)) is not None:
            pace = measured, trial_seconds(needs.works, measured, memory.recompute)
        yield from _trial_sections(settings, plan, inputs, needs.works, pace)
    cards = offers(inputs.prices, inputs.overview, on_a_t4, needs.works, memory.recompute)
    plan.warnings += warnings.of_cards(inputs.prices, cards)
    if cards:
        plan.numbers["cards"] = [asdict(offer) for offer in cards]
        plan.sections["cards"] = describe_offers(cards, settings.num_trials)
        yield "cards"
    outlook = outlook_of(inputs.overview)
    plan.numbers["expected_gain_nats"] = outlook.gain
    plan.sections["end"] = describe_end(settings, inputs.definition, inputs.overview, outlook)
    yield "end"


@dataclass(frozen=True)
class _Needs:
    """What the costliest trial of the sweep needs, in each precision that it may be drawn in."""

    costliest: Costliest
    works: Sequence[Workload]
    mixed: str | None  # what a plain `mixed` is in this sweep
    plans: Mapping[str, MemoryPlan]  # first that of the precision that takes least memory

    @property
    def modes(self) -> list[str]:
        """The precisions that fit the card; where none does, the one that comes nearest to it."""
        return [mode for mode, memory in self.plans.items() if memory.fits] or [*self.plans][:1]

    def checkpoint_bytes(self, config: Mapping[str, Any]) -> int:
        """A checkpoint's size: weights and two moments, in fp32."""
        shape = model_shape(config)
        assert shape is not None
        return 12 * shape.adapter_weights(self.costliest.lora_r)


def _needs(settings: Settings, inputs: Inputs) -> _Needs:
    base, data, costliest = inputs.base, inputs.data, Costliest.of(settings, inputs.definition)
    mixed = _mixed(settings, inputs)
    drawn = quantizations(settings, inputs.definition)
    modes = [mixed if mixed and mode == "mixed" else mode for mode in drawn]
    plans = {mode: memory_of(settings, base, data, costliest, mode) for mode in modes}
    return _Needs(costliest, workloads_of(settings, data, costliest), mixed, plans)


def _precision_sections(
    settings: Settings, plan: Plan, inputs: Inputs, needs: _Needs, own: Sequence[Precision]
) -> Iterator[str]:
    """A trial's hours over the precisions that it may be in, and all precisions side by side."""
    base, data, last = inputs.base, inputs.data, own[-1]
    measured = _measured(inputs.overview)
    throughput = measured or _estimated(settings, base, data, last)
    drawn = [forecast(one, last, throughput, needs.works) for one in own]
    pace = over_all(drawn[-1:] if measured else drawn)
    yield from _trial_sections(settings, plan, inputs, needs.works, pace)
    shown = [
        precision_of(settings, base, data, needs.costliest, mode)
        for mode in modes_to_show(base, needs.plans, needs.mixed)
    ]
    found = [forecast(one, last, throughput, needs.works) for one in shown]
    plan.numbers["precisions"] = [one.numbers() for one in found]
    plan.sections["precision"] = describe_precisions(found, drawn[-1])
    yield "precision"


def _trial_sections(
    settings: Settings,
    plan: Plan,
    inputs: Inputs,
    works: Sequence[Workload],
    pace: tuple[Throughput, Span] | None,
) -> Iterator[str]:
    """A trial's hours and price, and those of all; without a rate, when they will be known."""
    if pace is None:
        plan.sections["trial"] = "its hours and its price are known once one has ended"
        yield "trial"
        return
    throughput, taken = pace
    plan.numbers |= {
        "trial_seconds": asdict(taken),
        "pace": asdict(throughput),
        "work": asdict(works[-1]),
    }
    plan.sections["trial"] = describe_trial(works, throughput, taken)
    yield "trial"
    plan.sections["in all"] = describe_cost(settings, taken)
    yield "in all"
    plan.warnings += warnings.of_time(settings, taken)
    # What slots beyond those that can be drawn have cost counts as well.
    every_slot = settings.model_copy(update={"num_trials": len(inputs.overview.slots)})
    found = rooms(every_slot, inputs.ledger, shortest=taken.short, longest=taken.long)
    drawn_or_not = settings.num_trials + num_excluded(every_slot, inputs.overview)
    plan.warnings += warnings.of_budgets(found, num_left(drawn_or_not, inputs.overview))


def _sample(data: PreparedData, base: BaseModel) -> list[Piece]:
    """The first sample to train on, as the model reads it."""
    first = data.train.head(1)
    tokenizer = load_tokenizer(base.location, base.hub_revision)
    return preview(first.input_ids, first.is_target, tokenizer)


def _try_store(store: Store) -> float:
    """Probe the store, then upload a few megabytes; return the bytes a second from this machine."""
    probe(store)
    key = f"probe-{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe"
        path.write_bytes(os.urandom(RATE_PROBE_BYTES))
        started = time.monotonic()
        store.upload(key, path)
        seconds = max(1e-3, time.monotonic() - started)
    store.delete(key)
    return RATE_PROBE_BYTES / seconds


def _mixed(settings: Settings, inputs: Inputs) -> str | None:
    """What a plain `mixed` is, or would be, in this sweep; None where that cannot be predicted."""
    is_asked = "mixed" in quantizations(settings, inputs.definition)
    if not is_asked and model_shape(inputs.base.config) is None:
        return None
    return mixed_of_sweep(
        settings,
        inputs.definition,
        inputs.ledger,
        inputs.base,
        inputs.data,
        usable_bytes=usable_bytes_of(settings),
    )


def _measured(overview: Overview) -> Throughput | None:
    """The throughput of the sweep's committed trials; None without one."""
    measured = [v.tokens_per_second for v in overview.slots if v.judged and v.tokens_per_second]
    return throughput_of_trials(measured) if measured else None


def _estimated(
    settings: Settings, base: BaseModel, data: PreparedData, precision: Precision
) -> Throughput:
    """The throughput before a trial has ended: measured on this CPU, or a T4's by estimate."""
    if settings.device != "cpu":
        return estimate_on_a_t4([precision])
    from job.training.speed import measured_on_this_cpu  # imports torch

    values: dict[str, Any] = settings.hyperparameters | {
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "seed": settings.seed,
    }
    recipe = Recipe(**values, planned_steps=10, eval_steps=(), patience=1)
    budget = precision.memory.token_budget
    shallow, rate = measured_on_this_cpu(base.config, data.train, recipe, budget)
    target_share = data.train.num_target_tokens / len(data.train.input_ids)
    estimate = throughput_on_this_cpu(precision.shape, shallow, rate, target_share)
    return estimate.times(precision.speed_against_4_bits)


def _fits(
    settings: Settings, inputs: Inputs, costliest: Costliest, quantization: str, lora_r: int
) -> bool:
    """Whether a trial of this rank fits the card's memory and the adapter's limit; no on a CPU."""
    worst = replace(costliest, lora_r=lora_r)
    memory = memory_of(settings, inputs.base, inputs.data, worst, quantization)
    if memory.predicted is None or memory.usable_bytes is None or not memory.fits:
        return False
    largest = largest_rank(inputs.base.config, settings.max_adapter_mb * 1e6)
    return largest is not None and lora_r <= largest


def _memory_numbers(memory: MemoryPlan) -> dict[str, Any]:
    predicted = memory.predicted
    return {
        "token_budget": memory.token_budget,
        "recompute": memory.recompute,
        "usable_bytes": memory.usable_bytes,
        "predicted": {**asdict(predicted), "total": predicted.total} if predicted else None,
    }
