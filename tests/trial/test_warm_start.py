"""A sweep that starts from an earlier one's best point. `pytest tests/trial/test_warm_start.py`"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.errors import CredentialsError, SettingsError, StoreError
from job.ledger.ledger import Ledger
from job.ledger.records import Identity
from job.settings import Settings
from job.store import open_store
from job.store.base import Store
from job.store.local import LocalStore
from job.sweep.definition import SweepDefinition, parse_definition
from job.trial.warm_start import (
    EarlierBest,
    best_of,
    check_vocabulary_as_earlier,
    describe,
    read_earlier_best,
    warm_start_of,
)
from tests.ledger.documents import make_identity, make_result, make_spec
from tests.objective import Sweep
from tests.servers.behind_proxy import LIMITS, SHORT_LIMITS
from tests.servers.proxy import Fault, FaultProxy

RATE = {"distribution": "log_uniform_values", "min": 5e-6, "max": 2e-4}
METRIC = {"name": "eval/loss", "goal": "minimize"}
SEARCHED = {"method": "bayes", "metric": METRIC, "parameters": {"learning_rate": RATE}}


def _definition(method: str = "bayes", **parameters: Any) -> SweepDefinition:
    parameters = parameters or {"learning_rate": RATE}
    return parse_definition({"method": method, "metric": METRIC, "parameters": parameters})


def _earlier(store: Store, losses: dict[int, float | None], **identity: Any) -> Ledger:
    """A sweep `old` whose slots ended at these losses (None: without an adapter)."""
    ledger = Ledger(store, "old")
    named = {"JOB_SWEEP_FILE": SEARCHED, "_base_model": "base", "JOB_BASE_MODEL": {"revision": "r"}}
    ledger.open_sweep(make_identity(**named | {"_vocabulary": "v"} | identity))
    for number, loss in losses.items():
        slot = ledger.slot(number)
        slot.specify(make_spec(recipe={"learning_rate": 1e-5 * (number + 1), "lora_r": 32}))
        status = "infeasible" if loss is None else "completed"
        slot.commit(make_result(slot.folder, eval_loss=loss, status=status))
    return ledger


def _read(
    folder: Path, definition: SweepDefinition | None = None, **given: Any
) -> EarlierBest | None:
    given = {"warm_start_uri": f"{folder}/sweeps/old"} | given
    settings = Settings(dataset_uri="rows", output_uri=str(folder / "new"), **given)
    ledger = Ledger(LocalStore(folder / "new"), "s")
    return read_earlier_best(settings, definition or _definition(), ledger)


def test_the_best_committed_trial_is_taken_wherever_its_slot_lies(tmp_path: Path) -> None:
    ledger = _earlier(LocalStore(tmp_path), {0: 1.5, 1: 1.4, 4: 1.2, 7: 1.1, 8: 0.9, 9: None})
    ledger.slot(7).exclude("its rows were wrong")
    ledger.slot(8).store.put_if_version(
        ledger.slot(8).key("result.json"), b"{}", "1"
    )  # damaged, and hides no other
    diverged = ledger.slot(10)
    diverged.specify(make_spec())
    diverged.commit(make_result(diverged.folder, eval_loss=0.5, status="diverged"))
    best = _read(tmp_path)
    assert best is not None
    assert (best.slot, best.eval_loss, best.recipe.learning_rate) == (4, 1.2, 5e-5)
    assert (best.base_model, best.vocabulary) == ("base", "v")


def test_nothing_is_read_without_the_setting_or_once_the_sweep_has_begun(tmp_path: Path) -> None:
    assert _read(tmp_path, warm_start_uri=None) is None
    Ledger(LocalStore(tmp_path / "new"), "s").open_sweep(make_identity())
    assert _read(tmp_path) is None, "where there is no sweep at all by now"


def _no_sweep(_: Path) -> None:
    """Leave the folder empty."""


def _none_committed(folder: Path) -> None:
    _earlier(LocalStore(folder), {0: None}).slot(1).specify(make_spec())


def _damaged(folder: Path) -> None:
    _earlier(LocalStore(folder), {0: 1.0})
    (folder / "sweeps/old/sweep.json").write_text('{"JOB_BASE_MODEL": 7}')


def _no_json(folder: Path) -> None:
    (folder / "sweeps/old").mkdir(parents=True)
    (folder / "sweeps/old/sweep.json").write_bytes(b"\0")


def _other_metric(folder: Path) -> None:
    metric = {"metric": {"name": "accuracy", "goal": "maximize"}}
    _earlier(LocalStore(folder), {0: 1.0}, JOB_SWEEP_FILE=SEARCHED | metric)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_no_sweep, "there is no sweep in"),
        (_none_committed, "no trial of .* is committed with an adapter"),
        (_damaged, "damaged"),
        (_no_json, "damaged"),
        (_other_metric, "metric.name: is 'accuracy'; must be eval/loss"),
    ],
)
def test_what_no_sweep_can_start_from_is_refused_in_a_line(
    tmp_path: Path, make: Callable[[Path], None], says: str
) -> None:
    make(tmp_path)
    with pytest.raises(SettingsError, match=says) as caught:
        _read(tmp_path)
    line = str(caught.value)
    assert line.startswith("JOB_WARM_START_URI: ")
    assert str(tmp_path) in line
    assert "unset it" in line
    assert "\n" not in line


def test_a_file_in_place_of_the_folder_is_blamed_on_the_right_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="JOB_WARM_START_URI: .*file is not a folder"):
        _read(tmp_path, warm_start_uri=f"{tmp_path}/file/sweeps/old")


@pytest.mark.parametrize("method", ["random", "grid"])
def test_a_method_without_a_ladder_is_refused(tmp_path: Path, method: str) -> None:
    other = _definition(method, lora_r={"values": [8, 16]})
    with pytest.raises(SettingsError, match=f"the sweep's method is {method}.*unset it"):
        _read(tmp_path, other)


def test_a_sweep_that_wandb_draws_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="W&B draws this sweep's points; unset it"):
        _read(tmp_path, WANDB_SWEEP_ID="a/b/c")


@pytest.mark.parametrize("uri", ["s3://b/out", "out/sweeps", "s3://b/sweeps/a/sweep.json"])
def test_what_is_no_sweeps_folder_is_refused_by_the_settings(uri: str) -> None:
    with pytest.raises(ValueError, match="give the folder of an earlier sweep"):
        Settings(dataset_uri="rows", output_uri="out", warm_start_uri=uri)


def _best(**changes: Any) -> EarlierBest:
    values = {"uri": "/out/sweeps/old", "slot": 3, "eval_loss": 1.2, "base_model": "theirs",
              "revision": "r", "vocabulary": "v"}  # fmt: skip
    recipe = {"learning_rate": 1e-4, "lora_r": 32, "lora_dropout": 0.1, "lr_scheduler": "cosine"}
    return EarlierBest(recipe=make_spec(recipe=recipe).recipe, **values | changes)


def _ours(**changes: Any) -> Identity:
    named = {"_base_model": "ours", "_vocabulary": "v", "JOB_BASE_MODEL": {"revision": "q"}}
    return make_identity(**named | changes)


def test_another_vocabulary_is_refused() -> None:
    check_vocabulary_as_earlier(_best(), _ours())  # another base, such as the chat model
    with pytest.raises(SettingsError) as caught:
        check_vocabulary_as_earlier(_best(), _ours(_vocabulary="w"))
    assert str(caught.value) == (
        "JOB_WARM_START_URI: /out/sweeps/old was begun with theirs, whose tokenizer has another"
        " vocabulary than ours; name another sweep, or unset it"
    )


def test_a_sweep_that_does_not_say_its_vocabulary_serves_the_same_base_only() -> None:
    unsaid = _best(vocabulary=None)
    check_vocabulary_as_earlier(unsaid, _ours(JOB_BASE_MODEL={"revision": "r"}))
    with pytest.raises(SettingsError, match="does not say its vocabulary and has another base"):
        check_vocabulary_as_earlier(unsaid, _ours())


def test_its_point_takes_what_this_sweep_can_draw_and_the_rest_is_told() -> None:
    definition = _definition(
        learning_rate=RATE | {"max": 5e-5},  # 1e-4 is above it
        lora_dropout={"values": [0.05, 0.1]},  # not searched there, and 0.1 by its settings
        lora_r={"values": [8, 16]},
    )
    best = _best()
    warm = warm_start_of(best, definition)
    assert warm.params == {"learning_rate": 5e-5, "lora_dropout": 0.1, "lora_r": 16}
    assert (warm.slot, warm.eval_loss) == (3, 1.2)
    told = describe(best, definition, Settings(dataset_uri="rows", output_uri="out"))
    first, *rest = told.splitlines()
    assert first.startswith("slot 3 of /out/sweeps/old (eval/loss 1.2000 there)")
    assert rest == [
        "learning_rate: 0.0001 there, which this sweep cannot draw: 5e-05, the nearest",
        "lora_r: 32 there, which this sweep cannot draw: 16, the nearest",
        "lr_scheduler: cosine there, not searched here: linear (JOB_LR_SCHEDULER)",
    ]


@pytest.mark.slow
def test_a_store_that_fails_or_refuses_is_told_with_the_setting(
    proxied: tuple[Store, FaultProxy],
) -> None:
    store, proxy = proxied
    _earlier(store, {0: 1.0})
    uri = f"{store.uri}/sweeps/old"
    reader = open_store(store.uri, limits=dataclasses.replace(LIMITS, credentials_seconds=0.2))
    assert best_of(Ledger(reader, "old"), uri).eval_loss == 1.0
    proxy.faults = [Fault("status", status=403, code="AccessDenied")]
    refused = open_store(store.uri, limits=dataclasses.replace(LIMITS, credentials_seconds=0.2))
    with pytest.raises(CredentialsError, match=r"^JOB_WARM_START_URI: .*refused"):
        best_of(Ledger(refused, "old"), uri)
    proxy.faults = [Fault("status", status=503, code="SlowDown")]
    failing = open_store(store.uri, limits=SHORT_LIMITS)
    with pytest.raises(StoreError, match=r"^JOB_WARM_START_URI: .*not read again"):
        best_of(Ledger(failing, "old"), uri)


@pytest.mark.slow
def test_every_worker_starts_from_the_point_that_the_first_one_froze(tmp_path: Path) -> None:
    for name in ("earlier", "later"):
        (tmp_path / name).mkdir()
    earlier, later = Sweep(tmp_path / "earlier"), Sweep(tmp_path / "later")
    assert earlier.job(OBJECTIVE="rough", JOB_COMPLETION_INDEX=2).returncode == 0
    uri = f"{tmp_path}/earlier/out/sweeps/s"
    start = {"OBJECTIVE": "flat", "JOB_WARM_START_URI": uri}
    planned = later.job("plan", **start, JOB_DEVICE="cpu")
    assert f"warm start slot 2 of {uri}" in planned.stdout
    begun = later.job(**start, JOB_COMPLETION_INDEX=0)
    assert begun.returncode == 0, begun.stderr
    assert f"warm start: slot 2 of {uri}" in begun.stderr
    shutil.rmtree(tmp_path / "earlier/out")
    assert later.job(**start, JOB_COMPLETION_INDEX=1).returncode == 0
    spec = later.ledger.slot(1).spec()
    assert spec is not None
    assert spec.params["learning_rate"] == pytest.approx(2e-4 / 9, rel=1e-5), "slot 2's there"
    frozen = json.loads((tmp_path / "later/out/sweeps/s/sweep.json").read_text())
    assert frozen["JOB_WARM_START_URI"] == uri
    assert frozen["_warm_start"]["params"] == spec.params
    unset = later.job(OBJECTIVE="flat", JOB_COMPLETION_INDEX=2)
    assert unset.returncode == 64
    assert f"JOB_WARM_START_URI: {uri} -> not set" in unset.stderr
