"""`job status --watch` goes on while a slot may change, and not longer.

`pytest tests/test_status_watch.py`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from job.command_line import parse
from job.lease import acquire
from job.ledger import Ledger
from job.report.commands import show_status
from job.settings import Settings
from job.store.local import LocalStore

SPEC: dict[str, Any] = {"params": {"lora_r": 8}, "recipe": {"planned_steps": 10}}
RESULT: dict[str, Any] = {
    "status": "completed", "eval_loss": 1.25, "steps": 10, "adapter_key": "a", "curve": [],
    "gpu_seconds": 60.0,
}  # fmt: skip


def test_the_watch_ends_once_no_slot_can_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    settings = Settings(dataset_uri="rows", output_uri=str(tmp_path), num_trials=4)
    ledger.commit(3, RESULT)  # damaged: without a spec
    lease = None

    def drawn() -> None:  # and nobody at work on it
        for slot in (0, 1, 2):
            ledger.specify(slot, SPEC)

    def taken() -> None:
        nonlocal lease
        lease = acquire(ledger, [0], lease_seconds=60, should_stop=lambda: None)
        ledger.exclude(1, "wrong rows")
        ledger.close(2, "no progress")

    def committed() -> None:
        assert lease is not None
        lease.release()
        ledger.commit(0, RESULT)

    acts = [drawn, taken, committed]
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        acts.pop(0)()  # no act left: the watch goes on for ever

    show_status(parse(["status", "--watch"]), settings, ledger, wait=wait)
    assert waits == [10, 10, 10], "empty, waiting, running"
    shown = capsys.readouterr().out
    for word in ("completed", "excluded", "given up", "damaged", "1.2500"):
        assert word in shown
