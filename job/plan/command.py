"""`job plan`: what a sweep will do, need and cost, tried as far as is possible without a GPU."""

from __future__ import annotations

import json
import os
import tempfile
import time
import uuid
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from job.base_model import BaseModel
from job.data.prepared import PreparedData
from job.data.preview import Piece, bracketed, coloured, preview
from job.data.tokens import load_tokenizer
from job.ledger.ledger import Ledger
from job.plan import warnings
from job.plan.forecast import (
    Throughput,
    Workload,
    throughput_of_trials,
    throughput_on_a_t4,
    throughput_on_this_cpu,
)
from job.plan.precisions import (
    Precision,
    describe_precisions,
    forecast,
    modes_to_show,
    precision_of,
)
from job.plan.sections import (
    describe_base,
    describe_cost,
    describe_rows,
    describe_sweep,
    describe_trial,
)
from job.plan.workload import memory_of, usable_bytes_of, workload_of
from job.progress import size
from job.report.overview import read_overview
from job.settings import Settings
from job.store import open_store, probe
from job.store.base import Store
from job.sweep.definition import SweepDefinition
from job.training.families import check_base
from job.training.memory import MemoryPlan
from job.training.shape import model_shape
from job.trial.identity import check_rows, load_sweep, sweep_identity
from job.trial.prepare import find_base, mixed_of_sweep, prepare_data
from job.trial.slots import check_work_dir
from job.trial.weights import Costliest, quantizations

RATE_PROBE_BYTES = 4 * 2**20  # uploaded once to learn how fast checkpoints will go


@dataclass
class Plan:
    """The plan as far as it is known; printed as it comes, or as JSON at the end."""

    sections: dict[str, str] = field(default_factory=dict)
    sample: list[Piece] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def run_plan(options: Namespace, settings: Settings) -> None:
    """Print the plan. Raises what the trial would raise, so that the exit code is the job's."""
    plan = Plan()
    console = Console(stderr=options.json, highlight=False, soft_wrap=True)
    for section in _sections(settings, plan):
        console.print(section_text(plan, section, console))
    if options.json:
        print(json.dumps({"sections": plan.sections, **plan.numbers, "warnings": plan.warnings}))
        return
    for warning in plan.warnings:
        console.print(f"[yellow]warning[/]    {warning}")


def section_text(plan: Plan, section: str, console: Console) -> Text:
    """The section under its name; on a terminal colours mark what a sample teaches."""
    text = plan.sections[section]
    if section == "sample" and console.is_terminal and not console.no_color:
        text = coloured(plan.sample)
    words = Text.from_ansi(text.replace("\n", "\n" + " " * 11))
    return Text.assemble((f"{section:11}", "bold"), words)


def _sections(settings: Settings, plan: Plan) -> Iterator[str]:
    """Work the plan out section by section; yield the name of each as soon as it is known."""
    store = open_store(settings.output_uri, outage_seconds=60 * settings.outage_minutes)
    definition, sweep = load_sweep(settings, store, lambda: None)
    plan.sections["sweep"] = describe_sweep(settings, definition, sweep)
    yield "sweep"
    check_work_dir(settings.work_dir)
    rate = _try_store(store)
    plan.numbers["upload_bytes_per_second"] = round(rate)
    plan.sections["store"] = f"{store.uri}: conditional writes hold, {size(rate)}/s up"
    yield "store"
    plan.warnings += warnings.of_expiry(store)
    ledger = Ledger(store, sweep)
    base = find_base(settings, definition, ledger, lambda: None)
    *_, heaviest = quantizations(settings, definition)
    coverage = check_base(base.name, base.config, heaviest)
    plan.numbers["base"] = asdict(coverage)
    shape = model_shape(base.config)
    plan.sections["base"] = f"{describe_base(base, shape)}; {coverage}"
    yield "base"
    data = prepare_data(settings, base, ledger, lambda: None)
    check_rows(base, data)
    ledger.check_identity(sweep_identity(settings, definition, base, data))
    plan.numbers["data"] = {"digest": data.digest, **asdict(data.counts)}
    plan.sections["rows"] = describe_rows(data)
    yield "rows"
    plan.sample = _sample(data, base)
    plan.sections["sample"] = bracketed(plan.sample)
    yield "sample"
    costliest = Costliest.of(settings, definition)
    mixed = _mixed(settings, definition, ledger, base, data)
    quantization = mixed if mixed and heaviest == "mixed" else heaviest
    memory = memory_of(settings, base, data, costliest, quantization)
    plan.sections["memory"] = str(memory)
    plan.numbers["memory"] = _memory_numbers(memory)
    yield "memory"
    plan.warnings += warnings.of_memory(memory)
    if shape is not None:
        current = precision_of(settings, base, data, costliest, quantization)
        throughput = _throughput(settings, ledger, current)
        modes = modes_to_show(base, quantization, mixed)
        others = [precision_of(settings, base, data, costliest, mode) for mode in modes]
        work = workload_of(settings, data, costliest)
        yield from _trial_sections(
            settings, plan, work, current=current, throughput=throughput, others=others
        )
        checkpoint_bytes = 12 * shape.adapter_weights(
            costliest.lora_r
        )  # weights and two moments, in fp32
        plan.warnings += warnings.of_checkpoints(settings, checkpoint_bytes, rate)
    plan.warnings += warnings.of_rows(settings, data)
    plan.warnings += warnings.of_few(settings, definition)


def _trial_sections(
    settings: Settings,
    plan: Plan,
    work: Workload,
    *,
    current: Precision,
    throughput: Throughput,
    others: list[Precision],
) -> Iterator[str]:
    """A trial's hours and price in the sweep's precision, and beside it in the others."""
    own = forecast(current, current, throughput, work)
    plan.numbers |= {
        "trial_seconds": asdict(own.taken),
        "pace": asdict(throughput),
        "work": asdict(work),
    }
    plan.sections["trial"] = describe_trial(work, throughput, own.taken)
    yield "trial"
    plan.sections["in all"] = describe_cost(settings, own.taken)
    yield "in all"
    found = [forecast(other, current, throughput, work) for other in others]
    plan.numbers["precisions"] = [one.numbers() for one in found]
    plan.sections["precision"] = describe_precisions(found, own)
    yield "precision"
    plan.warnings += warnings.of_time(settings, own.taken)


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


def _mixed(
    settings: Settings,
    definition: SweepDefinition,
    ledger: Ledger,
    base: BaseModel,
    data: PreparedData,
) -> str | None:
    """What a plain `mixed` is, or would be, in this sweep; None where that cannot be predicted."""
    is_asked = "mixed" in quantizations(settings, definition)
    if not is_asked and model_shape(base.config) is None:
        return None
    usable = usable_bytes_of(settings)
    return mixed_of_sweep(settings, definition, ledger, base, data, usable_bytes=usable)


def _throughput(settings: Settings, ledger: Ledger, precision: Precision) -> Throughput:
    """The throughput of the sweep's committed trials; without one, an estimate."""
    views = read_overview(ledger, settings.num_trials).slots
    measured = [v.tokens_per_second for v in views if v.judged and v.tokens_per_second]
    if measured:
        return throughput_of_trials(measured)
    if settings.device == "cpu":
        return throughput_on_this_cpu(precision.shape).times(precision.speed)
    estimate = throughput_on_a_t4(precision.shape, precision.memory.recompute)
    return estimate.times(precision.speed)


def _memory_numbers(memory: MemoryPlan) -> dict[str, Any]:
    predicted = memory.predicted
    return {
        "token_budget": memory.token_budget,
        "recompute": memory.recompute,
        "usable_bytes": memory.usable_bytes,
        "predicted": {**asdict(predicted), "total": predicted.total} if predicted else None,
    }
