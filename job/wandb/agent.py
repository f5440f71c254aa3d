"""The parameters for a slot, drawn from a W&B sweep by an agent in a side thread.

One `wandb.agent(function=…, count=1)`; training stays in the main thread. The agent's function
opens the run, has its parameters frozen as its first act, and then waits in short polls while the
trial trains: a stop, from a person or `early_terminate`, arrives as a bare `Exception` in that
thread, which a blocked wait would not see. If the function did not return at once then, the agent
would fetch a second run after 5 s, which nobody would execute.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from job.errors import JobError, OutageError
from job.settings import Settings
from job.sweep.definition import SweepDefinition
from job.wandb.client import POLL_SECONDS, as_job_error, finish_seconds, run_settings
from job.wandb.sweeps import SweepPath, check_params, check_same, read_sweep, wait_until_running

# begin(params, run_id, path) freezes the parameters; it returns whether they are those that hold.
Begin: TypeAlias = Callable[[Mapping[str, Any], str, SweepPath], bool]


class AgentRun:
    """A run that the sweep's agent was given; the agent waits in its thread until `release`."""

    def __init__(self, path: SweepPath, begin: Begin) -> None:
        self.run: Any = None
        self.path = path
        self.stop_requested = threading.Event()
        self.error: Exception | None = None
        self._begin = begin
        self._released = threading.Event()
        self._handed_over = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._agent, daemon=True, name="wandb agent")

    def wait_for_run(self, seconds: float, should_stop: Callable[[], None]) -> bool:
        """Wait until the agent was given a run; False if it ended without one.

        Raises `OutageError` after `seconds`, what the client's own error means, and what
        `should_stop` raises.
        """
        self._thread.start()
        waited = 0.0
        while not self._handed_over.wait(POLL_SECONDS) and not self._ended.is_set():
            should_stop()
            waited += POLL_SECONDS
            if waited >= seconds:
                raise OutageError(f"W&B: no trial from sweep {self.path} in {seconds / 60:g} min")
        if self.error is not None:
            raise as_job_error(f"drawing from sweep {self.path}", self.error) from self.error
        return self._handed_over.is_set()

    def release(self) -> None:
        """Let the agent end; its client is gone afterwards."""
        self._released.set()
        self._thread.join(finish_seconds() + 10)

    def _agent(self) -> None:
        import wandb

        try:
            wandb.agent(
                self.path.id,
                function=self._function,
                entity=self.path.entity,
                project=self.path.project,
                count=1,
            )
        except Exception as error:
            self.error = self.error or error
        self._ended.set()

    def _function(self) -> None:
        """Run by the agent; must not raise: the run would end as failed, with a traceback."""
        try:
            if self._open():
                self._handed_over.set()
                while not self._released.wait(POLL_SECONDS):
                    pass
        except Exception as error:
            if self._handed_over.is_set():
                self.stop_requested.set()
            else:
                self.error = error

    def _open(self) -> bool:
        import wandb

        run = wandb.init(settings=run_settings())
        try:
            ours = self._begin(dict(run.config), run.id, self.path)
        except JobError as error:
            run.finish(exit_code=int(error.exit_code))
            raise
        if not ours:
            run.tags = (*(run.tags or ()), "superseded")
            run.finish(exit_code=1)
            return False
        self.run = run
        return True


def draw(
    settings: Settings,
    frozen: SweepDefinition,
    begin: Begin,
    *,
    should_stop: Callable[[], None],
) -> AgentRun | None:
    """A run of the sweep whose parameters `begin` has frozen; None if W&B has no more of them.

    `begin` says whether they are the ones that hold: a run that lost ends as failed, tagged
    `superseded`, and None is returned, too.
    """
    sweep = wait_until_running(settings, should_stop)
    check_same(
        frozen,
        sweep.definition,
        where=f"WANDB_SWEEP_ID: {sweep.path} on W&B",
        way_out="undo the change there, or start another sweep",
    )
    if sweep.is_over:
        return None

    def begin_checked(params: Mapping[str, Any], run_id: str, path: SweepPath) -> bool:
        check_params(frozen, params)
        return begin(params, run_id, path)

    drawn = AgentRun(sweep.path, begin_checked)
    if drawn.wait_for_run(60 * settings.outage_minutes, should_stop):
        return drawn
    read_sweep(settings, should_stop)  # raises if the sweep was deleted meanwhile
    return None
