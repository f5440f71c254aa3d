"""The output of `status`, `report` and `best`, also where it does not fit.

`pytest tests/report/test_output.py`
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from job.ledger.ledger import Ledger
from job.report.findings import findings
from job.report.overview import Overview, SlotView
from job.report.page import html_page, markdown
from job.store.local import LocalStore
from tests.ledger.documents import make_identity, make_result, make_spec

ROOT = Path(__file__).parents[2]
SWEEP = {
    "method": "bayes",
    "metric": {"name": "eval/loss", "goal": "minimize"},
    "parameters": {"lora_r": {"values": [8, 16]}},
}


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", ["status", "status --json", "status --watch", "report", "best"])
def test_a_full_disk_behind_stdout_is_named(words: str, unbuffered: str, tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path / "out"), "s")
    ledger.open_sweep(make_identity())
    ledger.slot(0).specify(make_spec())
    ledger.slot(0).commit(make_result())
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "job", *words.split()],
            env={
                "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "JOB_SWEEP_NAME": "s",
                "JOB_OUTPUT_URI": f"{tmp_path}/out", "JOB_NUM_TRIALS": "1",
                "PYTHONUNBUFFERED": unbuffered,
            },
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert line.endswith("exit 74 (outage): stdout: no space left: free it, or print elsewhere")
    assert done.returncode == 74


def test_both_reports_say_how_the_adapter_is_fetched_and_count_one_trial() -> None:
    view = SlotView(0, "completed", params={"lora_r": 8}, eval_loss=1.25, step=10, planned_steps=10)
    identity = make_identity(JOB_SWEEP_FILE=SWEEP)
    overview = Overview("s", "/out", identity, (view,))
    for text in (markdown(overview, usd_per_hour=None), html_page(overview, usd_per_hour=None)):
        assert "job best --download adapter" in text
    notes = " ".join(findings(overview))
    assert "with 1 trial the first" in notes
    assert "rest on 1 trial and are" in notes
