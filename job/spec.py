"""What is frozen before training: the sweep's identity and the spec of a slot."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import job
from job.attempts import now as now  # noqa: PLC0414  # others find it here
from job.base_model import BaseModel
from job.data.prepared import PreparedData
from job.errors import SettingsError, SweepError
from job.lease import lease_key
from job.ledger import Ledger
from job.log import log
from job.settings import IDENTITY_FIELDS, ROW_FIELDS, Settings, variable
from job.store.base import Store
from job.store.documents import Json, read_document
from job.sweep.builtin import Observation, suggest
from job.sweep.definition import SweepDefinition, load_definition, parse_definition
from job.sweep.hyperband import should_stop
from job.sweep.wandb import check_same, read_sweep, sweep_path
from job.training.recipe import Recipe, plan_evaluations, plan_steps
from job.training.state import TrainState
from job.wandb_client import check_wanted

CARD_SWEEP_FILE = Path(__file__).parent / "sweep" / "sweep.yaml"


def sweep_name(settings: Settings) -> str:
    """The sweep's folder in the bucket. Raises `SweepError`, `SettingsError`."""
    if settings.wandb_sweep_id is not None:
        return settings.sweep_name or sweep_path(settings).id
    sweep = settings.sweep_name or load_sweep_file(settings).name
    if sweep is None:
        raise SettingsError(
            f"JOB_SWEEP_NAME: not set, and {settings.sweep_file} has no `name`; give either"
        )
    return sweep


def load_sweep(
    settings: Settings, store: Store, check: Callable[[], None]
) -> tuple[SweepDefinition, str]:
    """The sweep's definition and its name in the bucket.

    A W&B sweep's is what its first trial froze, so that later attempts at a drawn slot do without
    W&B; before that, what the server says. Raises `SweepError`, `SettingsError`, and what
    `read_sweep` raises.
    """
    sweep = sweep_name(settings)
    if settings.wandb_sweep_id is None:
        return load_sweep_file(settings), sweep
    check_wanted(settings)
    frozen = (Ledger(store, sweep).identity() or {}).get("JOB_SWEEP_FILE")
    definition = parse_definition(frozen) if frozen else read_sweep(settings, check).definition
    if settings.sweep_file is not None:
        check_same(
            definition,
            load_sweep_file(settings),
            where=f"JOB_SWEEP_FILE: {settings.sweep_file}",
            way_out="unset it: with WANDB_SWEEP_ID the sweep on W&B holds",
        )
    return definition, sweep


def load_sweep_file(settings: Settings) -> SweepDefinition:
    """`JOB_SWEEP_FILE`, or the card's. Raises `SweepError`."""
    try:
        return load_definition(settings.sweep_file or CARD_SWEEP_FILE)
    except SweepError as error:
        raise SweepError(f"JOB_SWEEP_FILE: {error}") from error


def sweep_identity(
    settings: Settings, definition: SweepDefinition, base: BaseModel, data: PreparedData
) -> Json:
    """All that can change eval/loss, by the name under which a person can change it."""
    return {
        **{variable(field): getattr(settings, field) for field in IDENTITY_FIELDS},
        "JOB_SWEEP_FILE": {
            key: value
            for key, value in definition.to_json().items()
            if key in ("method", "metric", "parameters", "early_terminate")
        },
        "JOB_BASE_MODEL": {"revision": base.revision},
        "JOB_DATASET_URI": {"prepared": data.digest},
        "_rows": {variable(field): getattr(settings, field) for field in ROW_FIELDS},
        "_base_model": base.name,
        "_base_model_revision": settings.base_model_revision,
        "_code_version": job.__version__,
        "_created_at": now(),
    }


def base_revision(settings: Settings, ledger: Ledger) -> str:
    """The revision to load: the commit that the sweep froze, while the settings ask for the same.

    A branch such as `main` may move between two trials of a sweep.
    """
    identity = ledger.identity() or {}
    same_name = identity.get("_base_model") == settings.base_model
    same_revision = identity.get("_base_model_revision") == settings.base_model_revision
    frozen = str(identity.get("JOB_BASE_MODEL", {}).get("revision", ""))
    if same_name and same_revision and frozen and not frozen.startswith("sha256:"):
        return frozen
    return settings.base_model_revision


def draw_spec(
    settings: Settings,
    definition: SweepDefinition,
    ledger: Ledger,
    slot: int,
    data: PreparedData,
) -> Json | None:
    """Ask the engine for the slot's parameters and freeze them; None if the space has no more.

    Whoever writes first wins: what is returned is what stands in the bucket.
    """
    observations, step_0_loss = observe(ledger, settings.num_trials, but=slot)
    params = suggest(
        definition,
        slot=slot,
        sweep=ledger.sweep,
        observations=observations,
        step0_loss=step_0_loss,
        defaults=settings.hyperparameters,
    )
    if params is None:
        return None
    log.info("slot %d: drawn by %s from %d results", slot, definition.method, len(observations))
    return freeze_spec(
        settings,
        ledger,
        slot,
        data,
        params,
        measure_step_0=step_0_loss is None,
        wandb={"wandb_run_id": uuid.uuid4().hex[:8]},
    )


def freeze_spec(
    settings: Settings,
    ledger: Ledger,
    slot: int,
    data: PreparedData,
    params: Mapping[str, Any],
    *,
    measure_step_0: bool,
    wandb: Mapping[str, str],
) -> Json:
    """Write the slot's spec once, whoever drew its parameters; return the one that holds."""
    values: dict[str, Any] = {**settings.hyperparameters, **params}
    planned_steps = plan_steps(
        len(data.train),
        settings.per_device_train_batch_size * values["gradient_accumulation_steps"],
        max_steps=settings.max_steps,
        num_epochs=settings.num_epochs,
    )
    recipe = Recipe(
        **values,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        seed=settings.seed,
        planned_steps=planned_steps,
        eval_steps=plan_evaluations(planned_steps, settings.evals_per_trial),
        patience=settings.patience,
    )
    spec = {
        "params": dict(params),
        "recipe": recipe.to_json(),
        "measure_step_0": measure_step_0,
        "data_digest": data.digest,
        **wandb,
        "code_version": job.__version__,
        "created_at": now(),
    }
    return ledger.specify(slot, spec)


def observe(
    ledger: Ledger, num_trials: int, *, but: int | None = None
) -> tuple[list[Observation], float | None]:
    """What the other slots say, and the untuned model's eval/loss if one of them measured it."""
    observations = []
    step_0_loss = None
    for slot in range(num_trials):
        view = ledger.pin(slot)
        spec = view.spec(slot) if slot != but else None
        if spec is None or view.failure(slot) is not None or view.exclusion(slot) is not None:
            continue
        result = view.result(slot) or {"status": "running", "eval_loss": None, "curve": []}
        observations.append(
            Observation(slot, spec["params"], result["status"], result["eval_loss"])
        )
        for step, loss in result["curve"][:1]:
            step_0_loss = loss if step == 0 else step_0_loss
    return observations, step_0_loss


def stop_early(
    definition: SweepDefinition, ledger: Ledger, settings: Settings, state: TrainState
) -> str | None:
    """Why the sweep file's `early_terminate` ends this trial; None if it may go on."""
    if definition.early_terminate is None or settings.wandb_sweep_id is not None:
        return None  # W&B's own is told to its agent
    own = [loss for step, loss in state.curve if step > 0]
    others = [
        [loss for step, loss in result["curve"] if step > 0 and loss is not None]
        for _, _, result in ledger.committed(settings.num_trials)
    ]
    if should_stop(definition.early_terminate, own, others):
        return f"early_terminate: among the worse after {len(own)} evaluations"
    return None


def check_vocabulary(base: BaseModel, data: PreparedData) -> None:
    """Refuse a tokenizer that knows more tokens than the model: it would index past its table."""
    vocab_size = base.config.get("vocab_size")
    highest = max(int(table.input_ids.max()) for table in (data.train, data.eval))
    if isinstance(vocab_size, int) and highest >= vocab_size:
        raise SettingsError(
            f"JOB_BASE_MODEL: {base.name}: its tokenizer gives token {highest}, but its model has"
            f" only {vocab_size}; the two do not belong together"
        )


def gpu_hours_spent(ledger: Ledger, num_trials: int) -> float:
    """GPU-hours of all attempts at all slots: ended, killed and running, as of the last renewal.

    Also those of excluded slots, and of what came before a redo: they were paid for.
    """
    seconds = 0.0
    for slot in range(num_trials):
        for generation in range(ledger.generation(slot) + 1):
            seconds += gpu_seconds(ledger.pin(slot, generation), slot)
    return seconds / 3600


def gpu_seconds(ledger: Ledger, slot: int) -> float:
    """Of all attempts at the slot in the ledger's generation of it."""
    result = ledger.result(slot)
    committed = float(result["gpu_seconds"]) if result is not None else 0.0
    lease = read_document(ledger.store, lease_key(ledger, slot))
    if lease is None:
        return committed
    own = lease.content["attempt"].get("gpu_seconds", 0.0)
    # Of a slot that two attempts worked on at once, the lease knows of both.
    return max(committed, float(lease.content["gpu_seconds_before"] + own))
