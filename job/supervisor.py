"""Process 1: a small parent that runs trials as children, and passes signals and codes on.

The parent imports no torch and waits for nothing but its children, so it answers a signal at once.
A child cannot: while it is in a C call, Python runs no signal handler (4 s were measured).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType

from job.errors import ExitCode, SettingsError
from job.log import log
from job.process.gpu import CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACE, visible_gpus
from job.process.heartbeat import HeartbeatLimits, HeartbeatMonitor
from job.process.oom import oom_kills, oom_words
from job.process.stop import POLL_SECONDS, sleep_until
from job.settings import Settings

KILL_MARGIN_SECONDS = 3.0  # left of the grace time for the kill and our own exit
TRIES_PER_SLOT = 3  # how often `queue` tries a slot that fails
BACK_OFF_SECONDS = (5.0, 30.0)  # between those tries
TRIAL_COMMAND = (sys.executable, "-m", "job", "trial")
FATAL = (ExitCode.SETTINGS, ExitCode.DATA, ExitCode.CREDENTIALS)  # every other slot's end, too


@dataclass(frozen=True)
class Ended:
    """The end of a trial's process."""

    pid: int
    code: int  # the exit code to pass on
    last_words: str | None = None  # why it ended, where it could not say that itself


@dataclass(frozen=True)
class _Child:
    process: subprocess.Popen[bytes]
    monitor: HeartbeatMonitor
    oom_kills_before: int


class Supervisor:
    """Runs trials as child processes; at SIGTERM or SIGINT it ends all of them within the grace.

    `grace_seconds` is the time from signal to exit, `limits` says how long a trial may be silent.
    """

    def __init__(self, grace_seconds: float, limits: HeartbeatLimits | None = None) -> None:
        self._heartbeat_limits = limits
        self.told_to_end = False  # whether SIGTERM or SIGINT came
        self._grace_seconds = grace_seconds
        self._children: dict[int, _Child] = {}
        self._oom_kills_told = 0  # of those that the kernel counts, how many ends were told by
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_end)
        signal.signal(signal.SIGALRM, self._on_deadline)

    def run(self, environ: Mapping[str, str]) -> Ended:
        """Run one trial to its end."""
        if self.told_to_end:
            return Ended(0, ExitCode.PREEMPTED, "told to end before the trial began")
        self.start(environ)
        ended = self.next_end()
        assert ended is not None
        return ended

    def start(self, environ: Mapping[str, str], *options: str) -> int:
        """Start a trial in a process group of its own, with these `options`; return its pid."""
        monitor, kills_before = HeartbeatMonitor(self._heartbeat_limits), oom_kills()
        command = [*TRIAL_COMMAND, "--heartbeat-fd", str(monitor.write_end), *options]
        process = subprocess.Popen(
            command, env=environ, process_group=0, pass_fds=(monitor.write_end,)
        )
        self._children[process.pid] = _Child(process, monitor, kills_before)
        monitor.listen(process.pid)
        if self.told_to_end:  # the signal came between two children
            self._signal_groups(signal.SIGTERM)
        return process.pid

    def next_end(self, seconds: float | None = None) -> Ended | None:
        """Wait until a trial has ended; None if none has within `seconds`.

        Reaps others on the way, as process 1 inherits all orphans.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(-1, 0 if deadline is None else os.WNOHANG)
            if (child := self._children.pop(pid, None)) is not None:
                return self._ended(child, os.waitstatus_to_exitcode(status))
            if pid == 0 and deadline is not None:
                if (left := deadline - time.monotonic()) <= 0:
                    return None
                time.sleep(min(left, POLL_SECONDS))

    def wait(self, seconds: float) -> None:
        """Sleep until `seconds` are over or we are told to end."""
        sleep_until(lambda: self.told_to_end, seconds)

    def _ended(self, child: _Child, status: int) -> Ended:
        child.monitor.close()
        child.process.returncode = status  # it was waited for here
        _signal_group(child.process.pid, signal.SIGKILL)  # whatever it may have left running
        if not self._children:
            signal.setitimer(signal.ITIMER_REAL, 0)
        # Of two workers that are killed at once, each has a kill of its own.
        kills_before = max(child.oom_kills_before, self._oom_kills_told)
        starved = status == -signal.SIGKILL and oom_kills() > kills_before
        if starved:  # another's end says nothing of a kill that was counted before it began
            self._oom_kills_told = kills_before + 1
        code, words = self._exit_code(status, hung=child.monitor.found_silent, starved=starved)
        return Ended(child.process.pid, code, words)

    def _exit_code(self, code: int, *, hung: bool, starved: bool) -> tuple[int, str | None]:
        """The exit code to pass on for a trial's own, and its last words if it has none."""
        if self.told_to_end and code not in (ExitCode.OK, ExitCode.OUTAGE):
            is_said = code == ExitCode.PREEMPTED  # else killed, or it spoke of another code
            words = "told to end; the next attempt goes on from the last checkpoint"
            return ExitCode.PREEMPTED, None if is_said else words
        if hung:
            words = "hang: the trial ran no Python any more and was killed, see above"
            return ExitCode.OUTAGE, words
        if starved:
            return ExitCode.OUTAGE, oom_words()
        if code < 0:
            log.error("the trial was killed by %s", signal.Signals(-code).name)
        if code not in list(ExitCode):
            return ExitCode.BUG, "the trial ended by a bug or was killed, see above"
        return code, None

    def _on_end(self, number: int, _frame: FrameType | None) -> None:
        if self.told_to_end:
            return
        self.told_to_end = True
        seconds = max(0.1, self._grace_seconds - KILL_MARGIN_SECONDS)
        log.warning(
            "%s: ending the trial%s, at most %.0f s left",
            signal.Signals(number).name, "s" if len(self._children) > 1 else "", seconds,
        )  # fmt: skip
        signal.setitimer(signal.ITIMER_REAL, seconds)
        self._signal_groups(signal.SIGTERM)

    def _on_deadline(self, _number: int, _frame: FrameType | None) -> None:
        log.warning("the trial did not end in time: killing it")
        self._signal_groups(signal.SIGKILL)

    def _signal_groups(self, number: signal.Signals) -> None:
        for pid in list(self._children):
            _signal_group(pid, number)


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def run_one(settings: Settings) -> tuple[int, str | None]:
    """Run the slot that the environment names, or the first open one.

    Returns the exit code, and the last line of the log if the trial could not write it itself.
    """
    if settings.workers != "1":
        log.warning("JOB_WORKERS is for `job queue`: a single trial trains on one GPU")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    ended = Supervisor(settings.grace_seconds).run(_trial_environ(visible.split(",")[0]))
    return ended.code, ended.last_words


def run_queue(settings: Settings, wait: Callable[[float], None] | None = None) -> tuple[int, str]:
    """Run all slots, `JOB_WORKERS` at once, a process for each; return exit code and last line.

    Raises `SettingsError` for more workers than there are GPUs, `GpuError` if none can be asked.
    """
    workers = _workers(settings)
    if len(workers) > 1:
        log.info("queue: %d workers, one trial at a time each", len(workers))
    supervisor = Supervisor(settings.grace_seconds)
    queue = _Queue(settings, supervisor, workers, deque(range(settings.num_trials)))
    return queue.run(wait or supervisor.wait)


@dataclass
class _Worker:
    """One that goes from slot to slot on a card of its own."""

    number: int | None  # from 1; None: it is the only one
    card: str  # the CUDA_VISIBLE_DEVICES of its trials
    slot: int | None = None  # the one that it is at
    pid: int | None = None  # of that slot's trial, while it runs
    rest_seconds: float = 0.0  # before its next trial
    gpu_faults: int = 0  # in a row


def _workers(settings: Settings) -> list[_Worker]:
    """The workers that `JOB_WORKERS` asks for, each with a card."""
    asked, visible = settings.workers, os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked == "1" or settings.device == "cpu":
        card = "0" if visible is None else visible.split(",")[0]
        cards = [card] * (1 if asked == "auto" else int(asked))
    else:
        cards = visible_gpus(visible)
        if asked != "auto" and int(asked) > len(cards):
            raise SettingsError(
                f"JOB_WORKERS: is {asked}, and {len(cards)} GPUs are visible; each worker needs one"
                " of its own: lower it, or set it to auto"
            )
        cards = cards if asked == "auto" else cards[: int(asked)]
    if len(cards) == 1:
        return [_Worker(None, cards[0])]
    return [_Worker(number, card) for number, card in enumerate(cards, 1)]


@dataclass
class _Queue:
    """All slots of a sweep in a line, and the workers that take them from it.

    64, 65 and 77 end the queue once the trials that run have ended; 69 goes on with the next slot;
    75, a slot that another worker holds, puts it to the end of the line; 70, 72 and 74 are tried
    `TRIES_PER_SLOT` times, with a wait in between. 72 is the card's fault: while there are other
    workers the slot goes back to the line, and a worker that met it so often in a row leaves. The
    only one that is left gives up a slot for it, and the queue where the next slot meets it, too.
    """

    settings: Settings
    supervisor: Supervisor
    workers: list[_Worker]
    line: deque[int]
    tries: Counter[int] = field(default_factory=Counter)
    failed: dict[int, int] = field(default_factory=dict)  # slot: its code
    held: int = 0  # slots in a row that another worker was at
    fatal: tuple[int, int] | None = None  # slot and code: one of FATAL, or 72 of the only card
    was_volume_full: bool = False  # said by a trial (74) that was told to end

    def run(self, wait: Callable[[float], None]) -> tuple[int, str]:
        """Run until no slot is left or the queue has to end; return exit code and last line."""
        while True:
            if not self._is_over():
                self._send_workers()
            if any(worker.pid is not None for worker in self.workers):
                self._await_end()
            elif self._is_over() or not self._unfinished():
                return self._ending()
            else:  # whoever could go on rests
                seconds = min(w.rest_seconds for w in self.workers if w.rest_seconds)
                wait(seconds)
                self._has_rested(seconds)

    def _is_over(self) -> bool:
        return self.supervisor.told_to_end or self.fatal is not None

    def _unfinished(self) -> list[int]:
        at_work = [worker.slot for worker in self.workers if worker.slot is not None]
        return [*at_work, *self.line]

    def _send_workers(self) -> None:
        """Start a trial for every worker that is free, as long as there are slots."""
        for worker in self.workers:
            if worker.pid is not None or worker.rest_seconds:
                continue
            if worker.slot is None and self.line:
                worker.slot = self.line.popleft()
            if worker.slot is not None:
                environ = _trial_environ(worker.card, num_workers=len(self.workers))
                environ["JOB_COMPLETION_INDEX"] = str(worker.slot)
                mark = () if worker.number is None else ("--worker", str(worker.number))
                worker.pid = self.supervisor.start(environ, "--of-queue", *mark)

    def _await_end(self) -> None:
        """Wait until a trial has ended, or until a worker that rests can go on."""
        rests = [w.rest_seconds for w in self.workers if w.rest_seconds and not self._is_over()]
        started = time.monotonic()
        ended = self.supervisor.next_end(min(rests, default=None))
        self._has_rested(time.monotonic() - started)
        if ended is not None:
            worker = next(worker for worker in self.workers if worker.pid == ended.pid)
            worker.pid = None
            if ended.last_words is not None:
                log.error("slot %s: %s", worker.slot, ended.last_words)
            self._note(worker, ended.code)

    def _has_rested(self, seconds: float) -> None:
        for worker in self.workers:
            worker.rest_seconds = max(0.0, worker.rest_seconds - seconds)

    def _note(self, worker: _Worker, code: int) -> None:
        """Decide what becomes of the slot that the worker was at, and of the worker."""
        slot = worker.slot
        assert slot is not None
        if code == ExitCode.OK:
            worker.slot, worker.gpu_faults, self.held = None, 0, 0
        elif self.supervisor.told_to_end:  # the slot stays with it, unfinished
            self.was_volume_full |= code == ExitCode.OUTAGE
        elif code in FATAL:
            self.fatal = self.fatal or (slot, code)
        elif code == ExitCode.PREEMPTED:
            worker.slot = None
            self.line.append(slot)
            self.held += 1
            if self.held >= len(self.line):  # all that are left: a look takes up to a lease's time
                worker.rest_seconds = self.settings.lease_seconds
        else:
            self.held = 0
            self._note_failure(worker, slot, code)

    def _note_failure(self, worker: _Worker, slot: int, code: int) -> None:
        worker.gpu_faults = worker.gpu_faults + 1 if code == ExitCode.GPU else 0
        if worker.gpu_faults and len(self.workers) > 1:  # or a broken card would eat up the line
            worker.slot, worker.rest_seconds = None, BACK_OFF_SECONDS[0]
            self.line.appendleft(slot)
            if worker.gpu_faults >= TRIES_PER_SLOT:
                self.workers.remove(worker)
                log.error(
                    "worker %d: its GPU failed %d times in a row; the others go on without it",
                    worker.number, TRIES_PER_SLOT,
                )  # fmt: skip
            return
        if worker.gpu_faults > TRIES_PER_SLOT and ExitCode.GPU in self.failed.values():
            self.fatal = (slot, code)  # else 12 slots take seven minutes to fail alike
            return
        self.tries[slot] += 1
        if code == ExitCode.SLOT or self.tries[slot] >= TRIES_PER_SLOT:
            self.failed[slot], worker.slot = code, None
        else:
            worker.rest_seconds = BACK_OFF_SECONDS[self.tries[slot] - 1]

    def _ending(self) -> tuple[int, str]:
        """The exit code and the last line; of the slots that failed, the last one's code."""
        num_slots = self.settings.num_trials
        if self.supervisor.told_to_end and (left := len(self._unfinished()) + len(self.failed)):
            words = (
                f"the queue was told to end, {left} of {num_slots} slots are left; start it again"
            )
            told = ExitCode.OUTAGE if self.was_volume_full else ExitCode.PREEMPTED
            return told, f"{words} to go on"
        if self.fatal is not None:
            slot, code = self.fatal
            return code, f"slot {slot} ended with {code}, which every other slot would, too"
        if self.failed:
            listing = ", ".join(f"{slot} ({code})" for slot, code in self.failed.items())
            last = list(self.failed.values())[-1]
            return last, f"queue: these slots failed: {listing}; see their lines"
        # Only the trials know why they ended with 0: a budget that is spent is told so, too.
        return ExitCode.OK, (
            f"queue: each of the {num_slots} slots is committed, or its own line says why not; see"
            " job status"
        )


def _trial_environ(card: str, *, num_workers: int = 1) -> dict[str, str]:
    """The environment of a trial, which sees one card only: the others are other trials'."""
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": card}
    # Tokenising in threads is safe here: no process is forked after it.
    environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # NVML's order, in which cards are counted and looked at; CUDA's own is by speed.
    environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    # Read when cuBLAS is first used: its products are then the same, bit by bit, in every process.
    environ.setdefault(CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACE)
    if num_workers > 1:  # with more threads than cores a step takes up to ten times longer
        num_threads = max(1, len(os.sched_getaffinity(0)) // num_workers)
        environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    return environ
