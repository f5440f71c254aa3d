"""Other choosers of hyper-parameters, as sides of `benchmarks.sweep`; prints JSON lines.

Runs in an environment of its own, never a dependency of the job, and imports nothing of it:

    python -m venv build/choosers && build/choosers/bin/pip install optuna==5.0.0 sweeps==0.3.0 \\
        scikit-learn torch==2.13.0
    make bench-sweep CHOOSERS_PYTHON=build/choosers/bin/python
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial
from sweeps import SweepRun, next_run

from benchmarks.lora_worlds import World, worlds

Point = dict[str, Any]
Chooser = Callable[[World, int, list[tuple[Point, float | None]]], Point]


def optuna_sampler(make: Callable[[int], Any]) -> Chooser:
    """Optuna as its pages show it: raw losses, a diverged trial told as no better than none."""

    def choose(world: World, seed: int, history: list[tuple[Point, float | None]]) -> Point:
        axes = _axes(world)
        study = optuna.create_study(sampler=make(1000 * seed + len(history)))
        for point, loss in history:
            value = world.untuned_loss if loss is None else loss
            study.add_trial(create_trial(params=point, distributions=axes, value=value))
        return dict(study.ask(axes).params)

    return choose


def first_engine(world: World, seed: int, history: list[tuple[Point, float | None]]) -> Point:
    """The job's engine before it had its own process: a ladder at rank 8, then Optuna's GP."""
    axes = _axes(world)
    rate = axes["learning_rate"]
    ladder = [rate.high / part for part in (3, 1, 9) if rate.high / part >= rate.low]
    if len(history) < len(ladder):
        usual = {"lora_r": 4, "lora_alpha": 16, "gradient_accumulation_steps": 4}
        usual |= {"lora_dropout": 0.05, "weight_decay": 0.01}
        return {"learning_rate": ladder[len(history)]} | {
            name: usual[name] for name in axes if name != "learning_rate"
        }
    clipped = [
        (point, world.untuned_loss if loss is None else min(loss, world.untuned_loss))
        for point, loss in history
    ]
    if len(history) == len(ladder):
        sampler: Any = optuna.samplers.RandomSampler(seed)
    else:
        sampler = optuna.samplers.GPSampler(seed=seed + len(history), n_startup_trials=1)
    study = optuna.create_study(sampler=sampler)
    for point, loss in clipped:
        study.add_trial(create_trial(params=point, distributions=axes, value=loss))
    return dict(study.ask(axes).params)


def wandb_bayes(world: World, seed: int, history: list[tuple[Point, float | None]]) -> Point:
    """W&B's own engine, `method: bayes`, as its server runs it; its draws take numpy's seed."""
    import numpy as np

    np.random.seed(1000 * seed + len(history))  # the package takes no other seed
    runs = [
        SweepRun(
            name=str(index),
            state="finished" if loss is not None else "failed",
            config={name: {"value": value} for name, value in point.items()},
            summaryMetrics={} if loss is None else {"eval/loss": loss},
            history=[] if loss is None else [{"eval/loss": loss}],
        )
        for index, (point, loss) in enumerate(history)
    ]
    found = next_run(world.definition, runs)
    return {name: spec["value"] for name, spec in found.config.items()}


CHOOSERS: dict[str, Chooser] = {
    "first engine": first_engine,
    "Optuna GP": optuna_sampler(lambda seed: optuna.samplers.GPSampler(seed=seed)),
    "Optuna TPE": optuna_sampler(lambda seed: optuna.samplers.TPESampler(seed=seed)),
    "W&B bayes": wandb_bayes,
}


def _axes(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, spec in world.definition["parameters"].items():
        if "values" in spec:
            found[name] = optuna.distributions.CategoricalDistribution(spec["values"])
        else:
            low, high = spec["min"], spec["max"]
            found[name] = optuna.distributions.FloatDistribution(low, high, log=True)
    return found


def sweeps_of(chooser: Chooser, kind: str, seeds: int, trials: int) -> Iterator[dict[str, Any]]:
    """Run the chooser through every world: the points, what they lost, and CPU seconds."""
    for world in worlds(kind):
        for seed in range(seeds):
            history: list[tuple[Point, float | None]] = []
            started = time.process_time()
            for trial in range(trials):
                point = chooser(world, seed, history)
                history.append((point, world.observed(point, trial, seed)))
            seconds = time.process_time() - started
            yield {"world": world.name, "seed": seed, "history": history, "seconds": seconds}


def importances(histories: list[dict[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    """What Optuna's judges say of the same trials: the share of each parameter."""
    judges = {
        "fANOVA": optuna.importance.FanovaImportanceEvaluator(seed=0),
        "PED-ANOVA": optuna.importance.PedAnovaImportanceEvaluator(),
    }
    by_name = {world.name: world for world in worlds(kind)}
    for sweep in histories:
        world = by_name[sweep["world"]]
        study, axes = optuna.create_study(), _axes(world)
        for point, loss in sweep["history"]:
            if loss is not None:
                study.add_trial(create_trial(params=point, distributions=axes, value=loss))
        if sum(t.state == TrialState.COMPLETE for t in study.trials) < 4:
            continue
        for name, judge in judges.items():
            shares = optuna.importance.get_param_importances(study, evaluator=judge)
            yield {"judge": name, "world": sweep["world"], "seed": sweep["seed"], "shares": shares}


def main() -> None:
    """Print one JSON line a sweep, or, given histories on stdin, one a judged sweep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", default="two")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--chooser", choices=list(CHOOSERS))
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    if arguments.chooser is None:
        found = importances([json.loads(line) for line in sys.stdin], arguments.kind)
    else:
        chooser = CHOOSERS[arguments.chooser]
        found = sweeps_of(chooser, arguments.kind, arguments.seeds, arguments.trials)
    for line in found:
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
