"""What others do to a sweep while a trial loads its base, takes its lease or trains is met.

A ledger remembers what is created once. Here a person, or another worker, acts between a trial's
looks at the slots, through a ledger of their own. `pytest tests/trial/test_meanwhile.py`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from job.errors import PreemptedError
from job.ledger.accounts import NOTHING, cost_of_slot
from job.ledger.lease import HeldLease, acquire
from job.ledger.ledger import Ledger
from job.ledger.records import Ended, Spec
from job.ledger.redo import exclude, redo
from job.process.stop import Stop
from job.process.watchdog import Watchdog
from job.settings import Settings
from job.store.local import LocalStore
from job.trial.run import run_trial_on
from tests.fake_training import FAKE_TRAINING
from tests.ledger.documents import NOW, make_result, make_spec
from tests.workers import make_inputs

pytestmark = pytest.mark.slow

UNTUNED = 1.9  # the eval/loss of the untuned base, which slot 0 measures


def _nothing(*_: object) -> None:
    """Do nothing."""


def _never(reason: str) -> None:
    raise AssertionError(reason)


class _AsTheLeaseIsTaken(LocalStore):
    """A folder in which something happens right before the first write of a lease."""

    def __init__(self, root: Path, happens: Callable[[], object]) -> None:
        super().__init__(root)
        self._happens = happens

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if key.endswith("/lease.json"):
            happens, self._happens = self._happens, _nothing
            happens()
        return super().put_if_absent(key, data)


@dataclass(frozen=True)
class World:
    """A sweep of two slots; `others` is how everybody but the trial sees it."""

    given: dict[str, Any]
    others: Ledger
    out: Path

    def trial(
        self,
        *,
        loading: Callable[[], object] = _nothing,
        taking: Callable[[], object] = _nothing,
        training: Callable[[], object] = _nothing,
        **settings: object,
    ) -> str:
        """Run a trial; the three calls are made while it does what they are called after."""

        def fit(*given: Any) -> Any:
            training()
            return FAKE_TRAINING.fit(*given)

        stop = Stop(15)
        fake = replace(FAKE_TRAINING, load_base=lambda *_: loading(), fit=fit)
        store = _AsTheLeaseIsTaken(self.out, taking)
        merged = Settings(**self.given | settings)
        return run_trial_on(store, merged, stop, fake, Watchdog(stop, _never))

    def measured(self, number: int = 0) -> None:
        """Commit a slot that measured the untuned base."""
        slot = self.others.slot(number)
        slot.specify(make_spec())
        curve = ((0, UNTUNED), (9, 1.5))
        slot.commit(make_result(slot.folder, curve=curve, gpu_seconds=7200.0))

    def drawn(self, number: int) -> Spec:
        """Let a trial draw its slot, and be preempted before its first step."""

        def preempted() -> None:
            raise PreemptedError("node lost")

        with pytest.raises(PreemptedError):
            self.trial(training=preempted, completion_index=number)
        return self.spec(number)

    def spec(self, number: int) -> Spec:
        spec = self.others.slot(number).spec()
        assert spec is not None
        return spec

    def hold(self, number: int) -> HeldLease:
        lease = acquire(self.others, [number], lease_seconds=60, should_stop=lambda: None)
        assert lease is not None
        return lease


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def world(inputs: dict[str, Any], tmp_path: Path) -> World:
    out = tmp_path / "out"
    given = inputs | {"output_uri": str(out), "num_trials": 2, "max_steps": 2, "lease_seconds": 60}
    return World(given, Ledger(LocalStore(out), "s"), out)


@pytest.mark.parametrize("when", ["loading", "taking"])
@pytest.mark.parametrize("act", [None, "redo", "exclude"])
def test_a_draw_is_told_of_a_slot_that_was_closed_or_begun_again(
    world: World, act: str | None, when: str
) -> None:
    """Slot 0's result was read before. Who draws without it measures the untuned base itself."""
    world.measured()
    acts = {
        None: _nothing,
        "redo": lambda: redo(world.others.slot(0)),
        "exclude": lambda: exclude(world.others.slot(0), "wrong rows"),
    }
    world.trial(**{when: acts[act]}, completion_index=1)  # type: ignore[arg-type]
    spec = world.spec(1)
    assert spec.untuned == (UNTUNED if act is None else None)
    assert spec.measure_step_0 == (act is not None)


@pytest.mark.parametrize("when", ["loading", "taking"])
def test_a_draw_is_told_of_a_slot_that_another_worker_committed(world: World, when: str) -> None:
    world.others.slot(0).specify(make_spec())  # running, when it was looked at first
    world.trial(**{when: world.measured}, completion_index=1)  # type: ignore[arg-type]
    assert world.spec(1).untuned == UNTUNED


@pytest.mark.parametrize("is_committed", [True, False])
def test_the_log_counts_results_and_no_trial_that_still_runs(
    world: World, caplog: pytest.LogCaptureFixture, is_committed: bool
) -> None:
    if is_committed:
        world.measured()
    else:
        world.others.slot(0).specify(make_spec())
    with caplog.at_level("INFO", logger="job"):
        world.trial(completion_index=1)
    (said,) = (line for line in caplog.messages if line.startswith("slot 1: drawn by"))
    assert said.endswith(f"results so far: {int(is_committed)}")


def test_a_slot_begun_again_while_the_base_is_loaded_is_trained_as_that(world: World) -> None:
    before = world.drawn(1)
    said = world.trial(loading=lambda: redo(world.others.slot(1)), completion_index=1)
    assert said.startswith("slot 1 committed")
    slot = world.others.slot(1)
    assert (slot.generation, slot.state()) == (1, "committed")
    assert world.spec(1).params == before.params
    assert slot.earlier()[0].state() == "specified", "nothing goes to where it stood before"


@pytest.mark.parametrize("act", ["commit", "exclude", "give up"])
def test_a_slot_closed_while_the_base_is_loaded_is_nobodys_work(world: World, act: str) -> None:
    slot = world.others.slot(1)
    acts: dict[str, Callable[[], object]] = {
        "commit": lambda: world.measured(1),
        "exclude": lambda: exclude(slot, "wrong rows"),
        "give up": lambda: slot.give_up("no progress"),
    }
    said = world.trial(loading=acts[act], training=pytest.fail, completion_index=1)
    assert "nothing to do" in said
    assert slot.lease() is None


def test_a_lease_given_back_while_the_base_is_loaded_is_taken(world: World) -> None:
    holder = world.hold(0)
    assert world.trial(loading=holder.release).startswith("slot 0 committed"), "the first one"


def test_a_lease_taken_while_the_base_is_loaded_is_left_alone(world: World) -> None:
    assert world.trial(loading=lambda: world.hold(0)).startswith("slot 1 committed")
    stored = world.others.slot(0).lease()
    assert stored is not None
    assert stored.lease.epoch == 1


def test_a_lease_that_vanished_while_the_base_was_loaded_is_made_anew(world: World) -> None:
    """A person removed it by hand: it is no document that is created once and stays."""
    world.hold(1).release()
    key = world.others.slot(1).key("lease.json")
    said = world.trial(loading=lambda: world.others.store.delete(key), completion_index=1)
    assert said.startswith("slot 1 committed")
    stored = world.others.slot(1).lease()
    assert stored is not None
    assert stored.lease.epoch == 1


@pytest.mark.parametrize("when", ["loading", "taking"])
def test_a_sweep_that_ended_meanwhile_begins_no_slot(world: World, when: str) -> None:
    world.measured()
    ended = Ended(gain=2e-4, gain_before=5e-4, results=6, min_gain=1e-3, ended_at=NOW)
    said = world.trial(**{when: lambda: world.others.end(ended)}, completion_index=1)  # type: ignore[arg-type]
    assert said.startswith("slot 1: no new trial is begun, the sweep ended after 6 results")
    assert world.others.slot(1).spec() is None


@pytest.mark.parametrize("when", ["loading", "taking"])
def test_a_budget_spent_meanwhile_begins_no_slot(world: World, when: str) -> None:
    assert cost_of_slot(world.others, 0) == NOTHING
    said = world.trial(**{when: world.measured}, completion_index=1, sweep_budget_gpu_hours=2.0)  # type: ignore[arg-type]
    assert said.startswith("slot 1: 2.0 GPU-hours are spent, JOB_SWEEP_BUDGET_GPU_HOURS is 2")
    assert world.others.slot(1).spec() is None


def test_a_slot_begun_again_while_it_trains_is_not_committed(world: World) -> None:
    """The redo was cut off before it took the lease: only the look before the commit sees it."""

    def redo_cut_off() -> None:
        world.others.store.put_if_absent(world.others.redo_key(1, 1), b"{}")

    with pytest.raises(PreemptedError, match="slot 1: was begun again meanwhile"):
        world.trial(training=redo_cut_off, completion_index=1)
    slot = world.others.slot(1)
    assert (slot.state(), slot.earlier()[0].state()) == ("empty", "specified")
