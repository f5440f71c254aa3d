"""The W&B server's sweeps, runs, artifacts and uploads. Part of tests/servers/wandb.py."""

from __future__ import annotations

import base64
import json
import math
import random
from dataclasses import dataclass, field
from typing import Any

import yaml

ENTITY, PROJECT = "team", "qlora"


@dataclass
class Run:
    """A run, as the web page would show it."""

    name: str  # its id
    project: str
    entity: str
    sweep: str | None = None
    group: str | None = None
    display_name: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    state: str = "running"  # running, finished, failed
    exit_code: int | None = None
    asked_to_stop: bool = False
    starts: int = 0  # how often a client opened it

    @property
    def params(self) -> dict[str, Any]:
        """The config without what W&B puts there."""
        return {k: v["value"] for k, v in self.config.items() if not k.startswith("_")}

    @property
    def steps(self) -> list[int]:
        return [row["_step"] for row in self.rows]


@dataclass
class Sweep:
    """A sweep; `offer` gives its next run."""

    name: str
    project: str
    entity: str
    config: dict[str, Any]
    state: str = "RUNNING"
    num_drawn: int = 0
    agents: list[str] = field(default_factory=list)


@dataclass
class State:
    """All that the server knows; ids count up, so that a test can name them."""

    api_keys: list[str] = field(default_factory=list)  # empty: any
    entities: list[str] = field(default_factory=lambda: [ENTITY])
    runs: dict[str, Run] = field(default_factory=dict)
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    agents: dict[str, Sweep] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)  # run ids that are refused; *: of new runs
    told_to_stop: set[str] = field(default_factory=set)

    def authorised(self, header: str) -> bool:
        if not self.api_keys:
            return True
        user, _, key = base64.b64decode(header.removeprefix("Basic ")).decode().partition(":")
        return user == "api" and key in self.api_keys

    def add_sweep(self, config: dict[str, Any] | str, name: str | None = None) -> Sweep:
        if isinstance(config, str):
            config = yaml.safe_load(config)
        assert isinstance(config, dict)
        name = name or f"sweep{len(self.sweeps):03d}"
        self.sweeps[name] = Sweep(name, PROJECT, ENTITY, config)
        return self.sweeps[name]

    def offer(self, sweep: Sweep) -> dict[str, Any] | None:
        """The next run of the sweep as a command to an agent; None if it has no more."""
        cap = sweep.config.get("run_cap")
        if cap is not None and sweep.num_drawn >= cap:
            return None
        source = random.Random(f"{sweep.name}{sweep.num_drawn}")
        params = {n: _draw(spec, source) for n, spec in sweep.config["parameters"].items()}
        run_id = f"{sweep.name}-{sweep.num_drawn}"
        sweep.num_drawn += 1
        self.runs[run_id] = Run(run_id, sweep.project, sweep.entity, sweep.name, state="pending")
        args = {name: {"value": value} for name, value in params.items()}
        return {"type": "run", "run_id": run_id, "args": args}


def _draw(spec: dict[str, Any], source: random.Random) -> Any:
    if "value" in spec:
        return spec["value"]
    if "values" in spec:
        return source.choice(spec["values"])
    if spec.get("distribution") == "log_uniform_values":
        low, high = math.log(spec["min"]), math.log(spec["max"])
        return math.exp(source.uniform(low, high))
    return source.uniform(spec["min"], spec["max"])


def merge_json(old: dict[str, Any], text: str | None) -> dict[str, Any]:
    return {**old, **json.loads(text)} if text else old
