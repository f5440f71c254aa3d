"""A trial's W&B run: opened by the id in its spec, brought up to date, ended as the trial ended."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from job.checkpoint import fetch_folder
from job.errors import OutageError
from job.ledger import Ledger
from job.log import log
from job.mirror.rows import Rows
from job.settings import Settings
from job.store.documents import Json
from job.wandb_client import (
    DEFAULT_PROJECT,
    api,
    brief,
    finish_seconds,
    is_refusal,
    run_settings,
)

UPLOAD_SECONDS = 600.0  # instead of WANDB_FINISH_TIMEOUT, when the run carries the adapter itself
CONFIRM_TRIES = 4  # W&B shows what it was sent with a delay
ENDED_WELL = ("completed", "truncated", "stopped")
SUMMARY = (
    *("status", "best_step", "steps", "attempts", "gpu_seconds", "tokens_per_second"),
    *("peak_memory_bytes", "adapter_bytes", "adapter_sha256"),
)


@dataclass(frozen=True)
class Place:
    """Where a trial's run is, and what W&B is told of the trial before it trains."""

    run_id: str
    entity: str | None
    project: str
    sweep_id: str | None  # None: drawn by the built-in engine, so grouped instead
    group: str | None
    name: str
    config: Json
    tags: tuple[str, ...] = ()


def place_of(settings: Settings, sweep: str, slot: int, spec: Json) -> Place:
    """Of the spec alone and what the environment says of entity and project."""
    recipe = {k: v for k, v in spec["recipe"].items() if k != "eval_steps"}
    entity, project, sweep_id = (
        spec["wandb_sweep"].split("/") if "wandb_sweep" in spec else (None, None, None)
    )
    return Place(
        run_id=spec["wandb_run_id"],
        entity=entity or settings.wandb_entity,
        project=project or settings.wandb_project or DEFAULT_PROJECT,
        sweep_id=sweep_id,
        group=None if sweep_id else sweep,
        name=f"{sweep}-{slot:04d}",
        config={
            **recipe,
            "slot": slot,
            "data_digest": spec["data_digest"],
            "code_version": spec["code_version"],
        },
    )


def open_run(
    place: Place, *, on_stop: Callable[[], None] | None = None, upload_seconds: float
) -> Any:
    """The run, new or the one that is there already. Raises what the client raises.

    If W&B refuses the id (it never gives that of a deleted run again), the run is another one of
    the same group, tagged with the first one's id.
    """
    try:
        return _init(place, on_stop, upload_seconds)
    except Exception as error:
        if not is_refusal(error):
            raise
        log.warning("W&B refuses run %s: %s", place.run_id, brief(error))
    group, tag = place.group or place.sweep_id, f"resumed_from:{place.run_id}"
    again = replace(place, run_id=f"{place.run_id}-again", sweep_id=None, group=group, tags=(tag,))
    return _init(again, on_stop, upload_seconds)


def _init(place: Place, on_stop: Callable[[], None] | None, upload_seconds: float) -> Any:
    import wandb

    settings = run_settings(on_stop, upload_seconds=upload_seconds)
    settings.sweep_id = place.sweep_id
    try:
        run = wandb.init(
            entity=place.entity,
            project=place.project,
            id=place.run_id,
            name=place.name,
            group=place.group,
            tags=place.tags,
            resume="allow",
            settings=settings,
        )
    except Exception:
        # Its service (0.31) keeps the id of a run that it could not open: "is in use" ever after.
        wandb.teardown()
        raise
    if run.id != place.run_id:  # the client gives back whatever run is open in this process
        raise OutageError(f"W&B: run {run.id} of an earlier call is still open; this one waits")
    describe(run, place)
    return run


def describe(run: Any, place: Place) -> None:
    """Tell W&B the trial's settings; a sweep's own parameters stand there already."""
    new = {k: v for k, v in place.config.items() if k not in run.config}
    run.config.update(new)


def send_rows(run: Any, rows: Rows, after: int | None) -> int:
    """Send the rows of steps after `after`; the last step sent."""
    assert after is not None
    for step, row in rows.after(after):
        # Held back, the last row would be sent after the summary, and its eval/loss put over ours.
        run.log(row, step=step, commit=True)
        after = step
    return after


def end_run(
    run: Any,
    result: Json,
    *,
    artifact: str,
    ledger: Ledger,
    work_dir: Path,
    after: int | None,
    rows: Rows,
) -> bool:
    """Send the last rows, the summary and the adapter; end the run as the trial ended.

    Whether the client took the adapter: a run without it still has to end.
    """
    send_rows(run, rows, after)
    for name in SUMMARY:
        run.summary[name] = result.get(name)
    if result["eval_loss"] is not None:  # the adapter's own, not that of the last evaluation
        run.summary["eval/loss"] = result["eval_loss"]
    is_taken = True
    with tempfile.TemporaryDirectory(dir=work_dir, prefix="artifact-") as folder:
        if result["adapter_key"] is not None and artifact != "none":
            try:
                run.log_artifact(_artifact(run.id, result, artifact, ledger, Path(folder)))
            except Exception as error:
                log.warning("W&B did not take the adapter: %s", brief(error))
                is_taken = False
        run.finish(exit_code=0 if result["status"] in ENDED_WELL else 1)
    return is_taken


def upload_seconds(settings: Settings) -> float:
    """How long the last upload of a run may take."""
    return UPLOAD_SECONDS if settings.wandb_artifact == "upload" else finish_seconds()


def _artifact(run_id: str, result: Json, kind: str, ledger: Ledger, folder: Path) -> Any:
    import wandb

    names = ("adapter_sha256", "adapter_bytes", "eval_loss", "base_model", "base_model_revision")
    artifact = wandb.Artifact(
        f"adapter-{run_id}", type="model", metadata={name: result.get(name) for name in names}
    )
    key = result["adapter_key"]
    if kind == "upload":
        fetch_folder(ledger.store, key, result["adapter_sha256"], folder)
        artifact.add_dir(str(folder))
    else:  # no look into the bucket: the client's identity there may be another one
        uri = ledger.store.uri
        artifact.add_reference(
            f"{uri if '://' in uri else Path(uri).as_uri()}/{key}", name="adapter", checksum=False
        )
    return artifact


def is_confirmed(path: str, result: Json, num_rows: int) -> bool:
    """W&B itself says that it has the run's end, all its rows and its eval/loss."""
    expected = "finished" if result["status"] in ENDED_WELL else "failed"
    for attempt in range(CONFIRM_TRIES):
        if attempt:
            time.sleep(0.5 * attempt)  # in a side thread
        run = api().run(path)
        loss = run.summary_metrics.get("eval/loss")
        if (
            run.state == expected
            and run.history_line_count >= num_rows
            and (result["eval_loss"] is None or loss == result["eval_loss"])
        ):
            return True
    return False
