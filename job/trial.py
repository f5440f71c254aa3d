"""One attempt at one slot, from the settings to the commit, top to bottom."""

from __future__ import annotations

import errno
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import job
from job.base_model import BaseModel, resolve_base_model
from job.checkpoint import PublishedFolder, folder_size_bytes, publish_folder, publish_history
from job.data.prepared import DataSettings, PreparedData, prepare
from job.data.tokens import load_tokenizer
from job.errors import SettingsError
from job.ledger import Ledger
from job.log import log
from job.settings import Settings
from job.spec import base_revision, draw_spec, load_sweep, now, sweep_identity
from job.store import open_store, probe
from job.store.documents import Json
from job.training.memory import plan_memory
from job.training.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from job.training.fit import Fit

ShouldStop = Callable[[], None]


def run_trial(settings: Settings, should_stop: ShouldStop) -> str:
    """Run the slot's trial to its commit and return the last line of the log.

    `should_stop` raises when the process has been told to end. Every other way out is a
    `JobError`, whose exit code tells Kubernetes what to do.
    """
    started = time.monotonic()
    definition, sweep = load_sweep(settings)
    ledger = Ledger(open_store(settings.output_uri), sweep)
    slot = settings.completion_index
    if slot is None:
        slot = ledger.first_open_slot(settings.num_trials)
    if slot is None:
        return f"sweep {sweep}: all {settings.num_trials} slots are committed, nothing to do"
    if ledger.result(slot) is not None:
        return f"slot {slot}: is committed, nothing to do"

    from job.training.device import open_device  # torch: not for a slot that is done

    _check_work_dir(settings.work_dir)
    device = open_device(settings.device, gpu_memory_gb=settings.gpu_memory_gb)
    probe(ledger.store)
    base = resolve_base_model(settings.base_model, base_revision(settings, ledger))
    data = _prepare_data(settings, base, ledger, should_stop)
    prepare_seconds = time.monotonic() - started

    ledger.open_sweep(sweep_identity(settings, definition, base, data))
    spec = ledger.spec(slot) or draw_spec(settings, definition, ledger, slot, data)
    if spec is None:
        return f"slot {slot}: the search space of sweep {sweep} has no point left, nothing to do"
    if spec["data_digest"] != data.digest:
        raise SettingsError(
            f"slot {slot}: was drawn for rows {spec['data_digest']}, but JOB_DATASET_URI now gives"
            f" {data.digest}; put the rows back, or start another sweep with JOB_SWEEP_NAME"
        )
    log.info("slot %d: %s", slot, ", ".join(f"{k}={v}" for k, v in spec["params"].items()))

    with tempfile.TemporaryDirectory(dir=settings.work_dir, prefix="attempt-") as folder:
        fitted = _train(
            settings,
            spec,
            base,
            data,
            device=device,
            work_dir=Path(folder),
            should_stop=should_stop,
        )
        adapter = _publish_adapter(settings, ledger, slot, fitted)
        history_key = publish_history(ledger.store, ledger.slot_prefix(slot), fitted.history_path)
    result = {
        **_outcome(fitted, adapter),
        "params": spec["params"],
        "history_key": history_key,
        "attempts": 1,
        "gpu_seconds": round(time.monotonic() - started, 1),
        "wasted_gpu_seconds": 0.0,
        "data_digest": data.digest,
        "base_model": base.name,
        "base_model_revision": base.revision,
        "code_version": job.__version__,
        "wandb_run_id": spec["wandb_run_id"],
        "phase_seconds": {"prepare": prepare_seconds, **fitted.phase_seconds},
        "committed_at": now(),
    }
    ours = ledger.commit(slot, result)
    if not ours:
        return f"slot {slot}: was committed by another attempt meanwhile, which holds"
    return f"slot {slot} committed: {_summary(result)}"


def _prepare_data(
    settings: Settings, base: BaseModel, ledger: Ledger, should_stop: ShouldStop
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


def _train(
    settings: Settings,
    spec: Json,
    base: BaseModel,
    data: PreparedData,
    *,
    device: torch.device,
    work_dir: Path,
    should_stop: ShouldStop,
) -> Fit:
    from job.training.fit import FitInputs, fit

    recipe = Recipe.from_json(spec["recipe"])
    memory = plan_memory(
        on_gpu=device.type == "cuda",
        per_device_train_batch_size=recipe.per_device_train_batch_size,
        max_seq_length=settings.max_seq_length,
    )
    inputs = FitInputs(
        location=base.location,
        revision=base.hub_revision,
        train_table=data.train,
        eval_table=data.eval.head(settings.eval_rows),
        memory=memory,
        budget_seconds=settings.trial_budget_hours * 3600,
        measure_step_0=spec["measure_step_0"],
        max_adapter_bytes=int(settings.max_adapter_mb * 1e6),
    )
    return fit(recipe, inputs, device=device, work_dir=work_dir, should_stop=should_stop)


def _publish_adapter(
    settings: Settings, ledger: Ledger, slot: int, fitted: Fit
) -> PublishedFolder | None:
    if fitted.adapter_dir is None:
        return None
    size, limit = folder_size_bytes(fitted.adapter_dir), settings.max_adapter_mb * 1e6
    assert size <= limit + 1e6, f"{size} bytes: fit() lets no adapter over {limit} through"
    return publish_folder(ledger.store, f"{ledger.slot_prefix(slot)}/adapter", fitted.adapter_dir)


def _outcome(fitted: Fit, adapter: PublishedFolder | None) -> Json:
    return {
        "status": fitted.status,
        "reason": fitted.reason,
        "eval_loss": fitted.eval_loss,
        "best_step": fitted.best_step,
        "steps": fitted.steps,
        # JSON has no NaN: a diverged evaluation stands as null.
        "curve": [[step, loss if math.isfinite(loss) else None] for step, loss in fitted.curve],
        "adapter_key": adapter.key if adapter else None,
        "adapter_sha256": adapter.sha256 if adapter else None,
        "adapter_bytes": adapter.size_bytes if adapter else None,
        "training_seconds": round(fitted.training_seconds, 1),
        "tokens_per_second": fitted.tokens_per_second and round(fitted.tokens_per_second, 1),
        "peak_memory_bytes": fitted.peak_memory_bytes,
    }


def _summary(result: Json) -> str:
    if result["eval_loss"] is None:
        return f"{result['status']} ({result['reason']})"
    return (
        f"{result['status']} ({result['reason']}),"
        f" eval/loss {result['eval_loss']:.4f} at step {result['best_step']},"
        f" adapter {result['adapter_bytes'] / 1e6:.1f} MB"
    )


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
