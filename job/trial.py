"""One attempt at one slot, from the settings through the lease to the commit, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import job
from job.admission import (
    budget_spent,
    check_progress,
    check_undrawn,
    check_work_dir,
    nothing_to_do,
    slot_name,
    slots,
)
from job.base_model import BaseModel, resolve_base_model
from job.checkpoint import publish_history
from job.data.prepared import DataSettings, PreparedData, prepare
from job.data.tokens import load_tokenizer
from job.errors import ExitCode, PreemptedError, SettingsError
from job.lease import Lease, acquire
from job.ledger import Ledger
from job.log import log
from job.outcome import AttemptClock, outcome, summary
from job.publisher import Publisher, restore
from job.settings import Settings
from job.spec import (
    base_revision,
    check_vocabulary,
    draw_spec,
    load_sweep,
    now,
    stop_early,
    sweep_identity,
)
from job.stop import Stop
from job.store import open_store, probe
from job.store.base import Store
from job.store.documents import Json
from job.sweep.definition import SweepDefinition
from job.training.memory import plan_memory
from job.training.recipe import Recipe
from job.training.state import TrainState, saved_clock_seconds, unreadable
from job.watchdog import Watchdog
from job.workspace import attempt_folder

if TYPE_CHECKING:
    import torch

    from job.training.fit import Fit


@dataclass(frozen=True)
class Training:
    """The training that a trial uses; tests give one without torch."""

    open_device: Callable[[Settings], torch.device]
    load_base: Callable[[BaseModel, torch.device], Any]
    # Trains the attempt's spec in a work folder; the publisher keeps what must survive.
    fit: Callable[[Attempt, Publisher, Path], Fit]


def run_trial(settings: Settings, stop: Stop, watchdog: Watchdog) -> str:
    """Run the slot's trial to its commit and return the last line of the log.

    Every other way out is a `JobError`, whose exit code tells Kubernetes what to do.
    """
    store = open_store(settings.output_uri, outage_seconds=60 * settings.outage_minutes)
    watchdog.start()
    with watchdog.phase("data, lease and store", outage_minutes=settings.outage_minutes):
        return run_trial_on(store, settings, stop, TRAINING, watchdog)


def run_trial_on(
    store: Store, settings: Settings, stop: Stop, training: Training, watchdog: Watchdog
) -> str:
    """`run_trial` with the outside given: the store and the training."""
    started = time.monotonic()
    definition, sweep = load_sweep(settings)
    ledger = Ledger(store, sweep)
    open_slots = slots(settings, ledger)
    if not open_slots:
        return nothing_to_do(settings, ledger)
    check_work_dir(settings.work_dir)
    device = training.open_device(settings)
    probe(ledger.store)
    base = resolve_base_model(
        settings.base_model, base_revision(settings, ledger), cache_dir=settings.work_dir
    )
    data = _prepare_data(settings, base, ledger, stop.check)
    check_vocabulary(base, data)
    prepared = time.monotonic()
    # Loaded before anything is frozen: a base that cannot be loaded must not stamp a sweep.
    with watchdog.phase("loading the model"):
        model = training.load_base(base, device)
    loaded = time.monotonic()
    log.info("model: %s loaded in %.1f s", base.name, loaded - prepared)
    ledger.open_sweep(sweep_identity(settings, definition, base, data))
    stop.check()

    lease = acquire(
        ledger,
        open_slots,
        lease_seconds=settings.lease_seconds,
        should_stop=stop.check,
        wait=stop.wait,
    )
    if lease is None:
        return f"{slot_name(settings, sweep)}: committed meanwhile, nothing to do"
    watchdog.last_act = partial(lease.end, ExitCode.OUTAGE)
    with lease:
        ledger = lease.ledger
        lease.open_account()
        check_progress(ledger, lease)
        spec = ledger.spec(lease.slot)
        if spec is None:
            check_undrawn(ledger, lease)
            if (spent := budget_spent(settings, ledger)) is not None:
                return f"slot {lease.slot}: {spent}, no new trial is begun"
            spec = draw_spec(settings, definition, ledger, lease.slot, data)
        if spec is None:
            return f"slot {lease.slot}: the search space has no point left, nothing to do"
        clock = AttemptClock(
            settings,
            lease,
            prepare_seconds=prepared - started,
            load_seconds=loaded - prepared,
        )
        attempt = Attempt(
            settings, definition, ledger, lease, spec, base, data, device, model, clock, stop,
            watchdog,
        )  # fmt: skip
        return _train_and_commit(attempt, training)


@dataclass(frozen=True)
class Attempt:
    """All that one attempt at a slot rests on."""

    settings: Settings
    definition: SweepDefinition
    ledger: Ledger
    lease: Lease
    spec: Json
    base: BaseModel
    data: PreparedData
    device: torch.device
    model: Any  # the loaded base
    clock: AttemptClock
    stop: Stop
    watchdog: Watchdog

    def check(self) -> None:
        """Raise `PreemptedError` if this attempt has to end: asked between micro-batches."""
        if self.lease.lost:
            self.lease.ensure_held()
        self.stop.check()


def _train_and_commit(attempt: Attempt, training: Training) -> str:
    """Train the slot from where it stands, and commit it."""
    ledger, lease, spec, data = attempt.ledger, attempt.lease, attempt.spec, attempt.data
    slot = lease.slot
    if spec["data_digest"] != data.digest:
        raise SettingsError(
            f"slot {slot}: was drawn for rows {spec['data_digest']}, but JOB_DATASET_URI now gives"
            f" {data.digest}; put the rows back, or start another sweep with JOB_SWEEP_NAME"
        )
    log.info("slot %d: %s", slot, ", ".join(f"{k}={v}" for k, v in spec["params"].items()))
    with attempt_folder(attempt.settings.work_dir) as work_dir:
        publisher = Publisher(
            ledger,
            lease,
            interval_seconds=attempt.settings.checkpoint_minutes * 60,
            seconds_left=attempt.stop.seconds_left,
            clock_of=saved_clock_seconds,
            on_report=attempt.watchdog.hear,
            resume_dir=restore(ledger, lease, work_dir, unreadable),
        )
        publisher.start()
        try:
            with attempt.watchdog.phase("training", by_bytes=False):
                fitted = training.fit(attempt, publisher, work_dir)
        except PreemptedError:
            raise _saved(lease, publisher, attempt.stop) from None
        publisher.flush()
        history_key = publish_history(ledger.store, ledger.slot_prefix(slot), fitted.history_path)
    result = {
        **outcome(fitted, attempt.clock),
        "params": spec["params"],
        "wandb_run_id": spec["wandb_run_id"],
        "attempts": lease.epoch,
        "data_digest": data.digest,
        "base_model": attempt.base.name,
        "base_model_revision": attempt.base.revision,
        "code_version": job.__version__,
        "history_key": history_key,
        "committed_at": now(),
    }
    lease.ensure_held()  # with the create-once result, the second of two fences
    if not ledger.is_current(slot):
        raise PreemptedError(f"slot {slot}: was begun again meanwhile, this attempt ends")
    if not ledger.commit(slot, result):
        lease.outcome = "another attempt had committed the slot"
        return f"slot {slot}: was committed by another attempt meanwhile, which holds"
    lease.outcome = f"committed: {result['status']}"
    publisher.discard(keep=result["adapter_key"])
    return f"slot {slot} committed: {summary(result)}"


def _fit(attempt: Attempt, publisher: Publisher, work_dir: Path) -> Fit:
    # torch: not before there is something to train
    from job.training.fit import FitInputs, fit_where_there_is_room

    recipe = Recipe.from_json(attempt.spec["recipe"])
    inputs = FitInputs(
        base=attempt.model,
        train_table=attempt.data.train,
        eval_table=attempt.data.eval.head(attempt.settings.eval_rows),
        memory=plan_memory(
            on_gpu=attempt.device.type == "cuda",
            per_device_train_batch_size=recipe.per_device_train_batch_size,
            max_seq_length=attempt.settings.max_seq_length,
        ),
        out_of_time=attempt.clock.out_of_time,
        stop_early=partial(_stop_early, attempt),
        measure_step_0=attempt.spec["measure_step_0"],
        max_adapter_bytes=int(attempt.settings.max_adapter_mb * 1e6),
    )

    return fit_where_there_is_room(
        recipe,
        inputs,
        device=attempt.device,
        work_dir=work_dir,
        keeper=publisher,
        should_stop=attempt.check,
    )


def _stop_early(attempt: Attempt, state: TrainState) -> str | None:
    """`stop_early`, which may wait for the store as long as an outage is borne."""
    with attempt.watchdog.phase("the store", outage_minutes=attempt.settings.outage_minutes):
        return stop_early(attempt.definition, attempt.ledger, attempt.settings, state)


def _open_device(settings: Settings) -> torch.device:
    from job.training.device import open_device  # torch: not for a slot that is done

    return open_device(settings.device, gpu_memory_gb=settings.gpu_memory_gb)


def _load_base(base: BaseModel, device: torch.device) -> Any:
    from job.training.model import load_base

    return load_base(base.location, base.hub_revision, device)


# torch, peft and bitsandbytes, as far as a trial needs them.
TRAINING = Training(_open_device, _load_base, _fit)


def _prepare_data(
    settings: Settings, base: BaseModel, ledger: Ledger, should_stop: Callable[[], None]
) -> PreparedData:
    should_stop()
    return prepare(
        DataSettings(
            dataset_uri=settings.dataset_uri,
            prompt_column=settings.prompt_column,
            completion_column=settings.completion_column,
            chat_template=settings.chat_template,
            max_seq_length=settings.max_seq_length,
            seed=settings.seed,
            subsample_fraction=settings.row_fraction,
            eval_fraction=settings.eval_fraction,
        ),
        tokenizer=load_tokenizer(base.location, base.hub_revision),
        store=ledger.store,
        cache_dir=settings.work_dir,
        should_stop=should_stop,
    )


def _saved(lease: Lease, publisher: Publisher, stop: Stop) -> PreemptedError:
    """What to say of a preempted attempt, once its last checkpoint is up or time has run out."""
    if lease.lost:
        return PreemptedError(f"slot {lease.slot}: a newer attempt holds it")
    in_time = publisher.flush(timeout=stop.seconds_left())
    checkpoints = lease.content["checkpoints"]
    step = checkpoints[0]["step"] if checkpoints else 0
    note = "" if in_time else " (the last upload did not end in time)"
    return PreemptedError(f"slot {lease.slot}: goes on from step {step} next time{note}")
