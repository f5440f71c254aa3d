"""One attempt at one slot, from the settings through the lease to the commit, top to bottom."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import job
from job.data.prepared import PreparedData
from job.errors import ExitCode, JobError, PreemptedError, SettingsError
from job.ledger.accounts import now
from job.ledger.folders import publish_history
from job.ledger.lease import Lease, acquire
from job.ledger.ledger import Ledger
from job.ledger.uploads import Publisher, restore
from job.ledger.watch import LeaseWatch, wait_for_a_free_slot
from job.log import log
from job.process.stop import Stop
from job.process.watchdog import Watchdog
from job.process.workspace import attempt_folder
from job.settings import Settings
from job.store import open_store
from job.store.base import Store
from job.store.documents import Json
from job.sweep.definition import SweepDefinition
from job.training.state import HISTORY_FILE, saved_clock_seconds, unreadable
from job.trial.attempt import Attempt, Training
from job.trial.draw import Drawn, draw_for, drawable
from job.trial.identity import load_sweep, sweep_identity, warn_of_other_settings
from job.trial.prepare import Loaded, load
from job.trial.result import AttemptClock, outcome, summary
from job.trial.slots import (
    budget_spent,
    check_progress,
    check_undrawn,
    check_work_dir,
    nothing_to_do,
    slot_name,
    slots,
)
from job.trial.train import real_training
from job.wandb.confirmed import catch_up
from job.wandb.run import Mirror

if TYPE_CHECKING:
    from job.training.fit import Fit


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
    open_slots, lookout = slots(settings, ledger), LeaseWatch(settings.lease_seconds)
    if not wait_for_a_free_slot(
        ledger, open_slots, lookout, should_stop=stop.check, wait=stop.wait
    ):
        warn_of_other_settings(settings, definition, ledger)
        return nothing_to_do(settings, ledger)
    open_slots = drawable(settings, ledger, open_slots, stop.check)
    if not open_slots:
        return f"{slot_name(settings, sweep)}: never drawn, the W&B sweep gives no more trials"
    # Loaded before anything is frozen: a base that cannot be loaded must not stamp a sweep.
    loaded = load(settings, ledger, training, stop, watchdog)
    ledger.open_sweep(sweep_identity(settings, definition, loaded.base, loaded.data))
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
    with watchdog.acting_before_the_end(partial(lease.end, ExitCode.OUTAGE)), lease:
        lease.open_account()
        check_progress(lease.ledger, lease)
        drawn = _drawn(settings, definition, lease, loaded.data, stop)
        if isinstance(drawn, str):
            return drawn
        attempt = _attempt(
            settings, lease, drawn, loaded, definition=definition, stop=stop, watchdog=watchdog
        )
        try:
            return _train_and_commit(attempt, training)
        except JobError as error:
            attempt.mirror.fail(error)
            raise


def _drawn(
    settings: Settings, definition: SweepDefinition, lease: Lease, data: PreparedData, stop: Stop
) -> Drawn | str:
    """The slot's frozen spec, drawn now if it was not; or why no trial is begun."""
    ledger = lease.ledger
    spec = ledger.spec(lease.slot)
    if spec is not None:
        return Drawn(spec)
    check_undrawn(ledger, lease)
    if (spent := budget_spent(settings, ledger)) is not None:
        return f"slot {lease.slot}: {spent}, no new trial is begun"
    drawn = draw_for(settings, definition, ledger, lease.slot, data, check=stop.check)
    return drawn or f"slot {lease.slot}: never drawn, the sweep has no point left"


def _attempt(
    settings: Settings,
    lease: Lease,
    drawn: Drawn,
    loaded: Loaded,
    *,
    definition: SweepDefinition,
    stop: Stop,
    watchdog: Watchdog,
) -> Attempt:
    clock = AttemptClock(
        settings,
        lease,
        prepare_seconds=loaded.prepare_seconds,
        load_seconds=loaded.load_seconds,
    )
    mirror = Mirror(
        settings,
        lease.ledger,
        lease.slot,
        drawn.spec,
        drawn.agent_run,
        is_ours=lambda: not lease.lost,
        stop=stop,
    )
    return Attempt(
        settings, definition, lease.ledger, lease, drawn.spec, loaded.base, loaded.data,
        loaded.device, loaded.model, clock, stop, watchdog, mirror,
    )  # fmt: skip


def _train_and_commit(attempt: Attempt, training: Training) -> str:
    """Train the slot from where it stands, and commit it."""
    ledger, lease, slot = attempt.ledger, attempt.lease, attempt.lease.slot
    _check_rows(attempt)
    params = attempt.spec["params"]
    log.info("slot %d: %s", slot, ", ".join(f"{k}={v}" for k, v in params.items()))
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
    result = _result(attempt, fitted, history_key)
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


def _check_rows(attempt: Attempt) -> None:
    drawn_for, now_given = attempt.spec["data_digest"], attempt.data.digest
    if drawn_for != now_given:
        raise SettingsError(
            f"slot {attempt.lease.slot}: was drawn for rows {drawn_for}, but JOB_DATASET_URI now"
            f" gives {now_given}; put the rows back, or start another sweep with JOB_SWEEP_NAME"
        )


def _result(attempt: Attempt, fitted: Fit, history_key: str) -> Json:
    """`result.json`: how training ended, and all that the ending rests on."""
    result = {
        **outcome(fitted, attempt.clock),
        "params": attempt.spec["params"],
        "wandb_run_id": attempt.spec["wandb_run_id"],
        "attempts": attempt.lease.epoch,
        "data_digest": attempt.data.digest,
        "base_model": attempt.base.name,
        "base_model_revision": attempt.base.revision,
        "code_version": job.__version__,
        "history_key": history_key,
        "committed_at": now(),
    }
    if (asked := attempt.stop_asked()) is not None and result["status"] == "completed":
        result |= {"status": "stopped", "reason": f"{asked} after {result['reason']}"}
    return result


def _saved(lease: Lease, publisher: Publisher, stop: Stop) -> PreemptedError:
    """What to say of a preempted attempt, once its last checkpoint is up or time has run out."""
    if lease.lost:
        return PreemptedError(f"slot {lease.slot}: a newer attempt holds it")
    in_time = publisher.flush(timeout=stop.seconds_left())
    checkpoints = lease.content["checkpoints"]
    step = checkpoints[0]["step"] if checkpoints else 0
    note = "" if in_time else " (the last upload did not end in time)"
    return PreemptedError(f"slot {lease.slot}: goes on from step {step} next time{note}")
