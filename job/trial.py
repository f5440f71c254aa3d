"""One attempt at one slot, from the settings through the lease to the commit, top to bottom."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import job
from job.base_model import BaseModel, resolve_base_model
from job.checkpoint import publish_history
from job.data.prepared import DataSettings, PreparedData, prepare
from job.data.tokens import load_tokenizer
from job.errors import PreemptedError, SettingsError, SlotError
from job.lease import Lease, acquire
from job.ledger import Ledger
from job.log import log
from job.outcome import AttemptClock, outcome, summary
from job.publisher import Publisher, restore
from job.settings import Settings
from job.spec import base_revision, draw_spec, gpu_hours_spent, load_sweep, now, sweep_identity
from job.stop import Stop
from job.store import open_store, probe
from job.store.base import Store
from job.store.documents import Json
from job.training.memory import plan_memory
from job.training.recipe import Recipe
from job.training.state import unreadable

if TYPE_CHECKING:
    import torch

    from job.training.fit import Fit

# Trains an attempt's spec in a work folder; the publisher keeps what must survive.
FitFunction = Callable[["Attempt", AttemptClock, Publisher, Path], "Fit"]

FRUITLESS_ATTEMPTS = 3  # that trained two checkpoint intervals each and published nothing later
STARTLESS_ATTEMPTS = 10  # that never finished a step


def run_trial(settings: Settings, stop: Stop) -> str:
    """Run the slot's trial to its commit and return the last line of the log.

    Every other way out is a `JobError`, whose exit code tells Kubernetes what to do.
    """
    store = open_store(settings.output_uri)
    return run_trial_on(store, settings, stop, open_device=_open_device, fit=fit_attempt)


def run_trial_on(
    store: Store,
    settings: Settings,
    stop: Stop,
    *,
    open_device: Callable[[Settings], torch.device],
    fit: FitFunction,
) -> str:
    """`run_trial` with the outside given: the store, the device and the training."""
    definition, sweep = load_sweep(settings)
    ledger = Ledger(store, sweep)
    slots = _slots(settings, ledger)
    if not slots:
        return f"{_slot_name(settings, sweep)}: committed before, nothing to do"
    _check_work_dir(settings.work_dir)
    device = open_device(settings)
    probe(ledger.store)
    base = resolve_base_model(settings.base_model, base_revision(settings, ledger))
    data = _prepare_data(settings, base, ledger, stop.check)
    ledger.open_sweep(sweep_identity(settings, definition, base, data))

    lease = acquire(
        ledger,
        slots,
        lease_seconds=settings.lease_seconds,
        should_stop=stop.check,
        wait=stop.wait,
    )
    if lease is None:
        return f"{_slot_name(settings, sweep)}: committed meanwhile, nothing to do"
    with lease:
        _check_progress(ledger, lease)
        spec = ledger.spec(lease.slot)
        if spec is None:
            _check_undrawn(ledger, lease)
            if (spent := _budget_spent(settings, ledger)) is not None:
                return f"slot {lease.slot}: {spent}, no new trial is begun"
            spec = draw_spec(settings, definition, ledger, lease.slot, data)
        if spec is None:
            return f"slot {lease.slot}: the search space has no point left, nothing to do"
        attempt = Attempt(settings, ledger, lease, spec, base, data, device, stop)
        return _train_and_commit(attempt, fit)


@dataclass(frozen=True)
class Attempt:
    """All that one attempt at a slot rests on."""

    settings: Settings
    ledger: Ledger
    lease: Lease
    spec: Json
    base: BaseModel
    data: PreparedData
    device: torch.device
    stop: Stop

    def check(self, clock: AttemptClock) -> None:
        """Raise `PreemptedError` if this attempt has to end: asked between micro-batches."""
        clock.report()
        if self.lease.lost:
            self.lease.ensure_held()
        self.stop.check()


def _train_and_commit(attempt: Attempt, fit: FitFunction) -> str:
    """Train the slot from where it stands, and commit it."""
    ledger, lease, spec, data = attempt.ledger, attempt.lease, attempt.spec, attempt.data
    slot = lease.slot
    if spec["data_digest"] != data.digest:
        raise SettingsError(
            f"slot {slot}: was drawn for rows {spec['data_digest']}, but JOB_DATASET_URI now gives"
            f" {data.digest}; put the rows back, or start another sweep with JOB_SWEEP_NAME"
        )
    log.info("slot %d: %s", slot, ", ".join(f"{k}={v}" for k, v in spec["params"].items()))
    clock = AttemptClock(attempt.settings, lease)

    with tempfile.TemporaryDirectory(dir=attempt.settings.work_dir, prefix="attempt-") as folder:
        work_dir = Path(folder)
        publisher = Publisher(
            ledger,
            lease,
            interval_seconds=attempt.settings.checkpoint_minutes * 60,
            seconds_left=attempt.stop.seconds_left,
            resume_dir=restore(ledger, lease, work_dir, unreadable),
        )
        publisher.start()
        try:
            fitted = fit(attempt, clock, publisher, work_dir)
        except PreemptedError:
            raise _saved(lease, publisher, attempt.stop) from None
        publisher.flush()
        history_key = publish_history(ledger.store, ledger.slot_prefix(slot), fitted.history_path)
    result = {
        **outcome(fitted, clock),
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
    if not ledger.commit(slot, result):
        return f"slot {slot}: was committed by another attempt meanwhile, which holds"
    publisher.discard(keep=result["adapter_key"])
    return f"slot {slot} committed: {summary(result)}"


def fit_attempt(attempt: Attempt, clock: AttemptClock, publisher: Publisher, work_dir: Path) -> Fit:
    """Train an attempt for real."""
    from job.training.fit import FitInputs, fit  # torch: not before there is something to train

    recipe = Recipe.from_json(attempt.spec["recipe"])
    inputs = FitInputs(
        location=attempt.base.location,
        revision=attempt.base.hub_revision,
        train_table=attempt.data.train,
        eval_table=attempt.data.eval.head(attempt.settings.eval_rows),
        memory=plan_memory(
            on_gpu=attempt.device.type == "cuda",
            per_device_train_batch_size=recipe.per_device_train_batch_size,
            max_seq_length=attempt.settings.max_seq_length,
        ),
        out_of_time=clock.out_of_time,
        measure_step_0=attempt.spec["measure_step_0"],
        max_adapter_bytes=int(attempt.settings.max_adapter_mb * 1e6),
    )

    return fit(
        recipe,
        inputs,
        device=attempt.device,
        work_dir=work_dir,
        keeper=publisher,
        should_stop=lambda: attempt.check(clock),
    )


def _slots(settings: Settings, ledger: Ledger) -> list[int]:
    """The slots that this run may work on. Raises `SlotError` if its own was given up."""
    if settings.completion_index is None:
        return ledger.open_slots(settings.num_trials)
    slot = settings.completion_index
    if (reason := ledger.failure(slot)) is not None:
        raise SlotError(f"slot {slot} was given up: {reason}")
    return [slot] if ledger.is_open(slot) else []


def _slot_name(settings: Settings, sweep: str) -> str:
    if settings.completion_index is None:
        return f"sweep {sweep}, all {settings.num_trials} slots"
    return f"slot {settings.completion_index}"


def _open_device(settings: Settings) -> torch.device:
    from job.training.device import open_device  # torch: not for a slot that is done

    return open_device(settings.device, gpu_memory_gb=settings.gpu_memory_gb)


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


def _check_progress(ledger: Ledger, lease: Lease) -> None:
    """Close a slot that eats attempts without getting anywhere; preemptions alone never do."""
    fruitless, startless = lease.content["fruitless"], lease.content["startless"]
    if fruitless < FRUITLESS_ATTEMPTS and startless < STARTLESS_ATTEMPTS:
        return
    reason = (
        f"{fruitless} attempts in a row trained for two checkpoint intervals and saved nothing"
        if fruitless >= FRUITLESS_ATTEMPTS
        else f"{startless} attempts in a row ended before their first step"
    )
    ledger.close(lease.slot, reason)
    raise SlotError(f"slot {lease.slot} is given up: {reason}; look at its attempts' last lines")


def _check_undrawn(ledger: Ledger, lease: Lease) -> None:
    """A slot with a checkpoint but no spec is damaged, and never drawn again."""
    if lease.content["checkpoints"]:
        raise SlotError(
            f"slot {lease.slot} is damaged: it has checkpoints but no spec.json in"
            f" {ledger.store.uri}/{ledger.slot_prefix(lease.slot)}"
        )


def _budget_spent(settings: Settings, ledger: Ledger) -> str | None:
    limit = settings.sweep_budget_gpu_hours
    if limit is None or (spent := gpu_hours_spent(ledger, settings.num_trials)) < limit:
        return None
    return f"{spent:.1f} GPU-hours are spent, JOB_SWEEP_BUDGET_GPU_HOURS is {limit:g}"


def _saved(lease: Lease, publisher: Publisher, stop: Stop) -> PreemptedError:
    """What to say of a preempted attempt, once its last checkpoint is up or time has run out."""
    if lease.lost:
        return PreemptedError(f"slot {lease.slot}: a newer attempt holds it")
    in_time = publisher.flush(timeout=stop.seconds_left())
    checkpoints = lease.content["checkpoints"]
    step = checkpoints[0]["step"] if checkpoints else 0
    note = "" if in_time else " (the last upload did not end in time)"
    return PreemptedError(f"slot {lease.slot}: goes on from step {step} next time{note}")


def _check_work_dir(work_dir: Path) -> None:
    """Before minutes are spent: `JOB_WORK_DIR` must be a folder that we may write."""
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=work_dir).close()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SettingsError(
            f"JOB_WORK_DIR: {work_dir} cannot be written ({error.strerror}); give a folder that"
            " this user may write"
        ) from error
