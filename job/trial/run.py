"""One attempt at one slot, from the settings through the lease to the commit, top to bottom."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import job
from job.base_model import BaseModel
from job.data.prepared import PreparedData
from job.errors import ExitCode, JobError, PreemptedError, SettingsError, SlotError
from job.ledger.accounts import now
from job.ledger.folders import publish_file
from job.ledger.lease import HeldLease, acquire
from job.ledger.ledger import Ledger
from job.ledger.records import AttemptProgress, Result
from job.ledger.uploads import Uploads, restore
from job.ledger.watch import LeaseWatch, wait_for_a_free_slot
from job.log import log
from job.process.stop import Stop
from job.process.watchdog import Watchdog
from job.process.workspace import attempt_folder
from job.settings import Settings
from job.store import open_store
from job.store.base import Store
from job.sweep.definition import SweepDefinition
from job.training.shape import largest_rank
from job.training.state import HISTORY_FILE, saved_clock_seconds, unreadable
from job.trial.attempt import Attempt, Loaded, Training, begin_attempt
from job.trial.budget import Looks, affordable, budget_reached
from job.trial.draw import Drawn, draw_for, drawable, observe, with_a_point
from job.trial.end import end_of, ended_line, why_ended, worth_working_on
from job.trial.identity import (
    load_sweep,
    other_settings,
    sweep_identity,
    warn_of_other_settings,
)
from job.trial.notices import tell_if_done, tell_of_budget, tell_of_slot
from job.trial.prepare import load
from job.trial.result import summary, training_result
from job.trial.slots import (
    check_progress,
    check_undrawn,
    check_work_dir,
    nothing_to_do,
    slot_name,
    slots,
)
from job.trial.train import real_training
from job.trial.warm_start import describe, read_earlier_best
from job.wandb.confirmed import catch_up

if TYPE_CHECKING:
    from job.training.fit import Fit


def run_trial(
    settings: Settings,
    stop: Stop,
    watchdog: Watchdog,
    training: Training | None = None,
    *,
    worker: int | None = None,
) -> str:
    """Run the slot's trial to its commit and return the last line of the log.

    Without `training` it trains with torch, PEFT and bitsandbytes. `worker` is this process' number
    among those of a queue that has several. Every other way out is a `JobError`, whose exit code
    tells Kubernetes what to do.
    """
    store = open_store(settings.output_uri, outage_seconds=60 * settings.outage_minutes)
    watchdog.start()
    with watchdog.phase("data, lease and store", outage_minutes=settings.outage_minutes):
        training = training or real_training()
        return run_trial_on(store, settings, stop, training, watchdog, worker=worker)


def run_trial_on(
    store: Store,
    settings: Settings,
    stop: Stop,
    training: Training,
    watchdog: Watchdog,
    *,
    worker: int | None = None,
) -> str:
    """Run the trial on this store and with this training; otherwise as `run_trial`."""
    check_work_dir(settings.work_dir)
    definition, sweep = load_sweep(settings, store, stop.check)
    ledger = Ledger(store, sweep)
    catch_up(settings, ledger, stop.check)
    watch = LeaseWatch(settings.lease_seconds)
    open_slots = _slots_worth_a_trial(settings, definition, ledger, watch, stop)
    if isinstance(open_slots, str):
        return open_slots
    loaded = _load(settings, definition, ledger, training, stop=stop, watchdog=watchdog)
    lease = acquire(
        ledger,
        open_slots,
        lease_seconds=settings.lease_seconds,
        should_stop=stop.check,
        wait=stop.wait,
        watch=watch,
        opening=AttemptProgress(worker=worker, hourly_usd=settings.gpu_hourly_usd),
    )
    if lease is None:
        return f"{slot_name(settings, sweep)}: committed meanwhile, nothing to do"
    with watchdog.acting_before_the_end(partial(lease.end, ExitCode.OUTAGE)), lease:
        return _attempt_at(
            settings, definition, lease, loaded, training, watch=watch, stop=stop, watchdog=watchdog
        )


def _attempt_at(
    settings: Settings,
    definition: SweepDefinition,
    lease: HeldLease,
    loaded: Loaded,
    training: Training,
    *,
    watch: LeaseWatch,
    stop: Stop,
    watchdog: Watchdog,
) -> str:
    """Draw the slot that we hold, train and commit it; or return the line why nothing was begun."""
    lease.open_account()
    _check_progress(settings, lease)
    drawn = _drawn(settings, definition, lease, loaded, watch=watch, stop=stop)
    if isinstance(drawn, str):
        return drawn
    attempt = begin_attempt(
        settings, definition, lease, drawn, loaded, stop=stop, watchdog=watchdog
    )
    try:
        return _train_and_commit(attempt, training)
    except JobError as error:
        attempt.mirror.fail(error)
        raise


def _slots_worth_a_trial(
    settings: Settings,
    definition: SweepDefinition,
    ledger: Ledger,
    watch: LeaseWatch,
    stop: Stop,
) -> list[int] | str:
    """The open slots to work on, known before anything is loaded; or the last line without one."""
    name = slot_name(settings, ledger.sweep)
    open_slots, ended = worth_working_on(settings, ledger, slots(settings, ledger))
    if ended is not None and not open_slots:
        warn_of_other_settings(settings, definition, ledger)
        tell_if_done(settings, ledger, ended=why_ended(ended, settings.gpu_hourly_usd))
        return ended_line(settings, ended, name=name)
    if not other_settings(settings, definition, ledger):  # else they are refused, not judged by
        open_slots, why = with_a_point(settings, definition, ledger, open_slots)
        if why is not None and not open_slots:
            tell_if_done(settings, ledger, ended=why)
            return f"{name}: no trial is left to draw, {why}"
    looks = Looks(watch, stop.check, stop.wait)
    open_slots, reached = affordable(settings, ledger, open_slots, looks)
    if reached is not None and not open_slots:
        warn_of_other_settings(settings, definition, ledger)
        tell_of_budget(settings, ledger, reached)
        return f"{name}: {reached}, no new trial is begun"
    if not wait_for_a_free_slot(ledger, open_slots, watch, should_stop=stop.check, wait=stop.wait):
        warn_of_other_settings(settings, definition, ledger)
        return nothing_to_do(settings, ledger)
    gives = drawable(settings, ledger, open_slots, stop.check)
    return gives or f"{name}: never drawn, the W&B sweep gives no more trials"


def _load(
    settings: Settings,
    definition: SweepDefinition,
    ledger: Ledger,
    training: Training,
    *,
    stop: Stop,
    watchdog: Watchdog,
) -> Loaded:
    """Load all that a trial needs, then freeze the sweep's identity, or check ours against it.

    In this order: a base that cannot be loaded must not become a sweep's own. One that stands
    already is compared with before weights move.
    """
    earlier = read_earlier_best(settings, definition, ledger)

    def check(base: BaseModel, data: PreparedData) -> None:
        ledger.check_identity(sweep_identity(settings, definition, base, data, earlier))

    loaded = load(settings, definition, ledger, training, check=check, stop=stop, watchdog=watchdog)
    ledger.open_sweep(
        sweep_identity(settings, definition, loaded.base, loaded.data, earlier, mixed=loaded.mixed)
    )
    if earlier is not None:
        log.info("warm start: %s", describe(earlier, definition, settings))
    stop.check()
    return loaded


def _check_progress(settings: Settings, lease: HeldLease) -> None:
    """Close a slot whose attempts make no progress, and tell people. Raises `SlotError` then."""
    tell_of_slot(settings, lease)
    try:
        check_progress(lease)
    except SlotError as error:
        tell_of_slot(settings, lease, given_up=str(error))
        tell_if_done(settings, lease.slot.ledger)
        raise


def _drawn(
    settings: Settings,
    definition: SweepDefinition,
    lease: HeldLease,
    loaded: Loaded,
    *,
    watch: LeaseWatch,
    stop: Stop,
) -> Drawn | str:
    """The slot's frozen spec, drawn now if it was not yet; or a line why no trial is begun."""
    slot = lease.slot
    spec = slot.spec()
    if spec is not None:
        return Drawn(spec)
    check_undrawn(slot)
    # Other trials may have begun or ended while the base was loaded.
    looks = Looks(watch, stop.check, stop.wait)
    reached = budget_reached(settings, slot.ledger, held=slot.number, looks=looks)
    if reached is not None:
        tell_of_budget(settings, slot.ledger, reached)
        return f"slot {slot.number}: {reached}, no new trial is begun"
    observed = observe(slot.ledger, settings.num_trials, but=slot.number)
    if slot.generation == 0 and (ended := end_of(settings, slot.ledger, observed)) is not None:
        return ended_line(settings, ended, name=f"slot {slot.number}")
    drawn = draw_for(
        slot,
        settings,
        definition,
        loaded.data,
        observed,
        largest_rank=largest_rank(loaded.base.config, settings.max_adapter_mb * 1e6),
        should_stop=stop.check,
    )
    return drawn or f"slot {slot.number}: never drawn, the sweep has no point left"


def _train_and_commit(attempt: Attempt, training: Training) -> str:
    """Train the slot from where it stands, and commit it."""
    slot, lease = attempt.slot, attempt.lease
    _check_spec(attempt)
    params = ", ".join(f"{name}={value}" for name, value in attempt.spec.params.items())
    log.info("slot %d: %s", slot.number, params)
    with attempt_folder(attempt.settings.work_dir) as work_dir:
        uploads = Uploads(
            lease,
            interval_seconds=attempt.settings.checkpoint_minutes * 60,
            seconds_left=attempt.stop.seconds_left,
            clock_of=saved_clock_seconds,
            on_report=attempt.watchdog.hear,
            resume_dir=restore(lease, work_dir, unreadable),
        )
        uploads.start()
        attempt.mirror.follow(work_dir / HISTORY_FILE)
        try:
            with attempt.watchdog.phase("training", by_bytes=False):
                fitted = training.fit(attempt, uploads, work_dir)
        except PreemptedError:
            raise _preempted(lease, uploads, attempt.stop) from None
        uploads.flush()
        attempt.mirror.read_to_end()
        files = {"history_key": publish_file(slot, fitted.history_path)}
        if fitted.rows_path is not None:
            files["rows_key"] = publish_file(slot, fitted.rows_path)
    result = _result(attempt, fitted, files)
    lease.ensure_held()  # with the create-once result, the second of two fences
    if not slot.is_current():
        raise PreemptedError(f"slot {slot.number}: was begun again meanwhile, this attempt ends")
    if not slot.commit(result):
        lease.report(reason="another attempt had committed the slot")
        return f"slot {slot.number}: was committed by another attempt meanwhile, which holds"
    lease.report(reason=f"committed: {result.status}")
    uploads.discard(keep=result.adapter_key)
    attempt.mirror.commit(result)
    tell_if_done(attempt.settings, slot.ledger)
    return f"slot {slot.number} committed: {summary(result)}"


def _check_spec(attempt: Attempt) -> None:
    """Refuse rows that the slot was not drawn for, and a recipe with keys that we do not know."""
    number, spec, digest = attempt.slot.number, attempt.spec, attempt.loaded.data.digest
    if spec.data_digest != digest:
        raise SettingsError(
            f"slot {number}: was drawn for rows {spec.data_digest}, but JOB_DATASET_URI now gives"
            f" {digest}; put the rows back, or start another sweep with JOB_SWEEP_NAME"
        )
    if unknown := ", ".join(spec.recipe.model_extra or ()):
        raise SlotError(
            f"slot {number}: its recipe has {unknown}, which this version does not know: use the"
            " image that drew it"
        )


def _result(attempt: Attempt, fitted: Fit, files: dict[str, str]) -> Result:
    """The slot's result: how training ended, and with which base, rows and parameters."""
    base = attempt.loaded.base
    result = Result.model_validate(
        {
            **training_result(fitted, attempt.clock),
            "params": attempt.spec.params,
            "quantization": attempt.spec.recipe.quantization,
            "wandb_run_id": attempt.spec.wandb_run_id,
            "attempts": attempt.lease.epoch,
            "data_digest": attempt.loaded.data.digest,
            "eval_rows": min(len(attempt.loaded.data.eval), attempt.settings.eval_rows),
            "base_model": base.name,
            "base_model_revision": base.revision,
            "code_version": job.__version__,
            **files,  # the keys of its history and of its best evaluation by row
            "committed_at": now(),
        }
    )
    if (asked := attempt.stop_asked()) is not None and result.status == "completed":
        return result.changed(status="stopped", reason=f"{asked} after {result.reason}")
    return result


def _preempted(lease: HeldLease, uploads: Uploads, stop: Stop) -> PreemptedError:
    """Wait for the last upload of a preempted attempt, as time allows; the error that ends it."""
    number = lease.slot.number
    if lease.lost:
        return PreemptedError(f"slot {number}: a newer attempt holds it")
    in_time = uploads.flush(timeout=stop.seconds_left())
    checkpoints = lease.record.checkpoints
    step = checkpoints[0].step if checkpoints else 0
    note = "" if in_time else " (the last upload did not end in time)"
    return PreemptedError(f"slot {number}: goes on from step {step} next time{note}")
