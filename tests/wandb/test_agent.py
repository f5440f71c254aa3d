"""Drawing from a W&B sweep: what each state and fault of the server ends in.

The real client against a local server. `pytest tests/wandb/test_agent.py`
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.servers.wandb import Fault, WandbServer, wandb_server
from tests.servers.wandb_state import ENTITY
from tests.wandb.workers import SWEEP, Workers

pytestmark = pytest.mark.slow

AT_ONCE = 4  # cases; most of a case is waiting


@dataclass
class Case:
    """One attempt at an empty slot, and how it has to end."""

    name: str
    code: int
    says: str
    prepare: Callable[[WandbServer], None] = lambda server: None
    sweep: str = "team/qlora/abc"
    environ: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)  # on the server afterwards: id to state


def _faults(*faults: Fault) -> Callable[[WandbServer], None]:
    return lambda server: server.faults.extend(faults)


def _state(state: str) -> Callable[[WandbServer], None]:
    return lambda server: setattr(server.state.sweeps["abc"], "state", state)


def _config(**changes: Any) -> Callable[[WandbServer], None]:
    return lambda server: server.state.sweeps["abc"].config.update(changes)


def _resume_later(server: WandbServer) -> None:
    """The sweep is paused until it was asked for twice."""
    sweep = server.state.sweeps["abc"]
    sweep.state = "PAUSED"

    def look(request: str) -> None:
        if request == "GetSweep" and len(server.named("GetSweep")) >= 2:
            sweep.state = "RUNNING"

    server.on_request = look


def _delete_later(server: WandbServer) -> None:
    """The sweep is deleted between our look at it and the agent's question."""

    def look(request: str) -> None:
        if request == "Heartbeat":
            server.state.sweeps.pop("abc", None)

    server.on_request = look


def _offer_too_much(server: WandbServer) -> None:
    """The sweep's definition reads as before, but the run's parameters do not belong to it."""
    sweep = server.state.sweeps["abc"]

    def look(request: str) -> None:
        if request == "Heartbeat":
            sweep.config["parameters"]["learning_rate"] = {"value": 0.5}

    server.on_request = look


def _no_more(server: WandbServer) -> None:
    server.state.sweeps["abc"].config["run_cap"] = 1
    server.state.sweeps["abc"].num_drawn = 1


def _other_key(server: WandbServer) -> None:
    server.state.api_keys = ["f" * 40]


ONE = {"abc-0": "finished"}
DOWN = 0.05  # JOB_OUTAGE_MINUTES: 3 s
LONGER = {"outage_minutes": 0.5}
CASES = [
    Case("a sweep that runs", 0, "slot 0 committed: completed", runs=ONE),
    Case("its id alone", 0, "slot 0 committed: completed", sweep="abc", runs=ONE),
    Case("500 three times", 0, "committed", _faults(Fault("status", times=3)), runs=ONE,
         settings=LONGER),
    Case("429 three times", 0, "committed", _faults(Fault("status", times=3, status=429)),
         runs=ONE, settings=LONGER),
    Case("resets", 0, "committed", _faults(Fault("reset", "Sweep", 1), Fault("reset", "Agent", 1)),
         runs=ONE, settings=LONGER),
    Case("500 for ever", 74, "W&B failed while reading sweep", _faults(Fault("status")),
         settings={"outage_minutes": DOWN}),
    Case("stall", 74, "W&B failed while reading sweep", _faults(Fault("stall")),
         settings={"outage_minutes": DOWN}),
    Case("refused", 74, "W&B failed while reading sweep", WandbServer.refuse,
         settings={"outage_minutes": DOWN}),
    Case("agents fail", 74, "W&B", _faults(Fault("status", "CreateAgent")),
         settings={"outage_minutes": DOWN}),
    Case("heartbeats fail", 74, "no trial from sweep team/qlora/abc in",
         _faults(Fault("status", "Heartbeat")), settings={"outage_minutes": DOWN}),
    Case("the run cannot be opened", 74, "drawing from sweep",
         _faults(Fault("status", "UpsertBucket")), settings={"outage_minutes": 0.2}),
    Case("bad key", 77, "WANDB_API_KEY: W&B refused it", _other_key),
    Case("short key", 77, "WANDB_API_KEY", environ={"WANDB_API_KEY": "short"}),
    Case("key with blanks", 77, "WANDB_API_KEY",
         environ={"WANDB_API_KEY": "k" * 30 + " " + "k" * 30}),
    Case("key ends with a newline", 77, "WANDB_API_KEY",
         environ={"WANDB_API_KEY": "k" * 40 + "\n"}),
    Case("key with other signs", 77, "API key may only contain",
         environ={"WANDB_API_KEY": "k" * 40 + "!"}),
    Case("403 from the server", 77, "WANDB_API_KEY: W&B refused it",
         _faults(Fault("status", status=403)), settings=LONGER),
    Case("a timeout with a unit", 64, "W&B's client refuses what it is given",
         environ={"WANDB_FINISH_TIMEOUT": "30s", "WANDB_INIT_TIMEOUT": "30s"}, settings=LONGER),
    Case("an address without a scheme", 64, "W&B's client refuses what it is given",
         environ={"WANDB_BASE_URL": "wandb.example"}, settings=LONGER),
    Case("no key", 64, "WANDB_API_KEY: not set", environ={"WANDB_API_KEY": ""}),
    Case("offline", 64, "WANDB_MODE: is offline", environ={"WANDB_MODE": "offline"}),
    Case("no such sweep", 64, "W&B has no sweep team/qlora/nope", sweep="team/qlora/nope"),
    Case("wrong entity", 64, "W&B has no sweep other/qlora/abc", sweep="other/qlora/abc"),
    Case("not a path", 64, "WANDB_SWEEP_ID: is 'a/b/c/d'", sweep="a/b/c/d"),
    Case("deleted meanwhile", 64, "W&B has no sweep", _delete_later, settings=LONGER),
    Case("paused for long", 75, "is paused, for", _state("PAUSED"),
         settings={"outage_minutes": 0.01}),
    Case("paused, then resumed", 0, "committed", _resume_later, runs=ONE,
         settings={"outage_minutes": DOWN}),
    Case("finished", 0, "never drawn, the W&B sweep gives no more trials", _state("FINISHED")),
    Case("cancelled", 0, "never drawn, the W&B sweep gives no more trials", _state("CANCELED")),
    Case("run_cap reached", 0, "never drawn", _no_more, settings=LONGER),
    Case("maximises", 64, "metric.goal", _config(metric={"name": "eval/loss", "goal": "maximize"})),
    Case("another metric", 64, "metric.name", _config(metric={"name": "loss", "goal": "minimize"})),
    Case("unknown parameter", 64, "not a hyper-parameter of this job; nearest: learning_rate",
         _config(parameters={"learning_rte": {"min": 0.1, "max": 0.2}})),
    Case("offers what it may not", 64, "learning_rate is 0.5", _offer_too_much,
         runs={"abc-0": "failed"}),
    Case("matrices in another order, with blanks", 0, "committed", _config(parameters={
        **SWEEP["parameters"], "quantization": {"values": ["mixed: down_proj, v_proj"]}}),
         runs=ONE),
    Case("a name with blanks, program, command", 0, "committed", _config(
        name="My first sweep", program="train.py", command=["${env}"]), runs=ONE),
]  # fmt: skip


def _play(case: Case, folder: Path, workers: Workers) -> tuple[int, str, WandbServer]:
    with wandb_server() as server:
        server.state.add_sweep(copy.deepcopy(SWEEP), "abc")
        server.state.entities.append("other")
        case.prepare(server)
        attempt = workers.start(
            case.name,
            sweep=case.sweep,
            environ={"WANDB_BASE_URL": server.url, "WANDB_ENTITY": ENTITY, **case.environ},
            **case.settings,
        )
        code = attempt.wait(300)
        return code, attempt.last_words, server


@pytest.fixture(scope="module")
def played(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, tuple[int, str, WandbServer]]]:
    """Play every case, `AT_ONCE` at a time."""
    folder = tmp_path_factory.mktemp("sweep")
    with wandb_server() as server, ThreadPoolExecutor(AT_ONCE) as pool:
        workers = Workers(server, folder)
        futures = {case.name: pool.submit(_play, case, folder, workers) for case in CASES}
        yield {name: future.result() for name, future in futures.items()}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_slot_is_drawn_or_ends_with_the_right_code(
    played: dict[str, tuple[int, str, WandbServer]], case: Case
) -> None:
    code, line, server = played[case.name]
    assert code == case.code, line
    assert case.says in line
    ended = {run.name: run.state for run in server.state.runs.values()}
    if case.name != "the run cannot be opened":  # it stays as W&B's scheduler made it
        assert ended == case.runs
    for run in server.state.runs.values():
        assert run.steps == (list(range(1, 17)) if run.state == "finished" else [])


def test_the_table_of_cases(
    played: dict[str, tuple[int, str, WandbServer]], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"  {'case':38} {'exit':4} {'requests':8} {'faults':6} runs on the server"]
    for name, (code, _, server) in played.items():
        runs = ", ".join(f"{r.name} {r.state}" for r in server.state.runs.values()) or "none"
        rows.append(
            f"  {name:38} {code:4} {len(server.requests):8} {len(server.injected):6} {runs}"
        )
    with capsys.disabled():
        print("\n" + "\n".join(rows))
    assert len(rows) == len(CASES) + 1
