"""A trial's run while it trains: rows follow the history file in a thread of its own.

Training and commit never wait for W&B: a failing client costs a warning, and what it did not take
is sent again, by the same thread, the next attempt or a later pod.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from job.errors import JobError, PreemptedError
from job.ledger import Ledger
from job.log import log
from job.mirror.confirmed import confirm
from job.mirror.reach import check_reachable
from job.mirror.rows import Rows
from job.mirror.runs import describe, end_run, open_run, place_of, send_rows, upload_seconds
from job.settings import Settings
from job.stop import Stop
from job.store.documents import Json
from job.sweep.wandb_agent import AgentRun
from job.wandb_client import brief, is_wanted, prepare

FOLLOW_SECONDS = 1.0  # between two looks at the history file
REOPEN_SECONDS = 60.0  # between two tries to open a run
CONFIRM_SECONDS = 30.0  # beyond the last upload
FAIL_SECONDS = 10.0  # for a run's end when the trial failed anyway


LATER = "the result holds; the sweep's next trial or `job report --mirror` brings W&B up to date"


class Mirror:
    """The run of one attempt; without a key every method does nothing."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        slot: int,
        spec: Json,
        agent_run: AgentRun | None,
        *,
        is_ours: Callable[[], bool],
        stop: Stop,
    ) -> None:
        self.stop_requested = agent_run.stop_requested if agent_run else threading.Event()
        self._is_on = is_wanted(settings)
        self._settings, self._ledger, self._slot = settings, ledger, slot
        self._place = place_of(settings, ledger.sweep, slot, spec)
        self._agent_run = agent_run
        self._run: Any = agent_run.run if agent_run else None
        self._is_ours, self._stop = is_ours, stop
        self._path: Path | None = None
        self._rows = Rows()
        self._reading = threading.Lock()
        self._sent: int | None = None  # the last step that the client was given; None: not begun
        self._next_try = 0.0
        self._ending = threading.Event()
        self._ended = threading.Event()
        self._result: Json | None = None
        self._exit_code = 0
        self._said: tuple[str, str] | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name="mirror")

    def follow(self, history_path: Path) -> None:
        """Begin to send what the history file says."""
        self._path = history_path
        if self._is_on:
            prepare(self._settings)
            self._thread.start()

    def read_to_end(self) -> None:
        """The history is whole; its file may go."""
        if self._is_on:
            self._read()
            self._rows.is_whole = True

    def commit(self, result: Json) -> None:
        """Bring the run to the trial's end, as far as W&B takes it in time."""
        self._end(result, 0, upload_seconds(self._settings) + CONFIRM_SECONDS)

    def fail(self, error: JobError) -> None:
        """End the run as failed; one that goes on elsewhere is left as it is."""
        if not isinstance(error, PreemptedError) and self._stop.seconds_left() is None:
            self._end(None, int(error.exit_code), FAIL_SECONDS)

    def _end(self, result: Json | None, exit_code: int, seconds: float) -> None:
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
        if self.stop_requested.is_set() or not self._is_ours():
            return  # the agent is closing the run; or another attempt has it
        try:
            if self._open():
                self._sent = send_rows(self._run, self._rows, self._sent)
        except Exception as error:  # whatever the client may raise, training goes on
            self._warn(error, "the trial goes on, and W&B is asked again every minute")

    def _open(self) -> bool:
        """Whether the run is open; one that could not be opened is tried again a minute later."""
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
            if not self._is_ours() or not self._open():
                return
            if self._result is None:
                self._run.finish(exit_code=self._exit_code)
            else:
                self._complete(self._result)
            if self._agent_run is not None:
                self._agent_run.release()
        except Exception as error:  # the bucket has it all; a later pod tells W&B
            self._warn(error, LATER)

    def _complete(self, result: Json) -> None:
        run = self._run
        is_taken = end_run(
            run,
            result,
            artifact=self._settings.wandb_artifact,
            ledger=self._ledger,
            work_dir=self._settings.work_dir,
            after=self._sent,
            rows=self._rows,
        )
        if is_taken and confirm(self._ledger, self._slot, run, result, len(self._rows)):
            log.info("slot %d: mirrored to W&B", self._slot)
        else:
            log.warning("W&B did not confirm the run; later: job report --mirror")

    def _warn(self, error: Exception, outlook: str) -> None:
        said = brief(error).removeprefix("W&B: ")
        if (said, outlook) != self._said:  # else a trial's outage is a line a minute
            self._said = (said, outlook)
            log.warning("W&B: %s; %s", said, outlook)
        if self._agent_run is None:  # an agent's run stays open until the agent ends
            self._run = None
