"""Process 1: a small parent that runs each trial as a child, and passes signals and codes on.

The parent imports no torch and waits for nothing but its child, so it answers a signal at once. The
child cannot: while it is in a C call, Python runs no signal handler (4 s were measured).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from types import FrameType

from job.errors import ExitCode
from job.log import log
from job.process.gpu import CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACE
from job.process.heartbeat import HeartbeatLimits, HeartbeatMonitor
from job.process.oom import oom_kills, oom_words
from job.process.stop import sleep_until
from job.settings import Settings

KILL_MARGIN_SECONDS = 3.0  # left of the grace time for the kill and our own exit
TRIES_PER_SLOT = 3  # how often `queue` tries a slot that fails
BACK_OFF_SECONDS = (5.0, 30.0)  # between those tries
TRIAL_COMMAND = (sys.executable, "-m", "job", "trial")


class Supervisor:
    """Runs trials one at a time; at SIGTERM or SIGINT it ends the running one within the grace.

    `grace_seconds` is the time from signal to exit, `limits` says how long a trial may be silent.
    """

    def __init__(
        self,
        grace_seconds: float,
        limits: HeartbeatLimits | None = None,
        *,
        of_queue: bool = False,
    ) -> None:
        self._role = ["--of-queue"] if of_queue else []
        self._heartbeat_limits = limits
        self.last_words: str | None = None  # the last trial's, if it could not say them itself
        self.told_to_end = False  # whether SIGTERM or SIGINT came
        self._grace_seconds = grace_seconds
        self._child: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_end)
        signal.signal(signal.SIGALRM, self._on_deadline)

    def run(self, environ: Mapping[str, str]) -> int:
        """Run one trial in a process group of its own; return the exit code to pass on."""
        if self.told_to_end:
            self.last_words = "told to end before the trial began"
            return ExitCode.PREEMPTED
        kills_before = oom_kills()
        monitor = HeartbeatMonitor(self._heartbeat_limits)
        command = [*TRIAL_COMMAND, "--heartbeat-fd", str(monitor.write_end), *self._role]
        self._child = subprocess.Popen(
            command, env=_on_one_gpu(environ), process_group=0, pass_fds=(monitor.write_end,)
        )
        monitor.listen(self._child.pid)
        if self.told_to_end:  # the signal came between two children
            self._signal_group(signal.SIGTERM)
        status = self._wait(self._child.pid)
        monitor.close()
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._signal_group(signal.SIGKILL)  # whatever the trial may have left running
        self._child = None
        code = os.waitstatus_to_exitcode(status)
        starved = code == -signal.SIGKILL and oom_kills() > kills_before
        return self._exit_code(code, hung=monitor.found_silent, starved=starved)

    def wait(self, seconds: float) -> None:
        """Sleep until `seconds` are over or we are told to end."""
        sleep_until(lambda: self.told_to_end, seconds)

    def _wait(self, child: int) -> int:
        """Wait for `child`, return its status; reap others, as process 1 inherits all orphans."""
        while True:
            pid, status = os.wait()
            if pid == child:
                return status

    def _exit_code(self, code: int, *, hung: bool, starved: bool) -> int:
        self.last_words = None
        if self.told_to_end and code not in (ExitCode.OK, ExitCode.OUTAGE):
            if code != ExitCode.PREEMPTED:  # killed, or its last line was about another code
                self.last_words = "told to end; the next attempt goes on from the last checkpoint"
            return ExitCode.PREEMPTED
        if hung:
            self.last_words = "hang: the trial ran no Python any more and was killed, see above"
            return ExitCode.OUTAGE
        if starved:
            self.last_words = oom_words()
            return ExitCode.OUTAGE
        if code < 0:
            log.error("the trial was killed by %s", signal.Signals(-code).name)
        if code not in list(ExitCode):
            self.last_words = "the trial ended by a bug or was killed, see above"
            return ExitCode.BUG
        return code

    def _on_end(self, number: int, _frame: FrameType | None) -> None:
        if self.told_to_end:
            return
        self.told_to_end = True
        seconds = max(0.1, self._grace_seconds - KILL_MARGIN_SECONDS)
        log.warning(
            "%s: ending the trial, at most %.0f s left", signal.Signals(number).name, seconds
        )
        signal.setitimer(signal.ITIMER_REAL, seconds)
        self._signal_group(signal.SIGTERM)

    def _on_deadline(self, _number: int, _frame: FrameType | None) -> None:
        log.warning("the trial did not end in time: killing it")
        self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: signal.Signals) -> None:
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, number)


def run_one(settings: Settings) -> tuple[int, str | None]:
    """Run the slot that the environment names, or the first open one.

    Returns the exit code, and the last line of the log if the trial could not write it itself.
    """
    supervisor = Supervisor(settings.grace_seconds)
    return supervisor.run(_trial_environ()), supervisor.last_words


def run_queue(settings: Settings, wait: Callable[[float], None] | None = None) -> tuple[int, str]:
    """Run all slots one after another, a process for each; return exit code and last line.

    64, 65 and 77 end the queue; 69 goes on with the next slot; 75, a slot that another worker
    holds, puts it to the end of the line; 70, 72 and 74 are tried `TRIES_PER_SLOT` times, with a
    wait in between. The code is 0 if every slot ended well, else the last one that did not.
    """
    supervisor = Supervisor(settings.grace_seconds, of_queue=True)
    wait = wait or supervisor.wait
    line = deque(range(settings.num_trials))
    tries = dict.fromkeys(line, 0)
    failed: dict[int, int] = {}
    held = 0  # slots in a row that another worker was at
    while line:
        slot = line.popleft()
        code = supervisor.run(_trial_environ(slot))
        if supervisor.told_to_end:
            if code not in (ExitCode.OK, ExitCode.OUTAGE) or (line and code == ExitCode.OK):
                code = ExitCode.PREEMPTED
            return code, f"the queue was told to end at slot {slot}; start it again to go on"
        if code in (ExitCode.SETTINGS, ExitCode.DATA, ExitCode.CREDENTIALS):
            return code, f"slot {slot} ended with {code}, which every other slot would, too"
        held = held + 1 if code == ExitCode.PREEMPTED else 0
        if code == ExitCode.PREEMPTED:
            line.append(slot)
            if held >= len(line):  # all that are left: each look at one takes up to a lease's time
                wait(settings.lease_seconds)
        elif code != ExitCode.OK:
            tries[slot] += 1
            if code == ExitCode.SLOT or tries[slot] >= TRIES_PER_SLOT:
                failed[slot] = code
            else:
                line.appendleft(slot)
                wait(BACK_OFF_SECONDS[tries[slot] - 1])
    if failed:
        listing = ", ".join(f"{slot} ({code})" for slot, code in failed.items())
        return list(failed.values())[-1], f"queue: these slots failed: {listing}; see their lines"
    return ExitCode.OK, f"queue: all {settings.num_trials} slots are done"


def _on_one_gpu(environ: Mapping[str, str]) -> dict[str, str]:
    """Show a trial one card only: the others of a bigger node belong to other trials."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "0")
    return {**environ, "CUDA_VISIBLE_DEVICES": visible.split(",")[0]}


def _trial_environ(slot: int | None = None) -> dict[str, str]:
    environ = dict(os.environ)
    # Tokenising in threads is safe here: no process is forked after it.
    environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Read when cuBLAS is first used: its products are then the same, bit by bit, in every process.
    environ.setdefault(CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACE)
    if slot is not None:
        environ["JOB_COMPLETION_INDEX"] = str(slot)
    return environ
