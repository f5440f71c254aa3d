"""A W&B sweep file, read and checked: what to search, how, and when to stop a trial early."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import yaml

from job.errors import SweepError
from job.sweep.distributions import Choice, Distribution, FloatRange, IntRange
from job.sweep.hyperband import Hyperband, parse_hyperband
from job.sweep.hyperparameters import HYPERPARAMETERS
from job.sweep.mistakes import Complain, nearest_name, one_of
from job.sweep.parameters import parse_parameter

Method: TypeAlias = Literal["bayes", "random", "grid"]
METHODS: tuple[Method, ...] = ("bayes", "random", "grid")
METRIC = "eval/loss"

# Top-level keys of W&B's schema (config/schema.json in github.com/wandb/sweeps). The ignored ones
# say how W&B would start a trial; here the container does.
READ_KEYS = ("name", "method", "metric", "parameters", "early_terminate", "run_cap")
IGNORED_KEYS = (
    *("apiVersion", "kind", "description", "program", "command", "project", "entity"),
    *("controller", "job", "image_uri"),
)
METRIC_KEYS = ("name", "goal", "impute", "impute_while_running")  # impute*: for W&B's engine

# The name becomes a folder in the bucket and on disk.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class SweepDefinition:
    """A sweep file's content; two are equal when they search the same, whatever their layout."""

    name: str | None  # None: the file has none, and JOB_SWEEP_NAME or W&B's id must say it
    method: Method
    parameters: Mapping[str, Distribution]  # in the order of the file
    early_terminate: Hyperband | None
    run_cap: int | None  # at most this many trials
    metric_name: str = METRIC
    metric_goal: str = "minimize"
    source: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The mapping of the file, for the bucket; `parse_definition` reads it back as equal."""
        return copy.deepcopy(dict(self.source))


def load_definition(path: Path | str, *, free_name: bool = False) -> SweepDefinition:
    """Read a sweep file; a SweepError names every mistake in it, one a line.

    With `free_name` its name may be any text, since it names no folder.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        twice = _keys_twice(yaml.compose(text, Loader=yaml.SafeLoader))
        mapping = yaml.safe_load(text)
    except OSError as error:
        raise SweepError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SweepError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    return parse_definition(mapping, where=str(path), mistakes=twice, free_name=free_name)


def parse_definition(
    mapping: object,
    *,
    where: str = "sweep definition",
    mistakes: tuple[str, ...] = (),
    free_name: bool = False,
) -> SweepDefinition:
    """Check a sweep file's content; `where` names it in the SweepError that lists every mistake.

    With `free_name` its name may be any text: it names no folder, or has been accepted before.
    `mistakes` are those that the caller has found already, as `key: text`.
    """
    lines = [f"{where}: {mistake}" for mistake in mistakes]
    if not isinstance(mapping, Mapping):
        raise SweepError(f"{where}: must be a mapping with method, metric and parameters")

    def complain(key: str, text: str) -> None:
        lines.append(f"{where}: {key}: {text}")

    _check_top_level(mapping, complain)
    method = _method(mapping, complain)
    _check_metric(mapping, method, complain)
    parameters = _parameters(mapping, method, complain)
    early_terminate = parse_hyperband(mapping.get("early_terminate"), complain)
    name = _name(mapping, complain, is_free=free_name)
    run_cap = _run_cap(mapping, complain)
    if not lines:
        _check_json(mapping, complain)
    if lines:
        raise SweepError("\n".join(lines))
    assert method is not None
    return SweepDefinition(
        name=name,
        method=method,
        parameters=MappingProxyType(parameters),
        early_terminate=early_terminate,
        run_cap=run_cap,
        source=copy.deepcopy(dict(mapping)),
    )


def _keys_twice(root: yaml.Node | None) -> tuple[str, ...]:
    """Keys that stand twice in one mapping: YAML forbids them, PyYAML silently keeps the last."""
    found: list[str] = []
    seen: set[int] = set()
    waiting = [] if root is None else [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)
        if not isinstance(node, yaml.MappingNode):
            continue
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and keys.count(key.value) > 1:
                found.append(f"{key.value}: stands twice, on line {key.start_mark.line + 1} too")
        waiting.extend(value for _, value in node.value)
    return tuple(found)


def _check_top_level(mapping: Mapping[Any, Any], complain: Complain) -> None:
    for key in mapping:
        if key in {"metrics", "scheduler"}:
            complain(key, f"is not supported: the metric is {METRIC}, the engine W&B's or built in")
        elif key not in (*READ_KEYS, *IGNORED_KEYS):
            complain(str(key), f"is not a key{nearest_name(key, READ_KEYS)}; {one_of(READ_KEYS)}")


def _check_json(mapping: Mapping[Any, Any], complain: Complain) -> None:
    """Complain of what JSON cannot hold: ignored keys, too, may have a date or a NaN."""
    for key, value in mapping.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            complain(key, f"cannot be kept as JSON in the bucket: {error}")


def _name(mapping: Mapping[str, Any], complain: Complain, *, is_free: bool) -> str | None:
    name = mapping.get("name")
    if name is None or (isinstance(name, str) and (is_free or _NAME.fullmatch(name))):
        return name
    allowed = "allowed: letters, digits, . _ -, at most 64, first a letter or digit"
    way_out = "a number needs quotes; or set JOB_SWEEP_NAME, and it may be any text"
    complain("name", f"{name!r} names a folder; {allowed}; {way_out}")
    return None


def _run_cap(mapping: Mapping[str, Any], complain: Complain) -> int | None:
    run_cap = mapping.get("run_cap")
    if run_cap is None or (type(run_cap) is int and run_cap > 0):
        return run_cap
    complain("run_cap", f"is {run_cap!r}; must be a whole number above 0")
    return None


def _method(mapping: Mapping[str, Any], complain: Complain) -> Method | None:
    given = mapping.get("method")
    for method in METHODS:
        if given == method:
            return method
    if "method" not in mapping:
        complain("method", f"is missing; {one_of(METHODS)}")
    else:
        complain("method", f"is {given!r}{nearest_name(given, METHODS)}; {one_of(METHODS)}")
    return None


def _check_metric(mapping: Mapping[str, Any], method: Method | None, complain: Complain) -> None:
    metric = mapping.get("metric")
    if metric is None and method != "bayes" and "early_terminate" not in mapping:
        return  # W&B too asks for it only where it is used
    if not isinstance(metric, Mapping):
        complain("metric", f"must be a mapping: name: {METRIC}, goal: minimize")
        return
    for key in metric:
        if key == "target":
            complain("metric.target", "is not supported: set run_cap or JOB_NUM_TRIALS")
        elif key not in METRIC_KEYS:
            near = nearest_name(key, METRIC_KEYS)
            complain(f"metric.{key}", f"is not a key{near}; {one_of(METRIC_KEYS)}")
    if metric.get("name") != METRIC:
        complain("metric.name", f"is {metric.get('name')!r}; must be {METRIC}")
    if metric.get("goal", "minimize") != "minimize":
        complain("metric.goal", f"is {metric['goal']!r}; must be minimize")


def _parameters(
    mapping: Mapping[str, Any], method: Method | None, complain: Complain
) -> dict[str, Distribution]:
    given = mapping.get("parameters")
    if not isinstance(given, Mapping) or not given:
        complain("parameters", "must be a mapping of at least one hyper-parameter to its values")
        return {}
    names = tuple(HYPERPARAMETERS)
    parsed: dict[str, Distribution] = {}
    for name, spec in flatten(given, complain).items():
        key = f"parameters.{name}"
        if name not in HYPERPARAMETERS:
            near = nearest_name(name.rpartition(".")[2], names)
            nested = "nested under another; " if "." in name else ""
            complain(key, f"is {nested}not a hyper-parameter of this job{near}; {one_of(names)}")
        domain = parse_parameter(
            key, spec, hyperparameter=HYPERPARAMETERS.get(name), complain=complain
        )
        if domain is not None:
            parsed[name] = domain
        if method == "grid" and domain is not None and not _fits_grid(domain):
            complain(key, "a grid needs countable values: value, values, int_uniform or q_uniform")
    return parsed


def flatten(given: Mapping[Any, Any], complain: Complain, prefix: str = "") -> dict[str, Any]:
    """Name nested parameters as W&B does: `{a: {parameters: {b: …}}}` becomes `{a.b: …}`."""
    flat: dict[str, Any] = {}
    for key, spec in given.items():
        name = f"{prefix}{key}"
        inner = spec.get("parameters") if isinstance(spec, Mapping) else None
        if inner is None:
            flat[name] = spec
        elif not isinstance(inner, Mapping) or not inner or len(spec) > 1:
            complain(f"parameters.{name}", "parameters must be a mapping, and the only key here")
        elif name.count(".") > 8:
            complain(f"parameters.{name}", "is nested more than 8 deep")
        else:
            flat |= flatten(inner, complain, prefix=f"{name}.")
    return flat


def _fits_grid(domain: Distribution) -> bool:
    """Whether W&B's grid takes the domain: no range of floats, no log scale, no probabilities."""
    return not (
        isinstance(domain, FloatRange)
        or (isinstance(domain, IntRange) and domain.log)
        or (isinstance(domain, Choice) and domain.probabilities is not None)
    )
