"""Whole documents of a sweep for tests; a test gives by name only the values it is about."""

from __future__ import annotations

from typing import Any

import numpy as np

from job.ledger.records import Identity, Lease, Recipe, Result, RowLosses, Spec

NOW = "2026-01-02T03:04:05+00:00"
FOLDER = "sweeps/s/slots/0000"  # of slot 0 of the sweep that most tests make


def make_recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "learning_rate": 1e-4, "gradient_accumulation_steps": 4, "lora_dropout": 0.05,
        "weight_decay": 0.01, "lora_r": 8, "lora_alpha": 16, "lr_scheduler": "linear",
        "warmup_ratio": 0.03, "max_grad_norm": 1.0, "per_device_train_batch_size": 2, "seed": 17,
        "planned_steps": 100, "eval_steps": (50, 100), "patience": 3,
    }  # fmt: skip
    return Recipe(**values | changes)


def make_spec(*, recipe: dict[str, Any] | None = None, **changes: Any) -> Spec:
    values: dict[str, Any] = {
        "params": {}, "recipe": make_recipe(**recipe or {}), "measure_step_0": False,
        "data_digest": "d" * 64, "wandb_run_id": "abcd1234", "code_version": "0.1.0",
        "created_at": NOW,
    }  # fmt: skip
    return Spec(**values | changes)


def make_result(folder: str = FOLDER, **changes: Any) -> Result:
    """A committed trial with an adapter in the slot's `folder`; `eval_loss=None`: without one."""
    values: dict[str, Any] = {
        "status": "completed", "reason": "all 100 planned steps", "eval_loss": 1.5, "best_step": 50,
        "steps": 100, "adapter_key": f"{folder}/adapter-{'a' * 64}", "adapter_sha256": "a" * 64,
        "adapter_bytes": 1000, "gpu_seconds": 1.0, "curve": (), "attempts": 1, "base_model": "base",
        "base_model_revision": "sha256:b", "history_key": f"{folder}/history-{'c' * 64}.jsonl",
        "committed_at": NOW,
    } | changes  # fmt: skip
    if values["eval_loss"] is None:
        values |= {"adapter_key": None, "adapter_sha256": None, "adapter_bytes": None}
    return Result(**values)


def make_rows(loss: float, *, trial: object, step: int = 50, num_rows: int = 192) -> RowLosses:
    """Rows of unequal lengths with this eval/loss; a hard row is hard in every trial."""
    shared = np.random.default_rng(5)
    targets = np.ceil(shared.lognormal(3, 0.7, num_rows)).astype(int)
    own = np.random.default_rng(sum(str(trial).encode()))
    each = shared.normal(0, 0.4, num_rows) + own.normal(0, 0.02, num_rows)
    each += loss - each @ targets / targets.sum()
    return RowLosses(
        step=step, nll=tuple((each * targets).tolist()), targets=tuple(targets.tolist())
    )


def make_lease(**changes: Any) -> Lease:
    """A lease that nobody holds any more."""
    values: dict[str, Any] = {"owner": "o", "epoch": 1, "state": "released"}
    return Lease.model_validate(values | changes)


def make_identity(**changes: Any) -> Identity:
    return Identity.model_validate({"JOB_DATASET_URI": {"prepared": "d" * 64}} | changes)
