"""Made-up sweeps whose losses come from real LoRA runs: the objective of `benchmarks.sweep`.

benchmarks/data/README.md says whose runs. A model's losses are interpolated along the log of the
learning rate, for each rank apart, and go on as parabolas outside of the rates that were run.
Imports numpy and scipy only, so that every side of the benchmark can run it.
"""

from __future__ import annotations

import csv
import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator

TABLE = Path(__file__).parent / "data" / "lora_runs.csv"
NOISE_SD = 5e-4  # nats, between two trials of one point; the table's own repeats differ by 1e-4
FAILS_ABOVE = 0.5  # nats above the untuned loss: such a trial is told as diverged

RANGES = {  # where the best learning rate lies: all are near 3e-4 to 1e-3
    "inside": (3e-5, 3e-3),
    "at the edge": (5e-6, 2e-4),
    "far inside": (1e-6, 1e-2),
}
RANKS = [4, 16, 64, 128]
CARD = {  # what the table does not vary: small effects, made up
    "gradient_accumulation_steps": [4, 8],
    "lora_dropout": [0.05, 0.1],
    "weight_decay": [0.01, 0.05],
}


@dataclass(frozen=True)
class World:
    """One sweep to run: its file and its loss."""

    name: str
    definition: dict[str, Any]
    untuned_loss: float  # nats a token
    loss: Callable[[Mapping[str, Any]], float]  # of a point, without noise
    best_loss: float

    def observed(self, params: Mapping[str, Any], trial: int, seed: int) -> float | None:
        """The loss that a trial ends with; None for one that diverged."""
        clean = self.loss(params)
        if clean > self.untuned_loss + FAILS_ABOVE:
            return None
        return clean + random.Random(f"{self.name} {seed} {trial}").gauss(0, NOISE_SD)


def models() -> dict[str, dict[int, dict[float, float]]]:
    """The table: model, rank, learning rate, loss."""
    found: dict[str, dict[int, dict[float, float]]] = {}
    with TABLE.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            ranks = found.setdefault(row["model"], {})
            ranks.setdefault(int(row["lora_r"]), {})[float(row["learning_rate"])] = float(
                row["test_nll"]
            )
    return found


def worlds(kind: str) -> list[World]:
    """The sweeps of a kind: `two` parameters (rate, rank), the card's `four`, or `six`.

    In `six, small ranks best` the losses of the ranks change places: the highest has the lowest's.
    """
    return [
        _world(model, runs, kind, where) for model, runs in models().items() for where in RANGES
    ]


def _world(model: str, runs: dict[int, dict[float, float]], kind: str, where: str) -> World:
    low, high = RANGES[where]
    rate = {"distribution": "log_uniform_values", "min": low, "max": high}
    listed = {} if kind == "two" else dict(CARD)
    listed |= {} if kind == "four" else {"lora_r": RANKS}
    listed |= {"lora_alpha": [16, 32]} if kind.startswith("six") else {}
    parameters = {"learning_rate": rate} | {name: {"values": v} for name, v in listed.items()}
    curves = {rank: _curve(runs[rank]) for rank in runs}
    if kind == "six, small ranks best":
        curves = dict(zip(curves, reversed(curves.values()), strict=True))

    def loss(params: Mapping[str, Any]) -> float:
        at = math.log10(params["learning_rate"])
        at += 0.3 * math.log2(params.get("lora_alpha", 32) / 32)  # half the alpha, twice the rate
        steps = params.get("gradient_accumulation_steps", 4)
        at -= 0.1 * (steps == 8)
        found = curves[params.get("lora_r", 16)](at) + 1e-3 * (steps == 8)
        found += 5e-4 * (params.get("lora_dropout") == 0.1)
        return found + 2e-4 * (params.get("weight_decay") == 0.01)

    rates = np.geomspace(low, high, 300).tolist()
    best = min(
        loss(dict(zip(listed, values, strict=True)) | {"learning_rate": value})
        for values in itertools.product(*listed.values())
        for value in rates
    )
    metric = {"name": "eval/loss", "goal": "minimize"}
    return World(
        name=f"{model}, {where}",
        definition={"method": "bayes", "metric": metric, "parameters": parameters},
        untuned_loss=max(max(losses.values()) for losses in runs.values()) + 0.1,
        loss=loss,
        best_loss=best,
    )


def _curve(losses: Mapping[float, float]) -> Callable[[float], float]:
    rates = sorted(losses)
    at = [math.log10(rate) for rate in rates]
    inside = PchipInterpolator(at, [losses[rate] for rate in rates])
    slope = inside.derivative()

    def curve(x: float) -> float:
        if x < at[0]:  # ever slower towards no training at all
            return float(inside(at[0]) + min(0.03 * (at[0] - x), 0.1))
        if x > at[-1]:  # ever faster towards divergence
            beyond = x - at[-1]
            return float(inside(at[-1]) + max(float(slope(at[-1])), 0) * beyond + 0.3 * beyond**2)
        return float(inside(x))

    return curve
