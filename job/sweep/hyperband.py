"""Decides as W&B's hyperband does whether a trial is stopped early, by how the others stood."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.sweep.mistakes import Complain, nearest_name, number_at, one_of

KEYS = ("type", "min_iter", "max_iter", "s", "eta", "strict")


@dataclass(frozen=True)
class Hyperband:
    """`early_terminate` of a sweep file: brackets from `min_iter` up, or from `max_iter` down."""

    min_iter: int | None = None
    max_iter: int | None = None
    s: int | None = None  # how many brackets below max_iter
    eta: float = 3.0  # brackets lie a factor of eta apart; the best 1/eta go on
    strict: bool = True  # the default that W&B's schema fills in; false judges a trial by its best


def parse_hyperband(spec: object, complain: Complain) -> Hyperband | None:
    """`early_terminate` by the rules of W&B's schema; None where there is none, or it is wrong."""
    if spec is None:
        return None
    if not isinstance(spec, Mapping) or spec.get("type") != "hyperband":
        complain("early_terminate", "must be a mapping with type: hyperband")
        return None
    if not _keys_are_right(spec, complain):
        return None
    sizes = {key: spec[key] for key in ("min_iter", "max_iter", "s") if key in spec}
    rule = Hyperband(**sizes, eta=float(spec.get("eta", 3)), strict=spec.get("strict", True))
    if rule.max_iter is not None and not brackets(rule, up_to=rule.max_iter):
        limit = f"max_iter {rule.max_iter} is below eta {rule.eta:g}"
        complain("early_terminate", f"{limit}, which leaves no bracket: raise max_iter")
    return rule


def _keys_are_right(spec: Mapping[Any, Any], complain: Complain) -> bool:
    wrong: list[tuple[str, str]] = []
    for key, value in spec.items():
        if key not in KEYS:
            wrong.append((key, f"is not a key{nearest_name(key, KEYS)}; {one_of(KEYS)}"))
        elif key in {"min_iter", "max_iter", "s"} and not (type(value) is int and value >= 1):
            wrong.append((key, f"is {value!r}; must be a whole number from 1"))
        elif key == "strict" and not isinstance(value, bool):
            wrong.append((key, f"is {value!r}; must be true or false"))
    eta = number_at("early_terminate.eta", spec.get("eta", 3), complain)
    if eta is not None and eta <= 1:
        wrong.append(("eta", f"is {eta}; must be above 1"))
    for key, text in wrong:
        complain(f"early_terminate.{key}", text)
    named = {"min_iter", "max_iter"} & set(spec)
    if not named or ("max_iter" in named and "s" not in spec):
        complain("early_terminate", "needs min_iter, or max_iter and s")
        return False
    return eta is not None and not wrong


def brackets(rule: Hyperband, *, up_to: int) -> list[int]:
    """The evaluations, counted from 1, at which trials are judged, none beyond `up_to`.

    `min_iter` 3, `eta` 3: 3, 9, 27, …. `max_iter` 27, `s` 2, `eta` 3: 3, 9.
    """
    found: list[int] = []
    if rule.max_iter is not None:  # W&B looks at min_iter only where there is no max_iter
        band = float(rule.max_iter)
        for _ in range(rule.s or 0):
            band /= rule.eta
            if band < 1:
                break
            found.append(int(band))
        return sorted(band for band in found if band <= up_to)
    assert rule.min_iter is not None
    band = float(rule.min_iter)
    while band <= up_to:
        found.append(int(band))
        band *= rule.eta
    return found


def is_hopeless(
    rule: Hyperband | None, history: Sequence[float], others: Sequence[Sequence[float]]
) -> bool:
    """Whether the trial with this history of eval/loss is among those W&B would stop now.

    `history` and each of `others` hold one loss per evaluation, in order; values that are not
    finite are left out, as W&B does. Judged at the last bracket that the trial has reached: its
    loss there (`strict`; else its best loss so far) against the loss that parts the best 1/eta
    of all trials which got that far, this one and finished ones included, from the rest.

    Source: `hyperband_stop_runs` in github.com/wandb/sweeps, src/sweeps/hyperband_stopping.py
    (b1dfc5f), after Li et al., "Hyperband", https://arxiv.org/abs/1603.06560.
    """
    own = _finite(history)
    reached = brackets(rule, up_to=len(own)) if rule is not None else []
    if rule is None or not reached:
        return False
    bracket = reached[-1]
    histories = [own, *(_finite(other) for other in others)]
    losses = sorted(losses[bracket - 1] for losses in histories if len(losses) >= bracket)
    threshold = losses[int(len(losses) / rule.eta)]
    return (own[bracket - 1] if rule.strict else min(own)) > threshold


def _finite(history: Sequence[float]) -> list[float]:
    return [loss for loss in history if math.isfinite(loss)]
