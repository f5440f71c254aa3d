"""Who may train what, before anything is trained. `pytest tests/trial/test_slots.py`"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.errors import SettingsError, SlotError
from job.ledger.lease import acquire
from job.ledger.ledger import Ledger
from job.ledger.records import Checkpoint, Ended
from job.ledger.redo import redo
from job.process.stop import Stop
from job.process.watchdog import Watchdog
from job.report.overview import read_overview
from job.settings import Settings
from job.store.documents import create_document
from job.store.local import LocalStore
from job.sweep.definition import SweepDefinition, parse_definition
from job.trial.attempt import Training
from job.trial.budget import budget_reached
from job.trial.draw import with_a_point
from job.trial.end import end_of, worth_working_on
from job.trial.run import run_trial_on
from job.trial.slots import check_progress, check_undrawn, slots
from tests.ledger.documents import NOW, make_identity, make_result, make_spec
from tests.workers import make_inputs, start_worker, wait_for


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(LocalStore(tmp_path), "s")


def _settings(**given: object) -> Settings:
    return Settings(**{"dataset_uri": "rows", "output_uri": "out", "num_trials": 3} | given)  # type: ignore[arg-type]


def _lease(ledger: Ledger, **content: object):  # type: ignore[no-untyped-def]
    lease = acquire(ledger, [0], lease_seconds=30, should_stop=lambda: None)
    assert lease is not None
    lease.renew(**content)
    return lease


@pytest.mark.parametrize(("fruitless", "startless"), [(3, 0), (0, 10)])
def test_a_slot_without_progress_is_closed_with_69(
    ledger: Ledger, fruitless: int, startless: int
) -> None:
    lease = _lease(ledger, fruitless=fruitless, startless=startless)
    with pytest.raises(SlotError, match="slot 0 is given up"):
        check_progress(lease)
    assert ledger.slot(0).state() == "failed"
    with pytest.raises(SlotError, match="slot 0 was given up: .* attempts in a row"):
        slots(_settings(completion_index=0), ledger)
    assert slots(_settings(), ledger) == [1, 2], "the others go on"


def test_preemptions_alone_close_no_slot(ledger: Ledger) -> None:
    check_progress(_lease(ledger, fruitless=2, startless=9))
    assert ledger.slot(0).is_open()


def test_a_checkpoint_without_a_spec_is_damage_and_never_redrawn(ledger: Ledger) -> None:
    check_undrawn(_lease(ledger).slot)
    with pytest.raises(SlotError, match="damaged: it has checkpoints but no spec"):
        check_undrawn(_lease_again(ledger).slot)


@pytest.mark.parametrize(
    "name",
    [
        *("adapter-0a/adapter_config.json", "best-0a/manifest.json", "rows-0a.json"),
        *("checkpoints/1-5-0a/manifest.json", "history-0a.jsonl"),
    ],
)
def test_an_upload_without_a_spec_is_damage_and_never_redrawn(
    ledger: Ledger, name: str, tmp_path: Path
) -> None:
    """Whoever lost or removed the spec: what lies here was trained with parameters nobody knows."""
    source = tmp_path / "planted"
    source.write_text("{}")
    ledger.store.upload(ledger.slot(0).key(name), source)
    with pytest.raises(SlotError, match=f"damaged: it has {name} but no spec.json"):
        check_undrawn(_lease(ledger).slot)
    with pytest.raises(SlotError, match="slot 0 is damaged"):
        slots(_settings(num_trials=1), ledger)
    assert slots(_settings(), ledger) == [1, 2], "the others go on"
    (view, other) = read_overview(ledger, 2).slots
    assert (view.state, view.reason) == ("damaged", f"it has {name} but no spec.json")
    assert other.state == "empty"
    assert "parameters drawn anew" in redo(ledger.slot(0))
    check_undrawn(ledger.slot(0))


def test_the_way_out_of_an_upload_without_a_spec_needs_no_lease(
    ledger: Ledger, tmp_path: Path
) -> None:
    source = tmp_path / "planted"
    source.write_text("{}")
    ledger.store.upload(ledger.slot(2).key("adapter-0a/adapter_config.json"), source)
    assert "parameters drawn anew" in redo(ledger.slot(2))
    with pytest.raises(SettingsError, match="never begun"):
        redo(ledger.slot(1))


def _lease_again(ledger: Ledger):  # type: ignore[no-untyped-def]
    other = acquire(ledger, [1], lease_seconds=30, should_stop=lambda: None)
    assert other is not None
    key = other.slot.key("checkpoints/1-1")
    other.renew(checkpoints=(Checkpoint(key=key, sha256="0", step=1, best=None),))
    return other


def test_a_result_without_a_spec_is_damage(ledger: Ledger) -> None:
    ledger.slot(0).commit(make_result())
    with pytest.raises(SlotError, match="no spec"):
        slots(_settings(completion_index=0), ledger)


def test_the_sweep_budget_counts_committed_and_running_slots(ledger: Ledger) -> None:
    ledger.slot(1).specify(make_spec())
    ledger.slot(1).commit(make_result(ledger.slot(1).folder, gpu_seconds=5400.0))
    lease = _lease(ledger, gpu_seconds_before=1000.0)
    lease.report(gpu_seconds=800.0)
    lease.renew()
    assert budget_reached(_settings(), ledger) is None
    assert budget_reached(_settings(sweep_budget_gpu_hours=3.5), ledger) is None, "1.5 h a trial"
    assert budget_reached(_settings(sweep_budget_gpu_hours=3.4), ledger) is not None
    spent = budget_reached(_settings(sweep_budget_gpu_hours=2.0), ledger)
    assert spent == "2.0 GPU-hours are spent, JOB_SWEEP_BUDGET_GPU_HOURS is 2"


@pytest.mark.slow
def test_a_recipe_of_a_newer_version_is_not_trained_as_if_it_said_less(tmp_path: Path) -> None:
    given = make_inputs(tmp_path) | {"max_steps": 4}
    store = LocalStore(tmp_path / "out")
    ledger = Ledger(store, "s")
    assert wait_for(start_worker(given | {"completion_index": 0}, lambda: store)) == 0
    spec = ledger.slot(0).spec()
    assert spec is not None
    newer = spec.recipe.changed(lora_on_the_head=True)
    ledger.slot(1).specify(spec.changed(recipe=newer))
    assert wait_for(start_worker(given | {"completion_index": 1}, lambda: store)) == 69
    (account,) = ledger.slot(1).accounts()
    assert account.reason == (
        "slot 1: its recipe has lora_on_the_head, which this version does not know: use the image"
        " that drew it"
    )
    assert ledger.slot(1).is_open(), "the right image trains it"


def _ended(ledger: Ledger, **changes: float) -> Ended:
    ended = Ended(**{"gain": 2e-4, "gain_before": 5e-4, "results": 6, "min_gain": 1e-3} | changes)  # type: ignore[arg-type]
    ledger.end(ended)
    return ended


def test_in_an_ended_sweep_only_what_is_drawn_or_begun_again_is_left(ledger: Ledger) -> None:
    ledger.slot(1).specify(make_spec())  # in flight, preempted, or held by somebody
    # Begun again after its spec was lost: a person wants it, and it is drawn anew.
    create_document(ledger.store, ledger.redo_key(2, 1), {"created_at": NOW})
    assert worth_working_on(_settings(), ledger, [0, 1, 2]) == ([0, 1, 2], None)
    ended = _ended(ledger)
    assert worth_working_on(_settings(), ledger, [0, 1, 2]) == ([1, 2], ended)
    assert worth_working_on(_settings(), ledger, [0]) == ([], ended)
    assert worth_working_on(_settings(), ledger, [1]) == ([1], None), (
        "nothing new, nothing to judge"
    )


@pytest.mark.parametrize(
    "given",
    [{"min_gain": 0}, {"min_gain": 5e-4}, {"WANDB_SWEEP_ID": "a/b/c"}],
    ids=["switched off", "a gain that was expected", "W&B decides"],
)
def test_an_end_is_overruled(ledger: Ledger, given: dict[str, object]) -> None:
    _ended(ledger)
    assert worth_working_on(_settings(**given), ledger, [0]) == ([0], None)


def _few(method: str, **others: Any) -> SweepDefinition:
    metric = {"name": "eval/loss", "goal": "minimize"}
    few = {"lora_r": {"values": [8, 16]}}
    return parse_definition({"method": method, "metric": metric, "parameters": few} | others)


@pytest.mark.parametrize(
    ("sweep", "why"),
    [
        (_few("grid"), "the grid has 2 points"),
        (_few("grid", run_cap=2), "the sweep's run_cap is 2"),
        (_few("random"), "the sweep has 2 points"),
    ],
)
def test_a_slot_that_no_point_is_left_for_is_known_beforehand(
    ledger: Ledger, sweep: SweepDefinition, why: str
) -> None:
    ledger.slot(0).specify(make_spec(params={"lora_r": 16}))
    ledger.slot(4).specify(make_spec(params={"lora_r": 8}))  # drawn when there were more
    settings = _settings(num_trials=6)
    assert with_a_point(settings, sweep, ledger, [4]) == ([4], None), "what is drawn is ended"
    assert with_a_point(settings, sweep, ledger, [3, 4, 5]) == ([4], why)
    assert with_a_point(settings, sweep, ledger, [3]) == ([], why)
    assert with_a_point(_settings(num_trials=2), sweep, ledger, [1]) == ([1], None)
    on_wandb = _settings(num_trials=6, WANDB_SWEEP_ID="a/b/c")
    assert with_a_point(on_wandb, sweep, ledger, [3]) == ([3], None), "W&B says it itself"


def test_a_point_is_left_in_any_slot_until_all_are_drawn(ledger: Ledger) -> None:
    ledger.slot(4).specify(make_spec(params={"lora_r": 8}))
    settings = _settings(num_trials=6)
    assert with_a_point(settings, _few("bayes"), ledger, [1, 5]) == ([1, 5], None)
    assert with_a_point(settings, _few("grid"), ledger, [1, 5]) == ([1], "the grid has 2 points")
    ledger.slot(2).specify(make_spec(params={"lora_r": 16}))
    assert with_a_point(settings, _few("bayes"), ledger, [1])[0] == []
    ledger.slot(2).exclude("a test")
    assert with_a_point(settings, _few("bayes"), ledger, [1]) == ([1], None), "its point is free"


def _flat(ledger: Ledger, num_ended: int) -> None:
    """Make a sweep whose trials all ended at the same loss, but for the untuned model's."""
    rate = {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-3}
    metric = {"name": "eval/loss", "goal": "minimize"}
    sweep = {"method": "bayes", "metric": metric, "parameters": {"learning_rate": rate}}
    ledger.open_sweep(make_identity(JOB_SWEEP_FILE=sweep))
    for number in range(num_ended):
        slot = ledger.slot(number)
        slot.specify(make_spec(params={"learning_rate": 1e-5 * (number + 1)}))
        curve = ((0, 1.9), (9, 1.5)) if number == 0 else ((9, 1.5),)
        slot.commit(make_result(slot.folder, curve=curve, gpu_seconds=60.0 * (number + 1)))


def test_the_end_is_found_once_and_kept(ledger: Ledger) -> None:
    settings = _settings(num_trials=8)
    _flat(ledger, 4)
    assert end_of(settings, ledger) is None, "four results say too little"
    _flat(ledger, 6)
    ended = end_of(settings, ledger)
    assert ended is not None
    assert (ended.results, ended.min_gain, ended.trial_gpu_seconds) == (6, 0.001, 210.0)
    assert ledger.ended() == ended
    _flat(ledger, 7)
    assert end_of(settings, ledger) == ended, "what is written once stays"


@pytest.mark.parametrize("content", [b"\0", b"[]", b'{"gain": -1}', b"{}"])
def test_a_damaged_end_is_found_anew_and_stops_nobody(
    ledger: Ledger, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    ledger.store.put_if_absent(f"{ledger.folder}/ended.json", content)
    settings = _settings(num_trials=8)
    _flat(ledger, 4)
    assert worth_working_on(settings, ledger, [5]) == ([5], None)
    assert "ended.json" in caplog.text
    _flat(ledger, 6)
    left, ended = worth_working_on(settings, ledger, [6])
    assert left == []
    assert ended is not None


def test_the_end_is_judged_by_what_the_sweep_froze(ledger: Ledger) -> None:
    """A worker with another sweep file is not to end this one; its own is refused later (64)."""
    _flat(ledger, 6)
    others = _settings(num_trials=8, sweep_file="/another.yaml", learning_rate=0.5)
    assert end_of(others, ledger) is not None


def _spend(ledger: Ledger) -> None:
    slot = ledger.slot(0)
    slot.specify(make_spec())
    slot.commit(make_result(slot.folder, gpu_seconds=7200.0))


def _never(*words: object) -> None:
    raise AssertionError(words)


def _run(ledger: Ledger, settings: Settings, load_base: Callable[..., None]) -> str:
    training = Training(open_device=lambda _: None, load_base=load_base, fit=_never)  # type: ignore[arg-type, return-value]
    stop = Stop(15)
    return run_trial_on(ledger.store, settings, stop, training, Watchdog(stop, _never))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("happens", "given", "line"),
    [
        (_ended, {}, "no new trial is begun, the sweep ended after 6 results"),
        (
            _spend,
            {"sweep_budget_gpu_hours": 2},
            "2.0 GPU-hours are spent, JOB_SWEEP_BUDGET_GPU_HOURS is 2, no new trial is begun",
        ),
    ],
    ids=["the end", "the budget"],
)
def test_what_ends_a_sweep_is_seen_before_the_base_is_loaded_and_before_the_draw(
    tmp_path: Path, happens: Callable[[Ledger], object], given: dict[str, object], line: str
) -> None:
    settings = Settings(**make_inputs(tmp_path) | {"completion_index": 3} | given)
    ledger = Ledger(LocalStore(tmp_path / "out"), "s")
    assert _run(ledger, settings, lambda *_: happens(ledger)).startswith(f"slot 3: {line}")
    assert ledger.slot(3).state() == "empty"
    stored = ledger.slot(3).lease()
    assert stored is not None
    assert not stored.lease.is_held
    again = Settings(**settings.model_dump() | {"completion_index": 4})
    assert _run(ledger, again, _never).startswith(f"slot 4: {line}")
    assert ledger.slot(4).lease() is None
