"""A store on a slow line, and training without torch whose checkpoints are as big as one likes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.errors import PreemptedError
from job.store.base import Stored
from job.store.local import LocalStore
from job.training.state import TrainState, read_state, write_state
from job.trial.attempt import Training
from tests.fake_training import FakeFit

BLOCK = bytes(range(256)) * 4096  # 1 MB
STEP_SECONDS = 0.05
Mark = Callable[[str], None]


class ThrottledStore:
    """A folder behind a line of `bytes_per_second`; a small document takes `document_seconds`."""

    def __init__(
        self, root: Path, bytes_per_second: float, mark: Mark, *, document_seconds: float = 0.05
    ) -> None:
        """`mark` is told "upload" a quarter into a checkpoint's big file, "commit" after that."""
        self._store = LocalStore(root)
        self._rate = bytes_per_second
        self._mark = mark
        self._document_seconds = document_seconds

    @property
    def uri(self) -> str:
        return self._store.uri

    def get(self, key: str) -> Stored | None:
        return self._store.get(key)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if key.endswith("result.json"):
            self._mark("commit")
        time.sleep(self._document_seconds)
        return self._store.put_if_absent(key, data)

    def put_if_version(self, key: str, data: bytes, version: str) -> bool:
        time.sleep(self._document_seconds)
        return self._store.put_if_version(key, data, version)

    def upload(self, key: str, path: Path) -> None:
        size = path.stat().st_size
        time.sleep(size / self._rate / 4)
        if "/checkpoints/" in key and size > len(BLOCK):
            self._mark("upload")
        time.sleep(size / self._rate * 3 / 4)
        self._store.upload(key, path)

    def download(self, key: str, path: Path) -> None:
        self._store.download(key, path)

    def list(self, prefix: str) -> Iterator[str]:
        return self._store.list(prefix)

    def delete(self, key: str) -> None:
        self._store.delete(key)


@dataclass(frozen=True)
class BigTraining:
    """Steps that sleep. The first checkpoint is small, so the line's rate is known early."""

    megabytes: int  # of every checkpoint after the first
    mark: Mark  # hears "data preparation", "model load", "training", "evaluation" as they begin
    load_seconds: float = 0.0  # in one blocking call
    eval_seconds: float = 0.0  # between checkpoint 1 and the next step, in micro-batches
    num_steps: int = 60

    def training(self) -> Training:
        """The `Training` that a trial is given."""
        return Training(self._open_device, self._load_base, self._fit)

    def _open_device(self, *_: Any) -> Any:
        self.mark("data preparation")

    def _load_base(self, *_: Any) -> Any:
        self.mark("model load")
        time.sleep(self.load_seconds)

    def _fit(self, attempt: Any, keeper: Any, work_dir: Path) -> Any:
        state = TrainState() if keeper.resume_dir is None else read_state(keeper.resume_dir)[0]
        history = work_dir / "history.jsonl"
        history.touch()
        first, saved = state.step, state.step
        keeper.report(first_step=first, step=first)

        def checkpoint() -> None:
            nonlocal saved
            if saved == state.step:
                return
            folder = work_dir / f"checkpoint-{state.step}"
            folder.mkdir()
            write_state(folder, state, {})
            shutil.copyfile(history, folder / "history.jsonl")
            blocks = self.megabytes if saved > first else 1
            with (folder / "adapter.safetensors").open("wb") as file:
                for _ in range(blocks):
                    file.write(BLOCK)
            keeper.put_checkpoint(folder, state.step, None)
            saved = state.step

        marked = False
        try:
            while state.step < self.num_steps:
                attempt.should_stop()
                time.sleep(STEP_SECONDS)
                state.step += 1
                state.clock_seconds += STEP_SECONDS
                keeper.report(step=state.step)
                if keeper.is_due():
                    checkpoint()
                if attempt.lease.record.checkpoints and not marked and state.step > saved:
                    marked = True
                    self.mark("training")
                    self._evaluate(attempt)
        except PreemptedError:
            checkpoint()
            raise
        return FakeFit(state, history)

    def _evaluate(self, attempt: Any) -> None:
        if self.eval_seconds:
            self.mark("evaluation")
        ends = time.monotonic() + self.eval_seconds
        while time.monotonic() < ends:
            attempt.should_stop()
            time.sleep(0.2)
