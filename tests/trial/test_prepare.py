"""What a trial does before its first step, and without. `pytest tests/trial/test_prepare.py`"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job.errors import PreemptedError, SettingsError
from job.ledger.accounts import read_accounts
from job.ledger.ledger import Ledger
from job.ledger.slot import Slot
from job.ledger.watch import LeaseWatch, wait_for_a_free_slot
from job.process.stop import Stop
from job.process.watchdog import Watchdog
from job.settings import Settings
from job.store.base import Stored
from job.store.local import LocalStore
from job.trial.budget import budget_reached
from job.trial.draw import observe
from job.trial.end import worth_working_on
from job.trial.run import run_trial_on
from job.trial.slots import drawn_of, open_slots
from job.wandb.confirmed import unconfirmed
from tests.fake_training import FAKE_TRAINING
from tests.ledger.documents import make_identity, make_result, make_spec
from tests.workers import make_inputs, start_worker, wait_for

TRIAL = """
import json, logging, sys
from pathlib import Path
from job.process.stop import Stop
from job.process.watchdog import Watchdog
from job.settings import Settings
from job.ledger.ledger import Ledger
from job.settings import Settings
from job.store.base import Stored
from job.store.local import LocalStore
from job.trial.draw import observe
from job.trial.end import worth_working_on
from job.trial.slots import open_slots
from job.trial.run import run_trial_on
from tests.fake_training import FAKE_TRAINING
logging.disable(logging.CRITICAL)
settings = Settings(**json.loads(sys.argv[1]))
stop = Stop(8)
watchdog = Watchdog(stop, lambda reason: None)
run_trial_on(LocalStore(Path(settings.output_uri)), settings, stop, FAKE_TRAINING, watchdog)
print(json.dumps(sorted(set(sys.argv[2:]) & set(sys.modules))))
"""
# Seconds of imports that only training, or nothing in a trial on a warm node, has a use for.
LARGE = (
    *("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "datasets", "pandas", "scipy"),
    *("wandb", "apprise", "azure", "google", "boto3", "huggingface_hub", "jinja2"),
)


def _trial(settings: dict[str, Any]) -> list[str]:
    """Run a trial, all but its training, in a new process: the large libraries that it imported."""
    done = subprocess.run(
        [sys.executable, "-c", TRIAL, json.dumps(settings), *LARGE],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return list(json.loads(done.stdout))


@pytest.mark.slow
def test_with_prepared_rows_no_tokenizer_and_no_large_library_is_loaded(tmp_path: Path) -> None:
    settings = make_inputs(tmp_path)
    first = start_worker(settings, lambda: LocalStore(tmp_path / "out"))
    assert wait_for(first) == 0
    assert _trial(settings) == []


ONE_POINT = """\
name: s
method: random
metric: {name: eval/loss, goal: minimize}
parameters: {lora_r: {value: 8}}
"""


@pytest.mark.parametrize("of_one", [3, None])
def test_a_slot_that_can_never_be_drawn_ends_before_anything_is_loaded(
    tmp_path: Path, of_one: int | None
) -> None:
    (tmp_path / "sweep.yaml").write_text(ONE_POINT)
    settings = Settings(
        base_model=str(tmp_path / "absent"), dataset_uri="absent", output_uri=str(tmp_path / "out"),
        work_dir=tmp_path / "work", sweep_file=tmp_path / "sweep.yaml", num_trials=4,
        completion_index=of_one,
    )  # fmt: skip
    store, stop = LocalStore(tmp_path / "out"), Stop(8)

    def run(settings: Settings) -> str:
        return run_trial_on(store, settings, stop, FAKE_TRAINING, Watchdog(stop, pytest.fail))

    with pytest.raises(SettingsError, match="absent"):
        run(settings.model_copy(update={"completion_index": 0}))
    ledger = Ledger(store, "s")
    slot = ledger.slot(0)
    slot.specify(make_spec(params={"lora_r": 8}))
    with pytest.raises(SettingsError, match="absent"):  # what is drawn is ended
        run(settings.model_copy(update={"completion_index": 0}))
    slot.commit(make_result(slot.folder))
    name = "sweep s, all 4 slots" if of_one is None else "slot 3"
    assert run(settings) == f"{name}: no trial is left to draw, the sweep has 1 point"
    ledger.open_sweep(make_identity())
    with pytest.raises(SettingsError, match="absent"):  # with other settings it is no judge
        run(settings)


def _settings(**given: object) -> Settings:
    return Settings(dataset_uri="rows", output_uri="out", num_trials=8, **given)  # type: ignore[arg-type]


class Asked(LocalStore):
    """A folder that notes what it is asked: the key of a document, and whether it was there."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: list[tuple[str, bool]] = []
        self.num_others = 0  # writes and lists

    def get(self, key: str) -> Stored | None:
        found = super().get(key)
        self.reads.append((key, found is not None))
        return found

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.num_others += 1
        return super().put_if_absent(key, data)

    def put_if_version(self, key: str, data: bytes, version: str) -> bool:
        self.num_others += 1
        return super().put_if_version(key, data, version)

    def list(self, prefix: str) -> Iterator[str]:
        self.num_others += 1
        return super().list(prefix)


class _AtItsFirstStepError(Exception):
    pass


def _begin(store: LocalStore, given: dict[str, Any]) -> None:
    """Run a trial up to where its training begins."""

    def fit(*_: object) -> None:
        raise _AtItsFirstStepError

    stop = Stop(8)
    training, watchdog = replace(FAKE_TRAINING, fit=fit), Watchdog(stop, pytest.fail)
    with pytest.raises(_AtItsFirstStepError):
        run_trial_on(store, Settings(**given), stop, training, watchdog)


@pytest.mark.slow
@pytest.mark.parametrize(("limits", "most"), [({}, 180), ({"sweep_budget_gpu_hours": 999}, 260)])
def test_before_its_first_step_the_last_of_twelve_trials_asks_so_much_at_most(
    tmp_path: Path, limits: dict[str, float], most: int
) -> None:
    """Each answer takes tens of milliseconds, and 4 of CPU in a bucket: 173 and 249 of them now."""
    given = make_inputs(tmp_path) | {"num_trials": 12} | limits
    _begin(LocalStore(tmp_path / "out"), given | {"completion_index": 0})
    ledger = Ledger(LocalStore(tmp_path / "out"), "s")
    for number in range(11):
        slot = ledger.slot(number)
        slot.specify(make_spec())
        slot.commit(make_result(slot.folder))
    store = Asked(tmp_path / "out")
    _begin(store, given)
    assert ledger.slot(11).state() == "specified"
    assert len(store.reads) + store.num_others <= most, Counter(
        key.rsplit("/")[-1] for key, _ in store.reads
    )
    created_once = re.compile(r".*/((spec|result|sweep)\.json|manifest\.json)")
    found = Counter(key for key, is_there in store.reads if is_there and created_once.match(key))
    assert len(found) == 12 + 11 + 1 + 1
    assert set(found.values()) == {1}, "what is created once is read once"


class SideBySide(LocalStore):
    """A folder that answers for documents of these names once so many of them are asked for."""

    def __init__(self, root: Path, num: int, *names: str) -> None:
        super().__init__(root)
        self._together = threading.Barrier(num, timeout=20)
        self._names = names

    def get(self, key: str) -> Stored | None:
        if key.endswith(self._names):
            self._together.wait()
        return super().get(key)


@pytest.mark.parametrize(
    "look",
    [
        lambda ledger: open_slots(ledger, 8),
        lambda ledger: observe(ledger, 8),
        lambda ledger: list(ledger.committed(8)),
        lambda ledger: worth_working_on(_settings(), ledger, list(range(8))),
        lambda ledger: drawn_of(ledger, range(8)),
        lambda ledger: budget_reached(_settings(sweep_budget_gpu_hours=9), ledger),
        lambda ledger: unconfirmed(ledger, 8),
    ],
)
def test_slots_are_read_side_by_side(tmp_path: Path, look: Callable[[Ledger], object]) -> None:
    look(Ledger(SideBySide(tmp_path, 4, "/redo-1.json"), "s"))


CLOSING = ("result.json", "failed.json", "excluded.json")


@pytest.mark.parametrize(
    ("names", "look"),
    [
        (CLOSING, lambda slot: slot.is_open()),
        ((*CLOSING, "lease.json"), lambda slot: _is_free(slot.ledger)),
        (("result.json", "lease.json"), lambda slot: slot.damage_without_spec()),
    ],
)
def test_documents_of_a_slot_are_read_side_by_side(
    tmp_path: Path, names: tuple[str, ...], look: Callable[[Slot], object]
) -> None:
    look(Ledger(SideBySide(tmp_path, len(names), *names), "s").slot(0))


def _is_free(ledger: Ledger) -> bool:
    watch = LeaseWatch(60)
    return wait_for_a_free_slot(ledger, [0], watch, should_stop=lambda: None, wait=time.sleep)


@pytest.mark.slow
def test_all_that_comes_before_the_lease_is_paid_for_and_wasted_only_by_a_restart(
    tmp_path: Path,
) -> None:
    def preempted(*_: object) -> Any:
        raise PreemptedError("node lost")

    slow = replace(
        FAKE_TRAINING,
        open_device=lambda _: time.sleep(1.0),
        load_base=lambda *_: time.sleep(0.5),
    )
    settings = Settings(**make_inputs(tmp_path), completion_index=0)
    stop, slot = Stop(15), Ledger(LocalStore(tmp_path / "out"), "s").slot(0)
    watchdog = Watchdog(stop, lambda _: None)
    with pytest.raises(PreemptedError):
        run_trial_on(slot.store, settings, stop, replace(slow, fit=preempted), watchdog)
    run_trial_on(slot.store, settings, stop, slow, watchdog)
    first, second = read_accounts(slot)
    result = slot.result()
    assert result is not None
    for account in (first, second):
        assert account.gpu_seconds >= 1.5
    assert first.wasted_gpu_seconds == first.gpu_seconds, "it left nothing"
    phases = result.phase_seconds
    assert phases["prepare"] >= 1.0
    assert second.gpu_seconds >= phases["prepare"] + phases["load"] + phases["train"] - 0.1
    assert second.wasted_gpu_seconds is not None
    assert second.wasted_gpu_seconds < 1.0, "a trial has to prepare and load once"
    assert result.gpu_seconds == pytest.approx(first.gpu_seconds + second.gpu_seconds, abs=0.2)
