"""`python -m job`: runs one trial; other verbs look at the sweep or run all of it."""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import sys
from collections.abc import Iterator

if __name__ == "__main__":

    def _end_at_once(*_: object) -> None:
        """75 with its last line, wherever an import stands: no lock, no buffer, no log yet."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        verb = sys.argv[1] if sys.argv[1:] else "run"
        is_trial = verb in ("run", "trial", "queue")
        outlook = b" before the trial began" if is_trial else b""
        words = b"exit 75 (preempted): told to end%s\n" % outlook
        with contextlib.suppress(OSError):
            os.write(2, words)
        with contextlib.suppress(OSError):
            os.write(os.open("/dev/termination-log", os.O_WRONLY | os.O_TRUNC), words)
        os._exit(75)  # Python's own end takes milliseconds, in which a second signal would kill it

    # Before the imports, which take half a second: process 1 without a handler hears no SIGTERM.
    signal.signal(signal.SIGTERM, _end_at_once)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a shell's background
        signal.signal(signal.SIGINT, _end_at_once)
    # Whoever starts us with the signal blocked keeps it from getting lost until now.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

from pathlib import Path

from job.cli import VERBS, parse
from job.errors import VOLUME_FULL, ExitCode, JobError, OutageError
from job.log import last_words, log, set_up_logging
from job.process.stop import end_with_parent
from job.verbs import Ending

UNREAD = 128 + signal.SIGPIPE  # 141, which is what a shell calls an end by SIGPIPE


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the verb, turn its end into an exit code and a last line."""
    _open_closed_streams()
    try:
        options = parse(arguments)
    except SystemExit as end:  # argparse's 2 is no code of ours
        return ExitCode.SETTINGS if end.code else ExitCode.OK
    worker = getattr(options, "worker", None)
    set_up_logging(os.environ.get("JOB_LOG_FORMAT", "text"), worker=worker)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or locale without our letters
            stream.reconfigure(errors="backslashreplace")
    if options.with_parent is not None:
        end_with_parent(options.with_parent)
    try:
        with _interrupts_raised(), _volumes_told():
            ending = VERBS[options.verb].run(options)
            if options.verb != "trial":  # whose end does not hang on what a library has printed
                sys.stdout.flush()  # before the last line, which may have to be another one
            return _end(ending)
    except JobError as error:
        return last_words(error.exit_code, str(error))
    except KeyboardInterrupt:
        return last_words(ExitCode.PREEMPTED, "interrupted")
    except (Exception, SystemExit) as error:
        if _has_no_reader(error):
            return UNREAD
        if isinstance(error, SystemExit):
            raise
        log.exception("a bug in the job")
        return last_words(ExitCode.BUG, "a bug in the job, see the traceback")


def _open_closed_streams() -> None:
    """Python has None for a stream that was closed before it started (`job status >&-`)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115


def _has_no_reader(error: BaseException) -> bool:
    """Whether the error is that nobody reads stdout any more, as behind `job status | head -1`."""
    if isinstance(error, SystemExit):  # rich's, made of the error
        return isinstance(error.__context__, BrokenPipeError)
    poll = select.poll()
    poll.register(1, 0)  # a pipe without a reader answers all the same; a socket may have broken
    return isinstance(error, BrokenPipeError) and bool(poll.poll(0))


@contextlib.contextmanager
def _interrupts_raised() -> Iterator[None]:
    """The first Ctrl-C is `KeyboardInterrupt`; a second one, on the way down, ends us at once."""
    before = signal.getsignal(signal.SIGINT)

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        raise KeyboardInterrupt

    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:  # not the verb's own
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _volumes_told() -> Iterator[None]:
    """A full volume, or none to write to, that nobody has named yet is no bug.

    Raises `OutageError`, `SettingsError`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in VOLUME_FULL:
            place = error.filename or "the volume of JOB_WORK_DIR, or stdout's"
            raise OutageError(f"{place}: no space left: free or enlarge it") from error
        if "No usable temporary directory" in str(error):
            raise OutageError(
                "TMPDIR, JOB_WORK_DIR: no folder for temporary files can be written, or their"
                " volumes are full: give JOB_WORK_DIR a folder with room that this user may write"
            ) from error
        raise


def _end(ending: Ending) -> int:
    """The exit code of a verb's end, after its last line."""
    if isinstance(ending, str):
        return last_words(ExitCode.OK, ending)
    code, words = (ExitCode.OK, None) if ending is None else ending
    return int(code) if words is None else last_words(code, words)


def _leave_nothing_to_flush() -> None:
    """Python flushes at its own end, too, and what fails there turns the exit code into 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())  # what is left in its buffer fits there
            os.close(nowhere)


if __name__ == "__main__":
    code = main()
    _leave_nothing_to_flush()
    # All is said: a signal during Python's own end must not change the code.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # Where a Ctrl-C came inside an exec(), by which libraries make classes as they are imported,
    # `python -m` would end by that signal, although it was caught. The next exec() forgets it.
    exec("")  # noqa: S102
    sys.exit(code)
