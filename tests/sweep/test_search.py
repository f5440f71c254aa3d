"""What is suggested after the opening: pytest tests/sweep/test_search.py"""

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import asdict
from statistics import mean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.sweep.builtin import expected_gain
from job.sweep.definition import SweepDefinition
from job.sweep.distributions import Params, num_points
from job.sweep.observations import Observation
from tests.sweep.test_builtin import (
    CARD,
    DEFAULTS,
    ROOT,
    SPACES,
    STEP0_LOSS,
    WIDE,
    ask,
    assert_in_domain,
    loss_of,
    observed,
    sweep_of,
    trials,
)


@pytest.mark.slow
@settings(max_examples=50, deadline=None, derandomize=True)
@given(SPACES, st.integers(0, 2**32), st.integers(1, 12), st.sampled_from([1, 4]))
def test_no_point_is_tried_twice_whatever_the_space_and_the_history(
    space: dict[str, Any], seed: int, num_trials: int, num_workers: int
) -> None:
    # A fifth of the trials fails; `num_workers` draw at once, before any of them has ended.
    definition = sweep_of("bayes", space)
    chance = random.Random(seed)
    seen: list[Observation] = []
    for start in range(0, num_trials, num_workers):
        batch: list[Observation] = []
        for slot in range(start, start + num_workers):
            params = ask(definition, slot, [*seen, *batch])
            if params is None:
                assert all(num_points(d) is not None for d in definition.parameters.values())
                return
            assert_in_domain(definition, params)
            assert params not in [o.params for o in (*seen, *batch)]
            batch.append(Observation(slot, params, "running", None))
        seen += [_ended(o, chance) for o in batch]
        gain = expected_gain(definition, sweep="s", observations=seen, step0_loss=STEP0_LOSS)
        assert gain is None or 0 <= gain < 1


def _ended(running: Observation, chance: random.Random) -> Observation:
    failed = chance.random() < 0.2
    status = chance.choice(["diverged", "infeasible"]) if failed else "completed"
    loss = None if failed else chance.choice([1.0, chance.uniform(0.9, 1.6), math.nan])
    return Observation(running.slot, running.params, status, loss)


def test_every_point_of_a_small_space_is_tried_once_then_nothing_is_left() -> None:
    space = {"lora_r": {"values": [8, 16, 32]}, "lora_alpha": {"values": [16, 32]}}
    definition = sweep_of("bayes", space)
    seen: list[Observation] = []
    for slot in range(6):  # the first point is by far the best: the GP would like it again
        params = ask(definition, slot, seen)
        assert params is not None
        seen.append(Observation(slot, params, "completed", 1.3 if slot else 1.0))
    assert len({tuple(o.params.values()) for o in seen}) == 6
    assert ask(definition, 6, seen) is None
    assert gain_of(definition, seen) is None


def test_a_suggestion_is_the_same_in_another_process_and_in_another_order_and_silent() -> None:
    states = [("completed", 1.1), ("completed", 1.2), ("diverged", None), ("running", None)]
    seen = [observed(slot, loss, status) for slot, (status, loss) in enumerate(states)]
    code = """
import json, sys
from job.sweep.builtin import suggest
from job.sweep.definition import load_definition
from job.sweep.observations import Observation
definition = load_definition("job/sweep/sweep.yaml")
seen = [Observation(**told) for told in json.loads(sys.argv[1])]
print(json.dumps(suggest(definition, slot=5, sweep="s", observations=seen, step0_loss=1.4,
                         defaults=json.loads(sys.argv[2]))))
"""
    told = json.dumps([asdict(o) for o in reversed(seen)])
    for threads in ("1", "2"):
        elsewhere = run_python(code, told, json.dumps(DEFAULTS), threads=threads)
        assert json.loads(elsewhere) == ask(CARD, 5, seen)


def test_engine_imports_neither_numpy_nor_scipy_before_it_has_something_to_learn_from() -> None:
    code = (
        "import sys, job.sweep.builtin, job.sweep.definition\n"
        "heavy = {'torch', 'scipy', 'numpy', 'pydantic', 'wandb'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run_python(code, threads="1") == "[]"


def test_a_suggestion_needs_no_torch() -> None:
    code = (
        "import sys, job.sweep.search\n"
        "from scipy.special import ndtr\n"
        "print(sorted({'torch', 'optuna', 'scipy.stats'} & set(sys.modules)))"
    )
    assert run_python(code, threads="1") == "[]"


def run_python(code: str, *arguments: str, threads: str) -> str:
    variables = {"PYTHONHASHSEED": "123", "OMP_NUM_THREADS": threads}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        env=os.environ | variables | {"OPENBLAS_NUM_THREADS": threads},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_running_slots_push_each_other_apart() -> None:
    # Three slots have ended; eight ask one after another while none of the eight ends.
    seen = [observed(slot, loss) for slot, loss in enumerate([1.02, 1.05, 1.08])]
    for slot in range(4, 12):
        params = ask(CARD, slot, seen)
        assert_in_domain(CARD, params)
        assert params is not None
        seen.append(Observation(slot, params, "running", None))
    rates = sorted(math.log10(float(o.params["learning_rate"])) for o in seen[3:])
    assert rates[-1] - rates[0] > 0.3
    combinations = {tuple(v for k, v in o.params.items() if k != "learning_rate") for o in seen}
    assert len(combinations) > 2


@pytest.mark.slow
def test_the_rate_is_found_and_random_search_does_not_find_it() -> None:
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


def test_diverged_rates_are_avoided() -> None:
    # All above 1e-4 diverges: of the later points, few may go there.
    seen: list[Observation] = []
    for slot in range(10):
        params = ask(WIDE, slot, seen)
        assert params is not None
        diverges = float(params["learning_rate"]) > 1e-4
        status, loss = ("diverged", None) if diverges else ("completed", loss_of(params))
        seen.append(Observation(slot, params, status, loss))
    assert sum(o.status == "diverged" for o in seen[4:]) <= 2


@pytest.mark.parametrize(
    ("failed", "left"),
    [
        (
            {"lora_r": 16, "quantization": "none"},
            {("none", 8), ("nf4", 8), ("nf4", 16), ("nf4", 32)},
        ),
        ({"lora_r": 8, "quantization": "nf4"}, {("none", 8), ("none", 16), ("none", 32)}),
    ],
)
def test_what_needs_as_much_memory_as_an_infeasible_trial_is_not_tried(
    failed: Params, left: set[tuple[str, int]]
) -> None:
    rate = {"distribution": "log_uniform_values", "min": 1.0e-5, "max": 1.0e-3}
    space = {"lora_r": {"values": [8, 16, 32]}, "quantization": {"values": ["none", "nf4"]}}
    definition = sweep_of("bayes", space | {"learning_rate": rate})
    mode, rank = next(iter(left))
    seen = [
        Observation(
            slot, {"learning_rate": r, "lora_r": rank, "quantization": mode}, "completed", 1
        )
        for slot, r in enumerate((1e-4, 2e-4, 4e-4))
    ]
    seen.append(Observation(3, failed | {"learning_rate": 1e-4}, "infeasible", None))
    for slot in range(6, 18):
        params = ask(definition, slot, seen)
        assert params is not None
        assert (params["quantization"], params["lora_r"]) in left
        seen.append(Observation(slot, params, "running", None))


def gain_of(definition: SweepDefinition, seen: list[Observation]) -> float | None:
    return expected_gain(definition, sweep="s", observations=seen, step0_loss=STEP0_LOSS)


def flat_and_steep(loss_of_rank: dict[int, float]) -> list[Observation]:
    """Six trials at two rates: what the third rank is worth has not been tried."""
    points: list[Params] = [
        {"learning_rate": rate, "lora_r": rank} for rate in (1e-4, 2e-4) for rank in loss_of_rank
    ]
    return [
        Observation(slot, params, "completed", loss_of_rank[int(params["lora_r"])])
        for slot, params in enumerate(points)
    ]


def test_gain_is_nothing_where_all_losses_are_equal_and_more_the_further_they_lie_apart() -> None:
    rate = {"distribution": "log_uniform_values", "min": 1.0e-5, "max": 1.0e-3}
    definition = sweep_of("bayes", {"learning_rate": rate, "lora_r": {"values": [8, 16, 32]}})
    gains = [gain_of(definition, flat_and_steep({8: 1.0 + d, 16: 1.0})) for d in (0, 1e-3, 1e-1)]
    assert gains[0] == 0
    assert gains[1] is not None
    assert gains[2] == pytest.approx(100 * gains[1], rel=1e-4), "in nats: it goes with the losses"


def test_gain_is_not_known_without_two_losses_or_anything_learned_or_for_another_method() -> None:
    assert gain_of(CARD, []) is None
    assert gain_of(CARD, [observed(0, 1.2)]) is None
    assert gain_of(CARD, [observed(0, 1.2), observed(1, 1.1)]) is not None
    assert gain_of(CARD, [observed(slot, STEP0_LOSS) for slot in range(3)]) is None
    assert gain_of(CARD, [observed(slot, None, "diverged") for slot in range(3)]) is None
    by_chance = sweep_of("random", CARD.to_json()["parameters"])
    assert gain_of(by_chance, [observed(0, 1.2), observed(1, 1.1)]) is None
