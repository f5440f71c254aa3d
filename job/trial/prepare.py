"""All that a trial needs before it takes a slot: the base's files, prepared rows, the model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from job.base_model import BaseModel
from job.data.prepared import DataSettings, PreparedData, prepare
from job.data.tokens import load_tokenizer, vocabulary_digest
from job.hub import waited_out
from job.ledger.ledger import Ledger
from job.log import log
from job.process.stop import Stop
from job.process.watchdog import Watchdog
from job.settings import Settings
from job.staged_base import resolve_base
from job.store import probe
from job.training.families import check_base
from job.trial.attempt import Loaded, Training
from job.trial.identity import base_revision, check_rows


def load(
    settings: Settings,
    ledger: Ledger,
    training: Training,
    stop: Stop,
    watchdog: Watchdog,
) -> Loaded:
    """Open the device, probe the store, fetch the base, prepare the rows, load the model.

    Raises any `JobError`.
    """
    started = time.monotonic()
    seconds_of: dict[str, float] = {}
    with _timed(seconds_of, "device"):
        device = training.open_device(settings)
    with _timed(seconds_of, "store"):
        probe(ledger.store)
    with _timed(seconds_of, "base"):
        base = find_base(settings, ledger, stop.check)
    with _timed(seconds_of, "rows"):
        data = prepare_data(settings, base, ledger, stop.check)
        check_rows(base, data)
    prepared = time.monotonic()
    parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in seconds_of.items())
    log.info("prepared in %.1f s (%s)", prepared - started, parts)

    def load_base() -> Any:
        with watchdog.phase("loading the model"):
            return training.load_base(base, device)

    model = waited_out(load_base, 60 * settings.outage_minutes, stop.check)
    seconds = time.monotonic() - prepared
    log.info("model: %s loaded in %.1f s", base.name, seconds)
    return Loaded(base, data, device, model, prepared - started, seconds)


@contextlib.contextmanager
def _timed(seconds_of: dict[str, float], part: str) -> Iterator[None]:
    """Note the seconds that the block takes."""
    started = time.monotonic()
    yield
    seconds_of[part] = time.monotonic() - started


def find_base(settings: Settings, ledger: Ledger, should_stop: Callable[[], None]) -> BaseModel:
    """The base of the settings, checked before its weights move. Raises any `JobError`."""
    return resolve_base(
        ledger.store,
        settings.base_model,
        base_revision(settings, ledger),
        settings.work_dir,
        outage_seconds=60 * settings.outage_minutes,
        should_stop=should_stop,
        check=check_base,
    )


def prepare_data(
    settings: Settings, base: BaseModel, ledger: Ledger, should_stop: Callable[[], None]
) -> PreparedData:
    """The rows of the settings as tables for this base. Raises what `prepare` raises."""
    should_stop()
    identity = ledger.identity()
    outage_seconds = 60 * settings.outage_minutes
    tokenizer = waited_out(
        lambda: load_tokenizer(base.location, base.hub_revision), outage_seconds, should_stop
    )
    data = prepare(
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
        tokenizer=tokenizer,
        store=ledger.store,
        cache_dir=settings.work_dir,
        should_stop=should_stop,
        frozen_digest=None if identity is None else identity.dataset.prepared,
        outage_seconds=outage_seconds,
    )
    return replace(data, vocabulary=vocabulary_digest(tokenizer))
