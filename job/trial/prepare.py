"""All that a trial needs before it takes a slot: the base's files, prepared rows, the model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.base_model import BaseModel
from job.data.prepared import DataSettings, PreparedData, prepare
from job.data.tokenisation import Tokenisation, find_tokenisation
from job.data.tokens import load_tokenizer
from job.hub import cached_snapshot, waited_out
from job.ledger.ledger import Ledger
from job.log import log
from job.process.stop import Stop
from job.process.watchdog import Watchdog
from job.settings import Settings
from job.staged_base import fetch_weights, resolve_base
from job.store import probe
from job.sweep.definition import SweepDefinition
from job.training.families import Coverage, check_base
from job.training.memory import Samples
from job.training.quantization import words
from job.trial.attempt import Loaded, Training
from job.trial.identity import base_revision, check_rows
from job.trial.weights import (
    BaseWeights,
    Costliest,
    check_adapter,
    choose_mixed,
    quantizations,
)

if TYPE_CHECKING:
    import torch


def load(
    settings: Settings,
    definition: SweepDefinition,
    ledger: Ledger,
    training: Training,
    *,
    check: Callable[[BaseModel, PreparedData], None],
    stop: Stop,
    watchdog: Watchdog,
) -> Loaded:
    """Open the device, probe the store, find the base, prepare the rows, load the model.

    `check` is given base and rows before weights move, and may raise a `JobError`. Where the sweep
    draws the precision, the model is loaded in the one that takes least memory; a trial that draws
    another loads it again. Raises any `JobError`.
    """
    started = time.monotonic()
    device, base, data = _prepare(
        settings, definition, ledger, training, check=check, should_stop=stop.check
    )
    prepared = time.monotonic()

    def load_base(quantization: str) -> Any:
        begun = time.monotonic()
        with watchdog.phase("loading the model"):
            model = training.load_base(base, device, quantization)
        seconds = time.monotonic() - begun
        log.info("model: %s in %s loaded in %.1f s", base.name, words(quantization), seconds)
        return model

    def patiently(quantization: str) -> Any:
        attempt = partial(load_base, quantization)
        return waited_out(attempt, 60 * settings.outage_minutes, stop.check)

    weights, mixed = BaseWeights(patiently), None
    modes = quantizations(settings, definition)
    if "mixed" in modes:
        usable = training.usable_bytes(settings, device)
        mixed = mixed_of_sweep(settings, definition, ledger, base, data, usable_bytes=usable)
        log.info("JOB_QUANTIZATION mixed: %s", words(mixed))
    weights.model(mixed if mixed and modes[0] == "mixed" else modes[0])
    seconds = time.monotonic() - prepared
    return Loaded(base, data, device, weights, mixed, prepared - started, seconds)


def _prepare(
    settings: Settings,
    definition: SweepDefinition,
    ledger: Ledger,
    training: Training,
    *,
    check: Callable[[BaseModel, PreparedData], None],
    should_stop: Callable[[], None],
) -> tuple[torch.device, BaseModel, PreparedData]:
    """All but the model, in the order in which a node or settings that are no use end soonest."""
    started = time.monotonic()
    seconds_of: dict[str, float] = {}
    with _timed(seconds_of, "device"):
        device = training.open_device(settings)
    with _timed(seconds_of, "store"):
        probe(ledger.store)
    with _timed(seconds_of, "base"):
        base = find_base(settings, definition, ledger, should_stop)
    with _timed(seconds_of, "rows"):
        data = prepare_data(settings, base, ledger, should_stop)
        check_rows(base, data)
        check(base, data)
    with _timed(seconds_of, "weights"):
        outage_seconds = 60 * settings.outage_minutes
        fetch_weights(
            base, settings.work_dir, outage_seconds=outage_seconds, should_stop=should_stop
        )
    parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in seconds_of.items())
    log.info("prepared in %.1f s (%s)", time.monotonic() - started, parts)
    return device, base, data


def mixed_of_sweep(
    settings: Settings,
    definition: SweepDefinition,
    ledger: Ledger,
    base: BaseModel,
    data: PreparedData,
    *,
    usable_bytes: int | None,
) -> str:
    """What a plain `mixed` is in this sweep: what its first trial chose, or would choose here."""
    identity = ledger.identity()
    if identity is not None and identity.mixed is not None:
        return identity.mixed
    worst = Costliest.of(settings, definition)
    per_step = settings.per_device_train_batch_size * max(worst.accumulation)
    return choose_mixed(
        base.config,
        Samples.of(data.train.lengths, per_step),
        worst=worst,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        usable_bytes=usable_bytes,
    )


@contextlib.contextmanager
def _timed(seconds_of: dict[str, float], part: str) -> Iterator[None]:
    """Note the seconds that the block takes."""
    started = time.monotonic()
    yield
    seconds_of[part] = time.monotonic() - started


def find_base(
    settings: Settings,
    definition: SweepDefinition,
    ledger: Ledger,
    should_stop: Callable[[], None],
) -> BaseModel:
    """The base of the settings, checked before its weights move. Raises any `JobError`."""

    def check(name: str, config: Mapping[str, Any]) -> None:
        check_precisions(quantizations(settings, definition), name, config)
        check_adapter(settings, definition, config)

    return resolve_base(
        ledger.store,
        settings.base_model,
        base_revision(settings, ledger),
        settings.work_dir,
        outage_seconds=60 * settings.outage_minutes,
        should_stop=should_stop,
        check=check,
    )


def check_precisions(
    modes: Iterable[str], name: str, config: Mapping[str, Any]
) -> dict[str, Coverage]:
    """The base's shares in each precision. Raises `SettingsError` if it cannot train in one."""
    return {mode: check_base(name, config, mode) for mode in modes}


def prepare_data(
    settings: Settings, base: BaseModel, ledger: Ledger, should_stop: Callable[[], None]
) -> PreparedData:
    """The rows of the settings as tables for this base. Raises what `prepare` raises."""
    should_stop()
    identity = ledger.identity()
    return prepare(
        DataSettings(
            dataset_uri=settings.dataset_uri,
            prompt_column=settings.prompt_column,
            completion_column=settings.completion_column,
            prompt_template=settings.prompt_template,
            system_prompt=settings.system_prompt,
            chat_template=settings.chat_template,
            max_seq_length=settings.max_seq_length,
            seed=settings.seed,
            subsample_fraction=settings.row_fraction,
            eval_fraction=settings.eval_fraction,
        ),
        tokenisation=_tokenisation(settings, base, should_stop),
        store=ledger.store,
        cache_dir=settings.work_dir,
        should_stop=should_stop,
        frozen_digest=None if identity is None else identity.dataset.prepared,
        outage_seconds=60 * settings.outage_minutes,
    )


def _tokenisation(
    settings: Settings, base: BaseModel, should_stop: Callable[[], None]
) -> Tokenisation:
    """How the base's chats become tokens, its tokenizer loaded only where this disk does not know.

    Raises what `load_tokenizer` and `load_template` raise.
    """
    name, commit = base.location, base.hub_revision
    return find_tokenisation(
        settings.chat_template,
        folder=lambda: Path(name) if commit is None else cached_snapshot(name, commit),
        load=lambda: waited_out(
            lambda: load_tokenizer(name, commit), 60 * settings.outage_minutes, should_stop
        ),
        work_dir=settings.work_dir,
    )
