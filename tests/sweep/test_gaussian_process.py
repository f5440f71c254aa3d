"""What is suggested after the ladder: pytest tests/sweep/test_gaussian_process.py"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from statistics import mean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.sweep.builtin import Observation
from tests.sweep.test_builtin import (
    CARD,
    DEFAULTS,
    ROOT,
    SPACES,
    WIDE,
    ask,
    assert_in_domain,
    loss_of,
    observed,
    sweep_of,
    trials,
)


@pytest.mark.slow
@settings(max_examples=5, deadline=None, derandomize=True)
@given(SPACES, st.lists(st.floats(0.5, 3.0), min_size=2, max_size=6))
def test_gp_points_lie_in_the_domain(space: dict[str, Any], losses: list[float]) -> None:
    definition = sweep_of("bayes", space)
    seen: list[Observation] = []
    for slot, loss in enumerate(losses):
        params = ask(definition, slot)
        assert params is not None
        seen.append(Observation(slot, params, "completed", loss))
    later = ask(definition, 9, seen)
    if later is not None:  # None: a countable space may be used up
        assert_in_domain(definition, later)


@pytest.mark.slow
def test_gp_tries_every_point_of_a_small_space_once_then_nothing_is_left() -> None:
    space = {"lora_r": {"values": [8, 16, 32]}, "lora_alpha": {"values": [16, 32]}}
    definition = sweep_of("bayes", space)
    seen: list[Observation] = []
    for slot in range(6):  # the first point is by far the best: the GP would like it again
        params = ask(definition, slot, seen)
        assert params is not None
        seen.append(Observation(slot, params, "completed", 1.3 if slot else 1.0))
    assert len({tuple(o.params.values()) for o in seen}) == 6
    assert ask(definition, 6, seen) is None


@pytest.mark.slow
def test_gp_is_the_same_in_another_process_told_in_another_order_and_silent() -> None:
    states = [("completed", 1.1), ("completed", 1.2), ("diverged", None), ("running", None)]
    seen = [observed(slot, loss, status) for slot, (status, loss) in enumerate(states)]
    code = """
import json, sys
from job.sweep.builtin import Observation, suggest
from job.sweep.definition import load_definition
definition = load_definition("job/sweep/sweep.yaml")
seen = [Observation(**told) for told in json.loads(sys.argv[1])]
print(json.dumps(suggest(definition, slot=5, sweep="s", observations=seen, step0_loss=1.4,
                         defaults=json.loads(sys.argv[2]))))
"""
    told = json.dumps([asdict(o) for o in reversed(seen)])
    elsewhere = run_python(code, told, json.dumps(DEFAULTS), hash_seed="123")
    assert json.loads(elsewhere) == ask(CARD, 5, seen)


def test_engine_imports_neither_optuna_nor_torch_before_the_gp() -> None:
    code = (
        "import sys, job.sweep.builtin, job.sweep.definition\n"
        "heavy = {'optuna', 'torch', 'scipy', 'numpy', 'pydantic', 'wandb'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run_python(code, hash_seed="0") == "[]"


def run_python(code: str, *arguments: str, hash_seed: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        env=os.environ | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


@pytest.mark.slow
def test_parallel_running_slots_get_different_points() -> None:
    # Three slots have ended; eight ask one after another while none of the eight ends.
    seen = [observed(slot, loss) for slot, loss in enumerate([1.02, 1.05, 1.08])]
    for slot in range(4, 12):
        params = ask(CARD, slot, seen)
        assert_in_domain(CARD, params)
        assert params is not None
        assert params not in [o.params for o in seen]
        seen.append(Observation(slot, params, "running", None))
    rates = sorted(float(o.params["learning_rate"]) for o in seen[3:])
    assert rates[-1] / rates[0] > 3, "running slots push each other apart"


@pytest.mark.slow
def test_gp_finds_the_rate_and_random_search_does_not() -> None:
    names = [f"sweep-{index}" for index in range(4)]
    random_search = sweep_of("random", CARD.to_json()["parameters"])
    regret = {
        label: 1000 * mean(min(map(_clean, trials(definition, name, 10))) - 1.0 for name in names)
        for label, definition in (("gp", CARD), ("random", random_search))
    }  # milli-nats above the optimum
    assert regret["gp"] < 0.2, regret  # the ladder alone, with its 6.7e-5, leaves 0.37
    assert regret["gp"] < regret["random"] / 2, regret


def _clean(observation: Observation) -> float:
    return loss_of(observation.params)


@pytest.mark.slow
def test_diverged_rates_are_avoided() -> None:
    # All above 1e-4 diverges: of the GP's points, few may go there.
    seen: list[Observation] = []
    for slot in range(10):
        params = ask(WIDE, slot, seen)
        assert params is not None
        diverges = float(params["learning_rate"]) > 1e-4
        status, loss = ("diverged", None) if diverges else ("completed", loss_of(params))
        seen.append(Observation(slot, params, status, loss))
    assert sum(o.status == "diverged" for o in seen[4:]) <= 2
