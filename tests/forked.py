"""`python -m MODULE` and `python -c CODE` by a fork of this process, which has imported it all.

A start of Python with torch, transformers and peft takes 5 s of one core, one without them half a
second; a fork takes 30 ms. What it runs is a process of its own all the same: pid, group, signals,
pipes, exit code, environment and working folder are what `subprocess` gives any other, and the
trial that process 1 starts is a fork as well. What a fork cannot show has tests with a new Python:
the import itself (a signal meanwhile, what may not be imported, values that libraries refuse at
import), hash seeds, settings that other libraries than the hub's read at import, and libraries that
keep threads of their own, as apprise does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import io
import os
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

READ_AT_IMPORT = ("huggingface_hub.constants", "datasets.config")
QUIET = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


def with_torch() -> None:
    """Import here what a trial needs, once, so that no fork has to."""
    for name in ("job.child", "job.training.fit", "job.training.device", "job.training.model"):
        importlib.import_module(name)


def popen(
    command: Sequence[object],
    *,
    env: Mapping[str, str],
    pass_fds: Sequence[int] = (),
    **given: Any,
) -> subprocess.Popen[Any]:
    """`subprocess.Popen` of `[sys.executable, "-m" or "-c", ...]` as a fork, of others as it is."""
    return subprocess.Popen(**_arguments(command, env, pass_fds), **given)


def run(
    command: Sequence[object], *, env: Mapping[str, str], **given: Any
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of what `popen` takes; text is captured."""
    return _run(command, env=env, capture_output=True, text=True, check=False, **given)


def _run(
    command: Sequence[object], *, env: Mapping[str, str], check: bool, **given: Any
) -> subprocess.CompletedProcess[Any]:
    return subprocess.run(**_arguments(command, env, ()), check=check, **given)


def _arguments(
    command: Sequence[object], env: Mapping[str, str], pass_fds: Sequence[int]
) -> dict[str, Any]:
    words = [str(word) for word in command]
    arguments: dict[str, Any] = {"args": words, "env": env, "pass_fds": pass_fds}
    if words[0] == sys.executable:
        assert words[1] in ("-m", "-c"), words
        # What is called between fork and exec; here there is no exec.
        arguments["preexec_fn"] = partial(_be, words[1:], dict(env), tuple(pass_fds))
    return arguments


def _be(words: list[str], environ: dict[str, str], pass_fds: tuple[int, ...]) -> NoReturn:
    """In the fork: forget the tests' process, run what the command names, end with its code."""
    code: Any = 1
    try:
        _leave_behind(pass_fds)
        os.environ.clear()
        os.environ.update(environ)
        # Its threads do not survive a fork, and waiting for them would never end.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        _read_variables_again()
        sys.argv = words[1:]
        for name in ("job.supervisor", "job.demo.run"):  # what starts trials and verbs
            forking = SimpleNamespace(Popen=popen, run=_run, DEVNULL=subprocess.DEVNULL)
            vars(importlib.import_module(name))["subprocess"] = forking
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            exec(words[1], {"__name__": "__main__"})  # noqa: S102
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _read_variables_again() -> None:
    """The hub's clients read theirs at import: the tests' own, where they are imported already."""
    modules = {name: sys.modules.get(name) for name in READ_AT_IMPORT}
    for module in modules.values():
        if module is not None:
            importlib.reload(module)
    if (hub := sys.modules.get("huggingface_hub.hf_api")) is not None:
        hub.api.endpoint = hub.constants.ENDPOINT
        hub.api.token = None
        importlib.import_module("huggingface_hub").close_session()


def _leave_behind(pass_fds: tuple[int, ...]) -> None:
    """Let go of the tests' files, signals, warnings and garbage."""
    gc.freeze()
    faulthandler.disable()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # `subprocess` lets them kill what it starts
        signal.signal(number, signal.SIG_IGN)
    # Not closed: an object left over from the tests could later close what got its number.
    nothing = os.open(os.devnull, os.O_RDWR)
    for path in Path("/proc/self/fd").iterdir():
        if int(path.name) > 2 and int(path.name) not in pass_fds:
            with contextlib.suppress(OSError):
                os.dup2(nothing, int(path.name), inheritable=False)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), encoding="utf-8")  # noqa: SIM115
    sys.stderr = io.TextIOWrapper(
        open(2, "wb", 0, closefd=False), encoding="utf-8", errors="backslashreplace",  # noqa: SIM115
        write_through=True,
    )  # fmt: skip
    warnings.resetwarnings()
    for category in QUIET:
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)  # of runpy
