"""Exact resume: an interrupted trial equals an uninterrupted one.

`pytest tests/training/test_resume.py`
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from job.data.samples import Tables
from job.errors import PreemptedError
from job.ledger.folders import PublishedFolder, seal_folder
from job.ledger.records import RowLosses
from job.training.memory import MemoryPlan
from job.training.state import SCHEMA, TrainState, read_state, unreadable, write_state
from tests.tiny_model import make_base, make_recipe, make_table

slow = pytest.mark.slow


class KilledError(Exception):
    """A SIGKILL: nothing is saved on the way down."""


class Disk:
    """A `Keeper` that outlives attempts: the newest checkpoint and every best adapter by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.resume_dir: Path | None = None
        self.steps_kept: list[int] = []
        self.due = False
        self.dying = False

    def is_due(self) -> bool:
        return self.due

    def put_best(self, folder: Path) -> PublishedFolder:
        sealed = seal_folder("adapter", folder)
        shutil.copytree(folder, self._folder / sealed.key, dirs_exist_ok=True)
        return sealed

    def put_checkpoint(self, folder: Path, step: int, best: str | None) -> None:
        if self.dying:
            raise KilledError
        assert best is None or (self._folder / best).is_dir()
        self.resume_dir = shutil.copytree(folder, self._folder / f"{len(self.steps_kept)}-{step}")
        self.steps_kept.append(step)

    def report(self, **progress: Any) -> None:
        pass


class StopAt:
    """Raises at the n-th question, as a SIGTERM that falls between two micro-batches."""

    def __init__(self, question: int | None) -> None:
        self.asked = 0
        self._question = question

    def __call__(self) -> None:
        self.asked += 1
        if self.asked == self._question:
            raise PreemptedError("told to end")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def _attempt(
    base: Path, disk: Disk, work_dir: Path, stop: StopAt, *, quantization: str = "nf4"
) -> Any:
    import torch

    from job.training.fit import FitInputs, fit
    from job.training.loop import Ending
    from job.training.model import load_base

    work_dir.mkdir(parents=True)
    inputs = FitInputs(
        base=load_base(str(base), None, torch.device("cpu"), quantization=quantization),
        # 20 steps of 4 samples: three ends of an epoch.
        tables=Tables(make_table(22, seed=1), make_table(12, seed=2)),
        memory=MemoryPlan(50),
        ending=Ending(should_stop=stop),
        max_adapter_bytes=10**9,
    )
    recipe = make_recipe(lora_dropout=0.1, learning_rate=0.03)
    return fit(
        recipe,
        inputs,
        device=torch.device("cpu"),
        work_dir=work_dir,
        keeper=disk,
    )


def _outcome(fitted: Any) -> tuple[Any, ...]:
    state = fitted.state
    lines = [json.loads(line) for line in fitted.history_path.read_text().splitlines()]
    history = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    rows = RowLosses.model_validate_json(fitted.rows_path.read_text())
    assert (rows.step, rows.loss) == (state.best_step, pytest.approx(state.best_loss, rel=1e-12))
    return fitted.status, state.step, state.curve, state.best, state.best_step, history, rows


@pytest.fixture(scope="module")
def uninterrupted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    folder = tmp_path_factory.mktemp("calm")
    return _outcome(_attempt(base, Disk(folder), folder / "work", StopAt(None)))


@slow
@pytest.mark.parametrize(
    "questions",
    [[3], [40], [9, 9, 9, 9], [55, 1, 2, 3, 20], [104], [30, 30, 30]],
    ids=["evaluation at step 0", "a step", "four times", "before anything was done", "late",
         "three times"],
)  # fmt: skip
def test_a_stopped_trial_ends_as_the_uninterrupted_one_byte_for_byte(
    base: Path, tmp_path: Path, uninterrupted: tuple[Any, ...], questions: list[int]
) -> None:
    disk = Disk(tmp_path)
    for number, question in enumerate(questions):
        with pytest.raises(PreemptedError):
            _attempt(base, disk, tmp_path / f"work-{number}", StopAt(question))
    fitted = _attempt(base, disk, tmp_path / "last", StopAt(None))
    assert _outcome(fitted) == uninterrupted


@slow
@pytest.mark.parametrize("quantization", ["none", "mixed:v_proj,down_proj"])
def test_a_base_with_16_bit_weights_is_resumed_byte_for_byte_as_well(
    base: Path, tmp_path: Path, uninterrupted: tuple[Any, ...], quantization: str
) -> None:
    calm = _attempt(
        base, Disk(tmp_path / "calm"), tmp_path / "calm-work", StopAt(None),
        quantization=quantization,
    )  # fmt: skip
    disk = Disk(tmp_path / "disk")
    for number, question in enumerate((3, 40)):
        with pytest.raises(PreemptedError):
            _attempt(
                base, disk, tmp_path / f"work-{number}", StopAt(question), quantization=quantization
            )
    fitted = _attempt(base, disk, tmp_path / "last", StopAt(None), quantization=quantization)
    assert _outcome(fitted) == _outcome(calm)
    assert _outcome(fitted)[2] != uninterrupted[2], "another precision, other losses"


@slow
def test_a_stop_costs_at_most_the_step_it_falls_into(base: Path, tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    with pytest.raises(PreemptedError):
        _attempt(base, disk, tmp_path / "work", StopAt(45))
    lines = (tmp_path / "work/history.jsonl").read_text().splitlines()
    done = [json.loads(line)["step"] for line in lines if "train/loss" in line]
    assert disk.steps_kept == [done[-1]]


@slow
def test_a_killed_trial_goes_on_from_its_last_checkpoint_to_the_same_end(
    base: Path, tmp_path: Path, uninterrupted: tuple[Any, ...]
) -> None:
    disk = Disk(tmp_path)

    class Kill(StopAt):
        def __call__(self) -> None:
            disk.due = self.asked % 16 < 4  # checkpoints at odd places
            disk.dying = self.asked + 1 == self._question
            super().__call__()

    for number, question in enumerate((50, 35)):
        # Preempted: a checkpoint of this very step was just kept, nothing is left to save.
        with pytest.raises((KilledError, PreemptedError)):
            _attempt(base, disk, tmp_path / f"work-{number}", Kill(question))
    disk.due = disk.dying = False
    assert len(disk.steps_kept) >= 2
    fitted = _attempt(base, disk, tmp_path / "last", StopAt(None))
    assert _outcome(fitted) == uninterrupted


@slow
def test_a_checkpoint_of_a_version_that_kept_no_rows_gives_none_until_the_next_best(
    base: Path, tmp_path: Path, uninterrupted: tuple[Any, ...]
) -> None:
    disk = Disk(tmp_path)
    with pytest.raises(PreemptedError):
        _attempt(base, disk, tmp_path / "work", StopAt(55))
    assert disk.resume_dir is not None
    (disk.resume_dir / "rows.json").unlink()
    fitted = _attempt(base, disk, tmp_path / "last", StopAt(1000))
    assert _outcome(fitted) == uninterrupted, "a later step was the best"


@slow
def test_the_comparison_would_see_a_lost_moment(
    base: Path, tmp_path: Path, uninterrupted: tuple[Any, ...]
) -> None:
    """Guards the tests above: a resume without the optimizer's moments must not look equal."""
    from safetensors.torch import save_file

    disk = Disk(tmp_path)
    with pytest.raises(PreemptedError):
        _attempt(base, disk, tmp_path / "work", StopAt(40))
    assert disk.resume_dir is not None
    save_file({}, disk.resume_dir / "optimizer.safetensors")
    fitted = _attempt(base, disk, tmp_path / "last", StopAt(None))
    assert _outcome(fitted)[2] != uninterrupted[2]


def test_a_state_survives_json(tmp_path: Path) -> None:
    fresh = TrainState()
    later = TrainState(step=7, best_step=5, best_loss=1.25, best={"key": "a"}, tokens=9,
                       curve=[(0, 2.0), (5, 1.25)], clock_seconds=3.5,
                       untuned_16bit=1.9)  # fmt: skip
    for state in (fresh, later):
        write_state(tmp_path, state, {"scaler": {}})
        assert read_state(tmp_path) == (state, {"scaler": {}})
        assert unreadable(tmp_path) is None
    path = tmp_path / "state.json"
    content = json.loads(path.read_text())
    assert set(content["state"]) == set(vars(fresh)) - {"untuned_16bit"}, "what older code reads"
    del content["untuned_16bit"]
    path.write_text(json.dumps(content))
    assert read_state(tmp_path)[0].untuned_16bit is None, "written by older code"


def test_a_checkpoint_of_another_schema_says_what_to_do(tmp_path: Path) -> None:
    write_state(tmp_path, TrainState(), {})
    path = tmp_path / "state.json"
    path.write_text(path.read_text().replace(f'"schema": {SCHEMA}', f'"schema": {SCHEMA + 1}'))
    reason = unreadable(tmp_path)
    assert reason is not None
    assert f"has checkpoint schema {SCHEMA + 1}" in reason
