"""Processes that run one attempt at a W&B trial: real client, real job, training faked.

They are forked from a server process that has imported everything and runs no thread.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from job.errors import JobError
from job.log import log, set_up_logging
from job.process.stop import Stop
from job.process.watchdog import Watchdog
from job.settings import Settings
from job.store.local import LocalStore
from job.trial.run import run_trial_on
from tests.fake_training import FAKE_TRAINING
from tests.servers.wandb import API_KEY, WandbServer
from tests.workers import make_inputs

SWEEP = {
    "method": "bayes",
    "metric": {"name": "eval/loss", "goal": "minimize"},
    "parameters": {
        "learning_rate": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        "lora_dropout": {"values": [0.05, 0.1]},
    },
}
PRELOADED = ["tests.wandb.workers", "tests.wandb.preload"]
HEARTBEAT_SECONDS = 0.5  # of wandb's agent, which has this knob for tests; 5 otherwise
LONG = 4000  # steps that take longer than any test waits


@dataclass
class Attempt:
    """A started attempt."""

    process: BaseProcess
    log_path: Path

    def wait(self, seconds: float = 60) -> int:
        """Wait for the exit code, or minus the signal; an attempt that hangs fails the test."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"the attempt did not end in {seconds} s:\n{self.log}")
        return self.process.exitcode

    def send(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL as a container gets it: the client's own process dies, too.

        Left alone, it tells W&B what it still holds some seconds later, when the next attempt may
        have ended the run.
        """
        assert self.process.pid is not None
        for pid in [self.process.pid, *_descendants(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @property
    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    @property
    def last_words(self) -> str:
        """The text after `exit <code>:` in the log."""
        return self.log.rpartition(" exit ")[2]


def _descendants(pid: int) -> list[int]:
    """All processes below the given one."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [child, *_descendants(child)]
    return found


class Workers:
    """Starts attempts on one server, each case in a folder of its own."""

    def __init__(self, server: WandbServer, folder: Path) -> None:
        self.server = server
        self._inputs = make_inputs(folder)
        self._folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._started = 0

    def start(
        self,
        case: str,
        *,
        sweep: str | None = None,
        environ: dict[str, str] | None = None,
        **settings: Any,
    ) -> Attempt:
        """An attempt at the case's sweep; the built-in engine draws unless `sweep` is given."""
        given = {
            **self._inputs,
            "output_uri": str(self.out(case)),
            "work_dir": str(self._folder / case / "work"),
            "outage_minutes": 0.02,
            "lease_seconds": 1,
            **settings,
        }
        variables = {
            "WANDB_BASE_URL": self.server.url,
            "WANDB_API_KEY": API_KEY,
            "WANDB_PROJECT": "qlora",
            "WANDB_INIT_TIMEOUT": "4",
            "WANDB_FINISH_TIMEOUT": "4",
            "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1",
            **(environ or {}),
        }
        if sweep is not None:
            variables["WANDB_SWEEP_ID"] = sweep
            del given["sweep_file"]
        self._started += 1
        log_path = self._folder / case / f"{self._started}.log"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        process = self._context.Process(target=_attempt, args=(variables, given, str(log_path)))
        process.start()
        return Attempt(process, log_path)

    def out(self, case: str) -> Path:
        return self._folder / case / "out"

    def document(self, case: str, name: str) -> dict[str, Any] | None:
        """`slots/0000/result.json`, say, of the case's only sweep."""
        paths = list(self.out(case).glob(f"sweeps/*/{name}"))
        content: dict[str, Any] | None = json.loads(paths[0].read_text()) if paths else None
        return content


def _attempt(variables: dict[str, str], given: dict[str, Any], log_path: str) -> None:
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        del os.environ[name]
    os.environ.update(variables)
    descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    set_up_logging("text")
    os.chdir(variables.get("CHANGE_FOLDER", "."))
    code, line = 0, ""
    try:
        settings = Settings(**given)
        stop = Stop(settings.grace_seconds)
        signal.signal(signal.SIGTERM, stop.set)
        if "FORBID_WANDB" in variables:
            for name in [n for n in sys.modules if n.split(".")[0] == "wandb"]:
                del sys.modules[name]
            sys.modules["wandb"] = None  # type: ignore[assignment]
        else:
            _quicken()
        store = _store(given["output_uri"], variables)
        watchdog = Watchdog(stop, sys.exit)  # never started
        line = run_trial_on(store, settings, stop, FAKE_TRAINING, watchdog)
    except JobError as error:
        code, line = int(error.exit_code), str(error)
    log.info("exit %d: %s", code, line)
    sys.stderr.flush()
    os._exit(code)


class HeldStore(LocalStore):
    """Holds back the first write of a key with `part` in it, until a file says go."""

    def __init__(self, folder: Path, part: str, go: Path) -> None:
        super().__init__(folder)
        self._part, self._go = part, go

    def upload(self, key: str, path: Path) -> None:
        self._hold(key)
        super().upload(key, path)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._hold(key)
        return super().put_if_absent(key, data)

    def _hold(self, key: str) -> None:
        if self._part in key:
            log.info("held: %s", key)
            eventually(self._go.exists, 60)


def _store(uri: str, variables: dict[str, str]) -> LocalStore:
    if "HOLD" not in variables:
        return LocalStore(Path(uri))
    return HeldStore(Path(uri), variables["HOLD"], Path(uri) / "go")


def _quicken() -> None:
    from wandb.agents.pyagent import Agent

    Agent.HEARTBEAT_SLEEP_SECONDS = HEARTBEAT_SECONDS


def eventually(happened: Callable[[], bool], seconds: float = 30) -> None:
    """Return once the condition is true, which is looked at every 20 ms."""

    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"did not happen in {seconds} s"
        time.sleep(0.02)
