"""A whole W&B sweep with a kill and a preemption in the middle.

`pytest tests/wandb/test_resume.py`
"""

from __future__ import annotations

import copy
import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.servers.wandb import wandb_server
from tests.wandb.workers import SWEEP, Attempt, Workers, eventually

pytestmark = pytest.mark.slow

STEPS = 1000
SETTINGS = {
    "num_trials": 4,
    "max_steps": STEPS,
    "num_epochs": 9999,
    "evals_per_trial": 8,
    "checkpoint_minutes": 0.1 / 60,
}
KILLED, PREEMPTED = 1, 2  # slots
SPEC = "sweeps/abc/slots/0000/spec.json"


def test_four_trials_one_killed_one_preempted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with wandb_server() as server:
        server.state.add_sweep(copy.deepcopy(SWEEP) | {"run_cap": 8}, "abc")
        workers = Workers(server, tmp_path)

        def start(slot: int) -> Attempt:
            return workers.start("abc", sweep="team/qlora/abc", completion_index=slot, **SETTINGS)

        table = []
        for slot in range(4):
            attempt = start(slot)
            ends = []
            if slot in (KILLED, PREEMPTED):
                server.wait_until(lambda _, slot=slot: len(server.rows(f"abc-{slot}")) > 20)
                eventually(lambda attempt=attempt: "checkpoint at step" in attempt.log)
                if slot == KILLED:
                    attempt.kill()
                else:
                    attempt.send(signal.SIGTERM)
                ends.append(attempt.wait())
                shown = server.run(f"abc-{slot}")
                assert shown.state == "running", "W&B is not told that a trial failed which goes on"
                shown_steps = len(shown.rows)
                attempt = start(slot)
            ends.append(attempt.wait())
            assert len(server.named("CreateAgent")) == slot + 1, "a drawn slot is not drawn again"
            assert ends[-1] == 0, attempt.log
            table.append((slot, ends, shown_steps if len(ends) > 1 else 0))
        assert [ends for _, ends, _ in table] == [[0], [-9, 0], [75, 0], [0]]
        assert server.state.sweeps["abc"].num_drawn == len(server.state.runs) == 4
        for slot in range(4):
            run = server.run(f"abc-{slot}")
            spec = workers.document("abc", f"slots/{slot:04d}/spec.json")
            result = workers.document("abc", f"slots/{slot:04d}/result.json")
            assert spec is not None
            assert result is not None
            assert run.name == spec["wandb_run_id"]
            assert run.steps == list(range(1, STEPS + 1)), "no hole, no step twice"
            history = (workers.out("abc") / result["history_key"]).read_text().splitlines()
            losses = [json.loads(line)["train/loss"] for line in history]
            assert [row["train/loss"] for row in run.rows] == losses
            assert (run.state, run.sweep) == ("finished", "abc")
            assert {name: run.params[name] for name in spec["params"]} == spec["params"]
            assert run.summary["eval/loss"] == result["eval_loss"]
            assert result["attempts"] == len(table[slot][1])
            assert workers.document("abc", f"slots/{slot:04d}/mirror.json") is not None
        with capsys.disabled():
            print(f"\n  {'slot':4} {'exits':10} {'rows at the kill':16} {'run':6} {'rows':4} state")
            for slot, ends, shown_steps in table:
                run = server.run(f"abc-{slot}")
                print(
                    f"  {slot:4} {', '.join(map(str, ends)):10} {shown_steps:16} {run.name:6}"
                    f" {len(run.rows):4} {run.state}"
                )


def test_the_loser_of_a_draw_ends_as_superseded_and_trains_the_winners_parameters(
    tmp_path: Path,
) -> None:
    with wandb_server() as server:
        server.state.add_sweep(copy.deepcopy(SWEEP), "abc")
        workers = Workers(server, tmp_path)
        winner = workers.start("won", sweep="team/qlora/abc", num_trials=1)
        assert winner.wait() == 0, winner.log
        loser = workers.start(
            "lost", sweep="team/qlora/abc", environ={"HOLD": "spec.json"}, num_trials=1
        )
        eventually(lambda: "held:" in loser.log)
        won, lost = (workers.out(case) for case in ("won", "lost"))
        # Its spec was written meanwhile, by an attempt that has lost the lease since.
        shutil.copy(won / SPEC, lost / SPEC)
        (lost / "go").touch()
        assert loser.wait() == 0, loser.log
        result = workers.document("lost", "slots/0000/result.json")
        assert result is not None
        assert result["wandb_run_id"] == "abc-0"
        superseded = server.run("abc-1")
        assert (superseded.state, superseded.tags) == ("failed", ["superseded"])
        assert superseded.rows == []
        assert (server.run("abc-0").state, len(server.run("abc-0").rows)) == ("finished", 16)
