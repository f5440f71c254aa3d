"""A stop from the W&B server, at any moment: the best adapter so far is committed, one run stands.

The real client against a local server. `pytest tests/wandb/test_stop.py`
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers.wandb import WandbServer, wandb_server
from tests.servers.wandb_state import Run
from tests.wandb.workers import LONG, SWEEP, Attempt, Workers, eventually

pytestmark = pytest.mark.slow

CALM = {"checkpoint_minutes": 5}  # no background checkpoint


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with wandb_server() as server:
        yield server


@pytest.fixture(scope="module")
def workers(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> Workers:
    return Workers(server, tmp_path_factory.mktemp("stop"))


def _start(workers: Workers, case: str, hold: str = "", **settings: Any) -> Attempt:
    if case not in workers.server.state.sweeps:
        workers.server.state.add_sweep(copy.deepcopy(SWEEP), case)
    # Thousands of rows are on their way when the stop comes, on a machine that does other work too.
    environ = {"WANDB_FINISH_TIMEOUT": "20"} | ({"HOLD": hold} if hold else {})
    return workers.start(
        case, sweep=f"team/qlora/{case}", environ=environ, num_trials=1, **settings
    )


def _stop(server: WandbServer, case: str) -> None:
    """Stop the run as early_terminate and the page's button do."""
    server.run(f"{case}-0").asked_to_stop = True


def _stop_while_held(workers: Workers, server: WandbServer, case: str, attempt: Attempt) -> None:
    """Stop the run while its upload is held back, and let that go once the agent has been told."""
    eventually(lambda: "held:" in attempt.log)
    _stop(server, case)
    # The agent told its function, which has returned: the agent ended the run.
    server.wait_until(lambda state: state.runs[f"{case}-0"].state == "finished", 20)
    (workers.out(case) / "go").touch()


def _check(workers: Workers, case: str, attempt: Attempt, status: str) -> dict[str, Any]:
    """Check one commit, and that the one run on the server says the same as the bucket."""
    assert attempt.wait() == 0, attempt.log
    result = workers.document(case, "slots/0000/result.json")
    assert result is not None
    assert result["status"] == status, attempt.log
    runs: list[Run] = [run for run in workers.server.state.runs.values() if run.sweep == case]
    (run,) = runs
    assert workers.server.state.sweeps[case].num_drawn == 1, "no second run was fetched"
    assert (run.state, run.exit_code) == ("finished", 0)
    assert run.steps == list(range(1, result["steps"] + 1)), "no hole, no step twice"
    assert run.summary["eval/loss"] == result["eval_loss"]
    curve = [[row["_step"], row["eval/loss"]] for row in run.rows if "eval/loss" in row]
    assert curve == result["curve"]
    assert workers.document(case, "slots/0000/mirror.json") is not None, attempt.log
    adapter: Path = workers.out(case) / result["adapter_key"]
    assert (adapter / "adapter_model.safetensors").exists()
    return result


@pytest.mark.parametrize(("case", "evals"), [("before-eval", 1), ("between-evals", 400)])
def test_a_stop_in_training_ends_with_a_last_evaluation(
    workers: Workers, server: WandbServer, case: str, evals: int
) -> None:
    attempt = _start(workers, case, max_steps=LONG, num_epochs=9999, evals_per_trial=evals, **CALM)
    eventually(lambda: "W&B: http" in attempt.log)
    _stop(server, case)
    result = _check(workers, case, attempt, "stopped")
    assert result["reason"] == "stopped on W&B"
    assert 0 < result["steps"] < LONG
    assert result["curve"][-1][0] == result["steps"], "evaluated where it ended"
    assert len(result["curve"]) == 1 or evals > 1


def test_a_stop_while_a_checkpoint_is_uploaded(workers: Workers, server: WandbServer) -> None:
    attempt = _start(workers, "checkpoint", "/checkpoints/", max_steps=LONG, num_epochs=9999)
    _stop_while_held(workers, server, "checkpoint", attempt)
    _check(workers, "checkpoint", attempt, "stopped")


def test_a_stop_in_the_commit(workers: Workers, server: WandbServer) -> None:
    attempt = _start(workers, "commit", "history-", **CALM)
    _stop_while_held(workers, server, "commit", attempt)
    result = _check(workers, "commit", attempt, "stopped")
    assert result["reason"] == "stopped on W&B after all planned steps"


def test_a_stop_after_the_result_was_put_together_changes_nothing(
    workers: Workers, server: WandbServer
) -> None:
    attempt = _start(workers, "late", "result.json", **CALM)
    _stop_while_held(workers, server, "late", attempt)
    _check(workers, "late", attempt, "completed")


def test_a_stop_reaches_a_resumed_trial_too(workers: Workers, server: WandbServer) -> None:
    """It has no agent; the client itself asks for stops, every 15 s."""
    slow = {"max_steps": 8 * LONG, "num_epochs": 99999, "checkpoint_minutes": 0.01}
    first = _start(workers, "resumed", **slow)
    eventually(lambda: "checkpoint at step" in first.log)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    _stop(server, "resumed")
    again = _start(workers, "resumed", **slow)
    eventually(lambda: "going on from the checkpoint" in again.log)
    result = _check(workers, "resumed", again, "stopped")
    assert result["attempts"] == 2
