"""A sweep on the W&B server: registered, read, and checked against what this job can train."""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from job.errors import PreemptedError, SettingsError, SweepError
from job.log import log
from job.settings import Settings
from job.sweep.definition import SweepDefinition, parse_definition
from job.sweep.distributions import contains
from job.sweep.hyperparameters import HYPERPARAMETERS
from job.wandb.client import (
    DEFAULT_PROJECT,
    POLL_SECONDS,
    api,
    call,
    check_wanted,
    prepare,
    retried,
)

RUNS_PER_TRIAL = 2  # run_cap of a new sweep: the ledger limits trials; a lost draw costs a run
PAUSE_SECONDS = 15.0  # between two questions whether a paused sweep goes on

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class SweepPath:
    """Where a sweep is; only the id names its folder in the bucket."""

    entity: str | None  # None: the key's default
    project: str
    id: str

    def __str__(self) -> str:
        return "/".join(part for part in (self.entity, self.project, self.id) if part)


@dataclass(frozen=True)
class ServerSweep:
    """A sweep as W&B has it now."""

    path: SweepPath
    state: str  # PENDING, RUNNING, PAUSED, FINISHED, CANCELED, …
    definition: SweepDefinition
    url: str = ""

    @property
    def is_over(self) -> bool:
        """Whether W&B gives no more trials."""
        return self.state in ("FINISHED", "CANCELED", "CANCELLED", "STOPPED", "FAILED", "CRASHED")


def sweep_path(settings: Settings) -> SweepPath:
    """`WANDB_SWEEP_ID`, which may be id, project/id or entity/project/id, in its parts.

    Raises `SettingsError` for anything else.
    """
    given = settings.wandb_sweep_id
    assert given is not None
    *before, sweep_id = given.strip().strip("/").split("/")
    if len(before) > 2 or not _ID.fullmatch(sweep_id) or not all(map(_PART.fullmatch, before)):
        raise SettingsError(
            f"WANDB_SWEEP_ID: is {given!r}; allowed: id, project/id or entity/project/id, as"
            " `job sweep create` prints it"
        )
    entity = before[0] if len(before) == 2 else settings.wandb_entity
    project = before[-1] if before else settings.wandb_project or DEFAULT_PROJECT
    return SweepPath(entity, project, sweep_id)


def read_sweep(settings: Settings, should_stop: Callable[[], None]) -> ServerSweep:
    """The sweep as W&B has it now, asked for until `JOB_OUTAGE_MINUTES` are over.

    Raises `SettingsError` if there is none or it is not one of ours, `CredentialsError` if the key
    is refused, `OutageError`.
    """
    prepare(settings)
    path, limit = sweep_path(settings), 60 * settings.outage_minutes

    def ask() -> ServerSweep:
        return call(f"reading sweep {path}", lambda: _fetch(path, limit), should_stop=should_stop)

    def pause(seconds: float) -> None:
        _pause(seconds, should_stop)

    return retried(ask, seconds=limit, pause=pause)


def wait_until_running(settings: Settings, should_stop: Callable[[], None]) -> ServerSweep:
    """The sweep, once it is not paused; `PreemptedError` after `JOB_OUTAGE_MINUTES` of waiting."""
    waited, limit = 0.0, 60 * settings.outage_minutes
    while (sweep := read_sweep(settings, should_stop)).state == "PAUSED":
        if waited >= limit:
            raise PreemptedError(
                f"sweep {sweep.path} is paused, for {waited / 60:.2g} min now: resume it there"
            )
        if not waited:
            log.warning("sweep %s is paused; waiting %.2g min at most", sweep.path, limit / 60)
        pause = min(PAUSE_SECONDS, max(POLL_SECONDS, limit - waited))
        _pause(pause, should_stop)
        waited += pause
    return sweep


def create_sweep(settings: Settings, definition: SweepDefinition) -> ServerSweep:
    """Register the sweep; the ledger limits its trials, so `run_cap` is twice their number."""
    check_wanted(settings)
    prepare(settings)
    source = definition.to_json()
    run_cap = RUNS_PER_TRIAL * min(settings.num_trials, definition.run_cap or settings.num_trials)
    config = {**source, "run_cap": run_cap}
    entity = settings.wandb_entity or source.get("entity")
    project = settings.wandb_project or source.get("project") or DEFAULT_PROJECT

    def register() -> tuple[SweepPath, str]:
        import wandb

        client = api()
        with contextlib.redirect_stdout(io.StringIO()):  # the client prints what `next_steps` says
            sweep_id = wandb.sweep(config, entity=entity, project=project)
        path = SweepPath(entity or client.default_entity, project, sweep_id)
        return path, str(client.sweep(str(path)).url)

    path, url = call("registering the sweep", register, should_stop=lambda: None)
    return ServerSweep(path, "PENDING", parse_definition(config, free_name=True), url)


def next_steps(settings: Settings, sweep: ServerSweep) -> str:
    """The text that `job sweep create` prints: the id, the page, and how to go on."""
    path, trials = sweep.path, settings.num_trials
    base_url = " --env WANDB_BASE_URL" if "WANDB_BASE_URL" in os.environ else ""
    return f"""\
sweep {path}
page  {sweep.url}

Go on with docker (WANDB_API_KEY, JOB_DATASET_URI and JOB_OUTPUT_URI set in this shell):
  docker run --rm --gpus all --stop-timeout 15 --env WANDB_API_KEY{base_url} \\
    --env JOB_DATASET_URI --env JOB_OUTPUT_URI --env JOB_NUM_TRIALS={trials} \\
    --env WANDB_SWEEP_ID={path} qlora-sweep-job queue

or on a cluster ({trials} trials in k8s/sweep-job.yaml, the rows on the volume of k8s/volume.yaml):
  kubectl create secret generic qlora-sweep --from-literal=WANDB_SWEEP_ID={path} \\
    --from-literal=WANDB_API_KEY="$WANDB_API_KEY"
  kubectl apply -f k8s/sweep-job.yaml"""


def check_same(
    frozen: SweepDefinition, offered: SweepDefinition, *, where: str, way_out: str
) -> None:
    """Refuse a definition that searches something else than the one that holds."""
    keys = ("method", "parameters", "early_terminate")
    wrong = [key for key in keys if getattr(frozen, key) != getattr(offered, key)]
    if wrong:
        raise SettingsError(f"{where}: {', '.join(wrong)} differ from the sweep's own; {way_out}")


def check_params(definition: SweepDefinition, params: Mapping[str, Any]) -> None:
    """Refuse parameters that the sweep's definition cannot give."""
    wrong = [f"{name} is missing" for name in definition.parameters if name not in params]
    for name, value in params.items():
        if name not in definition.parameters:
            wrong.append(f"{name} is not a parameter of the sweep")
        elif not (
            HYPERPARAMETERS[name].accepts(value)
            and contains(definition.parameters[name], HYPERPARAMETERS[name].spelt(value))
        ):
            wrong.append(f"{name} is {value!r}")
    if wrong:
        raise SettingsError(
            "WANDB_SWEEP_ID: W&B offers parameters that the sweep does not allow:"
            f" {', '.join(sorted(wrong))}; was the sweep changed? start another one"
        )


def _fetch(path: SweepPath, limit: float) -> ServerSweep:
    client = api(limit)
    entity = path.entity or client.default_entity
    found = replace(path, entity=entity)
    try:
        sweep = client.sweep(f"{entity}/{path.project}/{path.id}")
    except Exception as error:
        if "Could not find sweep" not in str(error):
            raise
        raise SettingsError(
            f"WANDB_SWEEP_ID: W&B has no sweep {found} (deleted, another entity or project, or not"
            " shown to this WANDB_API_KEY); give entity/project/id as its page shows them"
        ) from error
    try:
        # On W&B a sweep's name is for people: it names no folder.
        config = {key: value for key, value in sweep.config.items() if key != "name"}
        definition = parse_definition(config, where=f"WANDB_SWEEP_ID: {found}")
    except SweepError as error:
        raise SweepError(f"{error}\nregister a sweep that fits with: job sweep create") from error
    return ServerSweep(found, str(sweep.state).upper(), definition)


def _pause(seconds: float, should_stop: Callable[[], None]) -> None:
    ended = threading.Event()  # never set: only a way to wait in short pieces
    for _ in range(max(1, round(seconds / POLL_SECONDS))):
        should_stop()
        ended.wait(POLL_SECONDS)
