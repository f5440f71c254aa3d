"""A trial's run on W&B: opened by the id in its spec, kept up to date, ended as the trial ended.

Training and commit never wait for W&B: a failing client costs a warning, and what it did not take
is sent again, by the same thread, the next attempt or a later pod.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from job.errors import JobError, OutageError, PreemptedError
from job.ledger.folders import fetch_folder
from job.ledger.lease import HeldLease
from job.ledger.records import Result, Spec
from job.ledger.slot import Slot
from job.log import log
from job.process.stop import Stop
from job.settings import Settings
from job.store.base import Store
from job.store.documents import create_document
from job.wandb.agent import AgentRun
from job.wandb.client import (
    DEFAULT_PROJECT,
    api,
    brief,
    check_reachable,
    finish_seconds,
    is_refusal,
    is_wanted,
    prepare,
    run_settings,
)
from job.wandb.rows import Rows

FOLLOW_SECONDS = 1.0  # between two looks at the history file
REOPEN_SECONDS = 60.0  # between two tries to open a run
UPLOAD_SECONDS = 600.0  # instead of WANDB_FINISH_TIMEOUT, when the run carries the adapter itself
CONFIRM_SECONDS = 30.0  # W&B's confirmation may take so long after the last upload
FAIL_SECONDS = 10.0  # a run's end may take so long when the trial failed
LATER = "the result holds; the sweep's next trial or `job report --mirror` brings W&B up to date"
MIRROR_FILE = "mirror.json"  # created once, with the run and its url: W&B has all of the trial
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
    config: dict[str, Any]
    tags: tuple[str, ...] = ()


def place_of(settings: Settings, slot: Slot, spec: Spec) -> Place:
    """The place of a slot's run, from its spec and the environment's entity and project."""
    recipe = {k: v for k, v in spec.recipe.to_json().items() if k != "eval_steps"}
    entity, project, sweep_id = (None, None, None)
    if spec.wandb_sweep is not None:
        entity, project, sweep_id = spec.wandb_sweep.split("/")
    sweep = slot.ledger.sweep
    return Place(
        run_id=spec.wandb_run_id,
        entity=entity or settings.wandb_entity,
        project=project or settings.wandb_project or DEFAULT_PROJECT,
        sweep_id=sweep_id,
        group=None if sweep_id else sweep,
        name=f"{sweep}-{slot.number:04d}",
        config={
            **recipe,
            "slot": slot.number,
            "data_digest": spec.data_digest,
            "code_version": spec.code_version,
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
        # wandb's service (0.31) keeps the id of a run that it could not open as "in use" for ever.
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
    """Send the rows of steps after `after`; return the last step sent."""
    assert after is not None
    for step, row in rows.after(after):
        # Without `commit` the client holds the last row back until after the summary, and then puts
        # the row's eval/loss over ours.
        run.log(row, step=step, commit=True)
        after = step
    return after


def end_run(
    run: Any,
    slot: Slot,
    result: Result,
    *,
    artifact: str,
    work_dir: Path,
    after: int | None,
    rows: Rows,
) -> bool:
    """Send the last rows, the summary and the adapter; end the run as the trial ended.

    Returns whether the client took the adapter; a run without it still has to end.
    """
    send_rows(run, rows, after)
    for name in SUMMARY:
        run.summary[name] = getattr(result, name)
    if result.eval_loss is not None:  # the adapter's own, not that of the last evaluation
        run.summary["eval/loss"] = result.eval_loss
    is_taken = True
    with tempfile.TemporaryDirectory(dir=work_dir, prefix="artifact-") as folder:
        if result.adapter_key is not None and artifact != "none":
            try:
                run.log_artifact(_artifact(run.id, slot.store, result, artifact, Path(folder)))
            except Exception as error:
                log.warning("W&B did not take the adapter: %s", brief(error))
                is_taken = False
        run.finish(exit_code=0 if result.status in ENDED_WELL else 1)
    return is_taken


def upload_seconds(settings: Settings) -> float:
    """How long the last upload of a run may take."""
    return UPLOAD_SECONDS if settings.wandb_artifact == "upload" else finish_seconds()


def _artifact(run_id: str, store: Store, result: Result, kind: str, folder: Path) -> Any:
    import wandb

    names = ("adapter_sha256", "adapter_bytes", "eval_loss", "base_model", "base_model_revision")
    artifact = wandb.Artifact(
        f"adapter-{run_id}", type="model", metadata={name: getattr(result, name) for name in names}
    )
    key, sha256 = result.adapter_key, result.adapter_sha256
    assert key is not None
    assert sha256 is not None
    if kind == "upload":
        fetch_folder(store, key, sha256, folder)
        artifact.add_dir(str(folder))
    else:  # no look into the bucket: the client's identity there may be another one
        uri = store.uri
        artifact.add_reference(
            f"{uri if '://' in uri else Path(uri).as_uri()}/{key}", name="adapter", checksum=False
        )
    return artifact


def confirm(run: Any, slot: Slot, result: Result, num_rows: int) -> bool:
    """Write `mirror.json` if W&B has everything; return whether it has."""
    path = f"{run.entity}/{run.project}/{run.id}"
    if not is_confirmed(path, result, num_rows):
        return False
    create_document(slot.store, slot.key(MIRROR_FILE), {"run": path, "url": run.url})
    return True


def is_confirmed(path: str, result: Result, num_rows: int) -> bool:
    """Whether W&B itself says that it has the run's end, all its rows and its eval/loss."""
    expected = "finished" if result.status in ENDED_WELL else "failed"
    for attempt in range(CONFIRM_TRIES):
        if attempt:
            time.sleep(0.5 * attempt)  # in a side thread
        run = api().run(path)
        loss = run.summary_metrics.get("eval/loss")
        if (
            run.state == expected
            and run.history_line_count >= num_rows
            and (result.eval_loss is None or loss == result.eval_loss)
        ):
            return True
    return False


class Mirror:
    """The run of one attempt; without a key every method does nothing."""

    def __init__(
        self,
        settings: Settings,
        lease: HeldLease,
        spec: Spec,
        agent_run: AgentRun | None,
        *,
        stop: Stop,
    ) -> None:
        self.stop_requested = agent_run.stop_requested if agent_run else threading.Event()
        self._is_on = is_wanted(settings)
        self._settings, self._lease, self._slot = settings, lease, lease.slot
        self._place = place_of(settings, lease.slot, spec)
        self._agent_run = agent_run
        self._run: Any = agent_run.run if agent_run else None
        self._stop = stop
        self._path: Path | None = None
        self._rows = Rows()
        self._reading = threading.Lock()
        self._sent: int | None = None  # the last step that the client was given; None: not begun
        self._next_try = 0.0
        self._ending = threading.Event()
        self._ended = threading.Event()
        self._result: Result | None = None
        self._exit_code = 0
        self._warned: tuple[str, str] | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name="mirror")

    def follow(self, history_path: Path) -> None:
        """Begin to send what the history file says."""
        self._path = history_path
        if self._is_on:
            prepare(self._settings)
            self._thread.start()

    def read_to_end(self) -> None:
        """Read the rest of the history, after which its file may be deleted."""
        if self._is_on:
            self._read()
            self._rows.is_whole = True

    def commit(self, result: Result) -> None:
        """Bring the run to the trial's end, as far as W&B takes it in time."""
        self._end(result, 0, upload_seconds(self._settings) + CONFIRM_SECONDS)

    def fail(self, error: JobError) -> None:
        """End the run as failed; one that goes on elsewhere is left as it is."""
        if not isinstance(error, PreemptedError) and self._stop.seconds_left() is None:
            self._end(None, int(error.exit_code), FAIL_SECONDS)

    def _end(self, result: Result | None, exit_code: int, seconds: float) -> None:
        if not self._is_on or not self._thread.is_alive():
            return
        self._result, self._exit_code = result, exit_code
        deadline = time.monotonic() + seconds
        self._ending.set()
        while not self._ended.wait(0.05):
            with contextlib.suppress(PreemptedError):
                self._stop.check()  # also the watchdog's sign of life: an upload may take minutes
            if self._stop.seconds_left() is not None or time.monotonic() >= deadline:
                log.warning("W&B did not take the run's end in time; later: job report --mirror")
                return

    def _work(self) -> None:
        try:
            while not self._ending.wait(FOLLOW_SECONDS):
                self._send()
            self._close()
        finally:
            self._ended.set()

    def _read(self) -> None:
        with self._reading:
            if self._path is not None and not self._rows.is_whole:
                self._rows.read(self._path)

    def _send(self) -> None:
        """Open the run if it is not, send what is new. No failure of the client reaches us."""
        self._read()
        if self.stop_requested.is_set() or self._lease.lost:
            return  # the agent is closing the run; or another attempt has it
        try:
            if self._open():
                self._sent = send_rows(self._run, self._rows, self._sent)
        except Exception as error:  # whatever the client may raise, training goes on
            self._warn(error, "the trial goes on, and W&B is asked again every minute")

    def _open(self) -> bool:
        """Open the run, a minute after a failure at the earliest; return whether it is open."""
        if self._run is None and time.monotonic() >= self._next_try:
            self._next_try = time.monotonic() + REOPEN_SECONDS
            check_reachable()
            self._run = open_run(
                self._place,
                on_stop=self.stop_requested.set,
                upload_seconds=upload_seconds(self._settings),
            )
            self._sent = None
        if self._run is None:
            return False
        if self._sent is None:
            describe(self._run, self._place)
            self._sent = self._run.starting_step - 1
            log.info("W&B: %s", self._run.url)
        return True

    def _close(self) -> None:
        try:
            if self._agent_run is not None and self.stop_requested.is_set():
                self._agent_run.release()  # it has ended the run, and takes its client with it
                self._agent_run, self._run = None, None
            self._next_try = 0.0
            if self._lease.lost or not self._open():
                return
            if self._result is None:
                self._run.finish(exit_code=self._exit_code)
            else:
                self._complete(self._result)
            if self._agent_run is not None:
                self._agent_run.release()
        except Exception as error:  # the bucket has it all; a later pod tells W&B
            self._warn(error, LATER)

    def _complete(self, result: Result) -> None:
        run = self._run
        is_taken = end_run(
            run,
            self._slot,
            result,
            artifact=self._settings.wandb_artifact,
            work_dir=self._settings.work_dir,
            after=self._sent,
            rows=self._rows,
        )
        if is_taken and confirm(run, self._slot, result, len(self._rows)):
            log.info("slot %d: mirrored to W&B", self._slot.number)
        else:
            log.warning("W&B did not confirm the run; later: job report --mirror")

    def _warn(self, error: Exception, outlook: str) -> None:
        reason = brief(error).removeprefix("W&B: ")
        if (reason, outlook) != self._warned:  # else an outage would be a line a minute
            self._warned = (reason, outlook)
            log.warning("W&B: %s; %s", reason, outlook)
        if self._agent_run is None:  # an agent's run stays open until the agent ends
            self._run = None
