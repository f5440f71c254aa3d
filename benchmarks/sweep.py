"""How far choosers of hyper-parameters are from the best point after 3 to 12 trials.

`python -m benchmarks.sweep [--choosers-python PATH]` prints tables: mean regret in milli-nats with
its 95 % interval and the worst sweep, for the built-in engine, random search and, where that
Python has them (see `benchmarks.sweep_peers`), Optuna, W&B's own engine and the job's first one.
All sides meet the same losses of real LoRA runs and the same noise (`benchmarks.lora_worlds`).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.lora_worlds import RANGES, World, worlds
from job.report.importance import explained_shares
from job.sweep.builtin import expected_gain, suggest
from job.sweep.definition import parse_definition
from job.sweep.observations import Observation

KINDS = ("two", "four", "six", "six, small ranks best")
AFTER = (3, 4, 6, 8, 12)
OURS = "built-in bayes"
PEERS = ("first engine", "Optuna GP", "Optuna TPE", "W&B bayes")
SETTINGS = {  # the job's defaults
    "learning_rate": 2e-4,
    "gradient_accumulation_steps": 4,
    "lora_dropout": 0.05,
    "weight_decay": 0.01,
    "lora_r": 8,
    "lora_alpha": 16,
}
MIN_GAIN = 0.001  # nats, JOB_MIN_GAIN
Sweep = dict[str, Any]  # world, seed, history [(point, loss or None)], seconds


def built_in(kind: str, seeds: int, trials: int, method: str) -> Iterator[Sweep]:
    """Run the job's engine through every world."""
    for world in worlds(kind):
        definition = parse_definition(world.definition | {"method": method})
        for seed in range(seeds):
            seen: list[Observation] = []
            started = time.process_time()
            for slot in range(trials):
                point = suggest(
                    definition,
                    slot=slot,
                    sweep=f"{world.name} {seed}",
                    observations=seen,
                    step0_loss=world.untuned_loss,
                    defaults=SETTINGS,
                )
                if point is None:
                    raise RuntimeError(f"{world.name}: no point is left")
                loss = world.observed(point, slot, seed)
                status = "diverged" if loss is None else "completed"
                seen.append(Observation(slot, point, status, loss))
            seconds = time.process_time() - started
            history = [(o.params, o.eval_loss) for o in seen]
            yield {"world": world.name, "seed": seed, "history": history, "seconds": seconds}


def of_peer(python: str, chooser: str, kind: str, seeds: int, trials: int) -> list[Sweep]:
    """Run another chooser through the same worlds, in its own environment."""
    command = [python, "-m", "benchmarks.sweep_peers", "--chooser", chooser, "--kind", kind]
    command += ["--seeds", str(seeds), "--trials", str(trials)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=3600)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def regrets(sweeps: Sequence[Sweep], by_name: Mapping[str, World]) -> np.ndarray[Any, Any]:
    """Regret (sweeps, trials) in milli-nats: what the best so far, as observed, is truly worse."""
    found = []
    for sweep in sweeps:
        world = by_name[sweep["world"]]
        best, regret = (math.inf, world.untuned_loss), []
        for point, loss in sweep["history"]:
            if loss is not None:
                best = min(best, (loss, world.loss(point)))
            regret.append(1000 * (best[1] - world.best_loss))
        found.append(regret)
    return np.array(found)


def table(kind: str, sides: Mapping[str, Sequence[Sweep]], by_name: Mapping[str, World]) -> str:
    """One line a side: mean ± half of the 95 % interval, worst, after some numbers of trials."""
    lines = [f"\n{kind}: regret in milli-nats, mean ± 95 % (worst), after … trials"]
    lines.append(f"{'':16}" + "".join(f"{n:>22}" for n in AFTER) + "   CPU s a sweep")
    for side, sweeps in sides.items():
        lost = regrets(sweeps, by_name)
        cells = []
        for n in AFTER:
            column = lost[:, n - 1]
            half = 1.96 * column.std(ddof=1) / math.sqrt(len(column))
            cells.append(f"{column.mean():8.2f} ± {half:4.2f} ({column.max():5.1f})")
        seconds = np.mean([sweep["seconds"] for sweep in sweeps])
        lines.append(f"{side:16}" + "".join(cells) + f"   {seconds:.2f}")
    return "\n".join(lines)


def by_range(sweeps: Sequence[Sweep], by_name: Mapping[str, World]) -> str:
    """The built-in engine's lines for each place of the best rate within the range."""
    lines = []
    for where in RANGES:
        part = [sweep for sweep in sweeps if sweep["world"].endswith(f", {where}")]
        lost = regrets(part, by_name)
        cells = (f"{n}: {lost[:, n - 1].mean():.2f} ({lost[:, n - 1].max():.1f})" for n in AFTER)
        lines.append(f"  best rate {where:12} " + "  ".join(cells))
    return "\n".join(lines)


def end_rule(sweeps: Sequence[Sweep], by_name: Mapping[str, World]) -> str:
    """What ending at two looks below `MIN_GAIN` saves and loses."""
    lost, trials = regrets(sweeps, by_name), []
    for sweep in sweeps:
        world = by_name[sweep["world"]]
        definition = parse_definition(world.definition)
        seen = [
            Observation(slot, point, "diverged" if loss is None else "completed", loss)
            for slot, (point, loss) in enumerate(sweep["history"])
        ]
        name = f"{sweep['world']} {sweep['seed']}"
        gains = {
            n: expected_gain(
                definition, sweep=name, observations=seen[:n], step0_loss=world.untuned_loss
            )
            for n in range(5, len(seen))
        }
        below = [n for n, gain in gains.items() if gain is not None and gain < MIN_GAIN]
        ends = (n for n in below if n - 1 in below)
        trials.append(next(ends, len(seen)))
    given_up = [row[n - 1] - row[-1] for row, n in zip(lost, trials, strict=True)]
    return (
        f"  end rule at {MIN_GAIN:g} nats: {np.mean(trials):.1f} of {lost.shape[1]} trials"
        f" ({min(trials)} to {max(trials)}), gives up {np.mean(given_up):.2f} milli-nats on"
        f" average, {max(given_up):.1f} at worst"
    )


def near_duplicates(sweeps: Sequence[Sweep]) -> str:
    """How many trials repeat an earlier point but for less than 5 % of the rate."""
    near = total = 0
    for sweep in sweeps:
        points = [point for point, _ in sweep["history"]]
        for index, point in enumerate(points):
            total += 1
            near += any(_is_near(point, earlier) for earlier in points[:index])
    return (
        f"  {near} of {total} trials lie within 5 % of the rate of an earlier one, all else equal"
    )


def _is_near(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    ratio = left["learning_rate"] / right["learning_rate"]
    return abs(math.log(ratio)) < math.log(1.05) and all(
        left[name] == right[name] for name in left if name != "learning_rate"
    )


def judges(sweeps: Sequence[Sweep], python: str, kind: str) -> str:
    """How often the report's judge of importance, and Optuna's, name the parameter that matters."""
    by_name = {world.name: world for world in worlds(kind)}
    told = "\n".join(json.dumps(sweep) for sweep in sweeps)
    command = [python, "-m", "benchmarks.sweep_peers", "--kind", kind]
    done = subprocess.run(
        command, input=told, check=True, capture_output=True, text=True, timeout=3600
    )
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for sweep in sweeps:
        known = [(point, loss) for point, loss in sweep["history"] if loss is not None]
        domains = parse_definition(by_name[sweep["world"]].definition).parameters
        shares = explained_shares(domains, [p for p, _ in known], [loss for _, loss in known])
        said.append({"judge": "the report's", "world": sweep["world"], "shares": shares})
    truth = {name: _true_shares(world) for name, world in by_name.items()}
    lines = [f"\n{kind}: who names the two parameters that matter most, after 12 trials"]
    for judge in dict.fromkeys(line["judge"] for line in said):
        judged = [line for line in said if line["judge"] == judge]
        hits = [len(_top(line["shares"]) & _top(truth[line["world"]])) / 2 for line in judged]
        first = [_first(line["shares"]) == _first(truth[line["world"]]) for line in judged]
        lines.append(
            f"  {judge:14} the first {np.mean(first):4.0%}, of the first two {np.mean(hits):4.0%}"
        )
    return "\n".join(lines)


def _first(shares: Mapping[str, float]) -> str:
    return max(shares, key=lambda name: shares[name])


def _top(shares: Mapping[str, float]) -> set[str]:
    return set(sorted(shares, key=lambda name: -shares[name])[:2])


def _true_shares(world: World) -> dict[str, float]:
    """The variance of each parameter's mean loss over the whole space, losses clipped as told."""
    domains = world.definition["parameters"]
    random = np.random.default_rng(0)
    points, losses = [], []
    for _ in range(4000):
        point = {}
        for name, spec in domains.items():
            if "values" in spec:
                point[name] = spec["values"][random.integers(len(spec["values"]))]
            else:
                low, high = math.log(spec["min"]), math.log(spec["max"])
                point[name] = math.exp(random.uniform(low, high))
        points.append(point)
        losses.append(min(world.loss(point), world.untuned_loss))
    values, found = np.array(losses), {}
    for name, spec in domains.items():
        if "values" in spec:
            groups = np.array([spec["values"].index(point[name]) for point in points])
        else:
            rates = np.log([point[name] for point in points])
            groups = np.digitize(rates, np.quantile(rates, np.linspace(0.05, 0.95, 19)))
        means = [values[groups == group].mean() for group in np.unique(groups)]
        found[name] = float(np.var(means))
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--choosers-python", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=12)
    given = parser.parse_args()
    for kind in KINDS:
        by_name = {world.name: world for world in worlds(kind)}
        size = (kind, given.seeds, given.trials)
        sides = {OURS: list(built_in(*size, "bayes")), "random": list(built_in(*size, "random"))}
        for peer in PEERS if given.choosers_python else ():
            sides[peer] = of_peer(given.choosers_python, peer, *size)
        print(table(kind, sides, by_name))
        print(f"{OURS}:")
        print(by_range(sides[OURS], by_name))
        print(end_rule(sides[OURS], by_name))
        print(near_duplicates(sides[OURS]), flush=True)
        if given.choosers_python and kind.startswith("six"):
            print(judges(sides[OURS], given.choosers_python, kind), flush=True)


if __name__ == "__main__":
    main()
