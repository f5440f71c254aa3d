"""One key of one document removed, null or spoiled: that slot is damaged, and nobody else's.

The sweep is made by the real path with fake training.
`pytest tests/ledger/test_spoiled_documents.py`
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job.cli import parse
from job.errors import ExitCode, JobError, PreemptedError
from job.ledger.garbage import collect
from job.ledger.lease import acquire
from job.ledger.ledger import Ledger
from job.ledger.redo import redo
from job.process.stop import Stop
from job.process.watchdog import Watchdog
from job.report.commands import show_best, show_status, write_report
from job.settings import Settings
from job.store.local import LocalStore
from job.trial.run import run_trial_on
from tests.fake_training import FAKE_TRAINING
from tests.ledger.documents import make_spec
from tests.workers import make_inputs

OTHER = 2  # the slot whose trial has to be committed, whatever is spoiled
WRONG_TEXT = "../x"  # no key of the store, no time, no number and no state
# What is put in a key's place beside null, by the kind of what stood there: by turns.
WRONG = {
    str: (WRONG_TEXT, WRONG_TEXT),
    int: (-17.5, WRONG_TEXT),
    list: ([[1]], {}),
    dict: ([], 3),
}
# Of slot 0, which is committed, of slot 1, which has a checkpoint, of slot 3, whose holder was
# killed, and of the sweep; with the least number of cases in each.
DOCUMENTS = {
    "slots/0000/spec.json": 60, "slots/0000/result.json": 90, "slots/0000/lease.json": 70,
    "slots/0001/lease.json": 90, "slots/0003/lease.json": 60, "sweep.json": 100,
}  # fmt: skip


class StopsAtStep2:
    """The uploads of an attempt that is told to end in its second step."""

    def __init__(self, uploads: Any, stop: Stop) -> None:
        self._uploads, self._stop = uploads, stop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._uploads, name)

    def report(self, **progress: Any) -> None:
        self._uploads.report(**progress)
        if progress.get("step") == 2:
            self._stop.set()


def _stopped(attempt: Any, uploads: Any, work_dir: Path) -> Any:
    return FAKE_TRAINING.fit(attempt, StopsAtStep2(uploads, attempt.stop), work_dir)  # type: ignore[arg-type]


def _never(reason: str) -> None:
    raise AssertionError(reason)


def _trial(given: dict[str, Any], out: Path, slot: int, **training: Any) -> None:
    stop, settings = Stop(15), Settings(**given, completion_index=slot)
    fake = replace(FAKE_TRAINING, **training)
    run_trial_on(LocalStore(out), settings, stop, fake, Watchdog(stop, _never))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sweep")
    given = make_inputs(folder) | {"max_steps": 4, "num_trials": 4, "lease_seconds": 60}
    _trial(given, folder / "out", 0)
    with pytest.raises(PreemptedError):
        _trial(given, folder / "out", 1, fit=_stopped)
    ledger = Ledger(LocalStore(folder / "out"), "s")
    ledger.slot(3).specify(make_spec())
    killed = acquire(ledger, [3], lease_seconds=60, should_stop=lambda: None)
    assert killed is not None
    killed.open_account()
    killed.report(first_step=0, step=1, tokens_per_second=9.0)
    killed.renew()
    return folder / "out", given


def _places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every key, in nested objects and in the first entry of every list, too."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield (*path, key)
            yield from _places(value, (*path, key))
    elif isinstance(content, list) and content:
        yield (*path, 0)
        yield from _places(content[0], (*path, 0))


def _cases(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The document with each key removed, null, and of another value than it can have."""
    for turn, path in enumerate(_places(content)):
        for how in ("removed", "null", "wrong"):
            spoiled = copy.deepcopy(content)
            inner: Any = spoiled
            for key in path[:-1]:
                inner = inner[key]
            if how == "removed":
                del inner[path[-1]]
            else:
                wrong = WRONG.get(type(inner[path[-1]]), WRONG[int])[turn % 2]
                inner[path[-1]] = None if how == "null" else wrong
            yield f"{'.'.join(map(str, path))} {how}: {inner}", spoiled


def _newest(path: Path) -> Path:
    """The file of a document's newest version."""
    return max(path.parent.glob(f"{path.name}*"), key=lambda found: (len(found.name), found.name))


def _use(given: dict[str, Any], out: Path, part: int) -> list[int]:
    """Look at the sweep, change it, or run the other slot's trial; return how that one ended.

    Raises whatever is no `JobError`.
    """
    settings, ledger = Settings(**given), Ledger(LocalStore(out), "s")
    verbs = {"status": show_status, "report": write_report, "best": show_best}

    def run(line: str) -> int:
        options = parse(line.split())
        return _code(lambda: verbs[options.verb](options, settings, ledger))

    if part == 0:
        for line in ("status --attempts", f"report --output {out}", f"best --download {out}/a"):
            run(line)
    elif part == 1:
        options = {"dry_run": False, "old_generations": True, "unused_hours": 0, "say": print}
        _code(lambda: collect(ledger, **options))
        for number in (0, 1, 3):
            _code(lambda: redo(ledger.slot(number)))  # noqa: B023
        run("status")
    else:
        code = _code(lambda: _trial(given, out, OTHER))
        run(f"report --output {out}")  # with more than one trial to compare
        return [code]
    return []


def _code(act: Callable[[], object]) -> int:
    try:
        act()
    except JobError as error:
        return int(error.exit_code)
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_spoiled_key_is_its_own_slots_damage_and_no_bug(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    bucket, given = made
    caplog.set_level(logging.CRITICAL, "job")
    content = json.loads(_newest(bucket / "sweeps/s" / name).read_text())
    content.pop("nonce")
    codes: list[int] = []  # of the other slot's trial
    wrong, number = [], 0
    for number, (case, spoiled) in enumerate(_cases(content)):
        out = tmp_path / f"out-{number}"
        shutil.copytree(bucket, out, copy_function=os.link)  # nothing is written in place
        document = _newest(out / "sweeps/s" / name)
        document.unlink()
        document.write_text(json.dumps(spoiled))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                # Every key meets every part, and every way to spoil one does: in three cases each.
                codes += _use(given, out, (number + number // 3) % 3)
        except Exception as error:
            wrong.append(f"{case}: {error!r}")
        shutil.rmtree(out)
    assert wrong == []
    assert number + 1 >= DOCUMENTS[name]
    assert len(codes) >= DOCUMENTS[name] // 3
    if name == "sweep.json":  # a trial that cannot be compared with the others is not begun
        assert set(codes) == {ExitCode.OK, ExitCode.SETTINGS}
    else:
        assert set(codes) == {ExitCode.OK}
