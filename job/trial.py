"""One attempt at one slot, from the settings through the lease to the commit, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

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
from job.attempt import Attempt, Training
from job.base_model import BaseModel, resolve_base_model
from job.checkpoint import publish_history
from job.data.prepared import DataSettings, PreparedData, prepare
from job.data.tokens import load_tokenizer
from job.drawing import Drawn, draw_for, drawable
from job.errors import ExitCode, JobError, PreemptedError, SettingsError
from job.fitting import real_training
from job.lease import Lease, acquire
from job.ledger import Ledger
from job.log import log
from job.lookout import Lookout, wait_for_a_free_slot
from job.mirror.confirmed import catch_up
from job.mirror.live import Mirror
from job.outcome import AttemptClock, outcome, summary
from job.publisher import Publisher, restore
from job.settings import Settings
from job.spec import (
    base_revision,
    check_vocabulary,
    load_sweep,
    now,
    sweep_identity,
)
from job.stop import Stop
from job.store import open_store, probe
from job.store.base import Store
from job.training.state import HISTORY_FILE, saved_clock_seconds, unreadable
from job.watchdog import Watchdog
from job.workspace import attempt_folder


def run_trial(
    settings: Settings, stop: Stop, watchdog: Watchdog, meeting: Path | None = None
) -> str:
    """Run the slot's trial to its commit and return the last line of the log.

    `meeting`: the folder where the processes of `JOB_NUM_GPUS` meet; this is rank 0 of them.

    Every other way out is a `JobError`, whose exit code tells Kubernetes what to do.
    """
    if settings.num_gpus > 1 and meeting is None:
        raise SettingsError(
            f"JOB_NUM_GPUS: is {settings.num_gpus}, but `job trial` is one process alone: use"
            " `job run` or `job queue`, which start one for each GPU"
        )
    store = open_store(settings.output_uri, outage_seconds=60 * settings.outage_minutes)
    watchdog.start()
    with watchdog.phase("data, lease and store", outage_minutes=settings.outage_minutes):
        return run_trial_on(store, settings, stop, real_training(meeting), watchdog)


def run_trial_on(
    store: Store, settings: Settings, stop: Stop, training: Training, watchdog: Watchdog
) -> str:
    """`run_trial` with the outside given: the store and the training."""
    check_work_dir(settings.work_dir)
    definition, sweep = load_sweep(settings, store, stop.check)
    ledger = Ledger(store, sweep)
    catch_up(settings, ledger, stop.check)
    open_slots, lookout = slots(settings, ledger), Lookout(settings.lease_seconds)
    if not wait_for_a_free_slot(
        ledger, open_slots, lookout, should_stop=stop.check, wait=stop.wait
    ):
        return nothing_to_do(settings, ledger)
    open_slots = drawable(settings, ledger, open_slots, stop.check)
    if not open_slots:
        return f"{slot_name(settings, sweep)}: never drawn, the W&B sweep gives no more trials"
    started = time.monotonic()
    device = training.open_device(settings)
    probe(ledger.store)
    base = resolve_base_model(
        settings.base_model,
        base_revision(settings, ledger),
        cache_dir=settings.work_dir,
        outage_seconds=60 * settings.outage_minutes,
    )
    data = prepare_data(settings, base, ledger, stop.check)
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
        lookout=lookout,
    )
    if lease is None:
        return f"{slot_name(settings, sweep)}: committed meanwhile, nothing to do"
    watchdog.last_act = partial(lease.end, ExitCode.OUTAGE)
    with lease:
        ledger = lease.ledger
        lease.open_account()
        check_progress(ledger, lease)
        spec = ledger.spec(lease.slot)
        drawn = None if spec is None else Drawn(spec)
        if drawn is None:
            check_undrawn(ledger, lease)
            if (spent := budget_spent(settings, ledger)) is not None:
                return f"slot {lease.slot}: {spent}, no new trial is begun"
            drawn = draw_for(settings, definition, ledger, lease.slot, data, check=stop.check)
        if drawn is None:
            return f"slot {lease.slot}: never drawn, the sweep has no point left"
        clock = AttemptClock(
            settings,
            lease,
            prepare_seconds=prepared - started,
            load_seconds=loaded - prepared,
        )
        mirror = Mirror(
            settings,
            ledger,
            lease.slot,
            drawn.spec,
            drawn.agent_run,
            is_ours=lambda: not lease.lost,
            stop=stop,
        )
        attempt = Attempt(
            settings, definition, ledger, lease, drawn.spec, base, data, device, model, clock, stop,
            watchdog, mirror,
        )  # fmt: skip
        try:
            return _train_and_commit(attempt, training)
        except JobError as error:
            mirror.fail(error)
            raise


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
        attempt.mirror.follow(work_dir / HISTORY_FILE)
        try:
            with attempt.watchdog.phase("training", by_bytes=False):
                fitted = training.fit(attempt, publisher, work_dir)
        except PreemptedError:
            raise _saved(lease, publisher, attempt.stop) from None
        publisher.flush()
        attempt.mirror.read_to_end()
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
    if (asked := attempt.stop_asked()) is not None and result["status"] == "completed":
        result |= {"status": "stopped", "reason": f"{asked} after {result['reason']}"}
    lease.ensure_held()  # with the create-once result, the second of two fences
    if not ledger.is_current(slot):
        raise PreemptedError(f"slot {slot}: was begun again meanwhile, this attempt ends")
    if not ledger.commit(slot, result):
        lease.outcome = "another attempt had committed the slot"
        return f"slot {slot}: was committed by another attempt meanwhile, which holds"
    lease.outcome = f"committed: {result['status']}"
    publisher.discard(keep=result["adapter_key"])
    attempt.mirror.commit(result)
    return f"slot {slot} committed: {summary(result)}"


def prepare_data(
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
        outage_seconds=60 * settings.outage_minutes,
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
