"""The W&B client as far as the mirror calls it: runs are kept in memory.

As the real one does, `init` gives back the run that is still open in this process, whatever id it
was asked for, and a run takes rows of rising steps only.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class FakeRun:
    """A run, with all that the server would know of it."""

    def __init__(self, wandb: FakeWandb, run_id: str) -> None:
        self._wandb = wandb
        self.id, self.entity, self.project = run_id, "team", "qlora"
        self.url = f"http://wandb/{run_id}"
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.steps: list[int] = []
        self.state = "running"

    @property
    def starting_step(self) -> int:
        return self.steps[-1] + 1 if self.steps else 0

    @property
    def history_line_count(self) -> int:
        return len(self.steps)

    @property
    def summary_metrics(self) -> dict[str, Any]:
        return self.summary

    def log(self, row: dict[str, float], *, step: int, commit: bool) -> None:
        assert step >= self.starting_step, "W&B drops such a row"
        self.steps.append(step)

    def finish(self, exit_code: int) -> None:
        self._wandb.on_finish(self)
        self.state = "failed" if exit_code else "finished"
        self._wandb.open_run = None


class FakeWandb:
    """Stands for the module `wandb`."""

    Settings = SimpleNamespace

    def __init__(self, base_url: str) -> None:
        self._base_url = base_url  # what the mirror asks whether W&B answers
        self.runs: dict[str, FakeRun] = {}
        self.open_run: FakeRun | None = None
        self.on_init: Callable[[str], None] = lambda run_id: None  # may raise
        self.on_finish: Callable[[FakeRun], None] = lambda run: None

    def init(self, *, id: str, **_: Any) -> FakeRun:  # noqa: A002
        self.on_init(id)
        if self.open_run is None:
            self.open_run = self.runs.setdefault(id, FakeRun(self, id))
        return self.open_run

    def setup(self) -> SimpleNamespace:
        return SimpleNamespace(settings=SimpleNamespace(base_url=self._base_url))

    def teardown(self) -> None:
        self.open_run = None

    def Api(self, timeout: int) -> FakeWandb:  # noqa: N802
        return self

    def run(self, path: str) -> FakeRun:
        return self.runs[path.rpartition("/")[2]]
