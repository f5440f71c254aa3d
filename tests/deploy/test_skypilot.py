"""The SkyPilot task says what the job understands: pytest tests/deploy/test_skypilot.py

SkyPilot's own schemas are asked by `make check-skypilot`; they let unknown keys of `job_recovery`
pass.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from job.errors import ExitCode
from job.variables import load_settings

ROOT = Path(__file__).parents[2]
TASK = yaml.safe_load((ROOT / "docs/skypilot.yaml").read_text())


def test_its_settings_are_the_jobs_even_under_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TASK["envs"].items():
        monkeypatch.setenv(name, value.replace("CHANGE-ME", "bucket"))
    settings, warnings = load_settings()
    assert warnings == []
    assert (settings.strict, settings.workers, settings.gpu_hourly_usd) == (True, "auto", 0.15)


def test_a_preempted_worker_is_recovered_and_no_other() -> None:
    assert TASK["resources"]["job_recovery"] == {"recover_on_exit_codes": [ExitCode.PREEMPTED]}
    assert TASK["resources"]["use_spot"] is True


def test_a_signal_reaches_the_queue_and_secrets_are_given_at_the_launch() -> None:
    last = TASK["run"].strip().splitlines()[-1]
    assert re.fullmatch(r"exec \S+/job queue", last)
    assert set(TASK["secrets"].values()) == {None}
    assert not set(TASK["secrets"]) & set(TASK["envs"])
