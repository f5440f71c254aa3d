"""What a trial does before its first step, and without. `pytest tests/trial/test_prepare.py`"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.ledger.ledger import Ledger
from job.settings import Settings
from job.store.base import Stored
from job.store.local import LocalStore
from job.trial.draw import observe
from job.trial.end import worth_working_on
from job.trial.slots import open_slots
from tests.workers import make_inputs, start_worker, wait_for

TRIAL = """
import json, logging, sys
from pathlib import Path
from job.process.stop import Stop
from job.process.watchdog import Watchdog
from job.settings import Settings
from job.ledger.ledger import Ledger
from job.settings import Settings
from job.store.base import Stored
from job.store.local import LocalStore
from job.trial.draw import observe
from job.trial.end import worth_working_on
from job.trial.slots import open_slots
from job.trial.run import run_trial_on
from tests.fake_training import FAKE_TRAINING
logging.disable(logging.CRITICAL)
settings = Settings(**json.loads(sys.argv[1]))
stop = Stop(8)
watchdog = Watchdog(stop, lambda reason: None)
run_trial_on(LocalStore(Path(settings.output_uri)), settings, stop, FAKE_TRAINING, watchdog)
print(json.dumps(sorted(set(sys.argv[2:]) & set(sys.modules))))
"""
# Seconds of imports that only training, or nothing in a trial on a warm node, has a use for.
LARGE = (
    *("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "datasets", "pandas", "scipy"),
    *("wandb", "apprise", "azure", "google", "boto3", "huggingface_hub", "jinja2"),
)


def _trial(settings: dict[str, Any]) -> list[str]:
    """Run a trial, all but its training, in a new process: the large libraries that it imported."""
    done = subprocess.run(
        [sys.executable, "-c", TRIAL, json.dumps(settings), *LARGE],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return list(json.loads(done.stdout))


@pytest.mark.slow
def test_with_prepared_rows_no_tokenizer_and_no_large_library_is_loaded(tmp_path: Path) -> None:
    settings = make_inputs(tmp_path)
    first = start_worker(settings, lambda: LocalStore(tmp_path / "out"))
    assert wait_for(first) == 0
    assert _trial(settings) == []


def _settings() -> Settings:
    return Settings(dataset_uri="rows", output_uri="out", num_trials=8)  # type: ignore[call-arg]


class SideBySide(LocalStore):
    """A folder that answers the first read of a slot once four slots are asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._together = threading.Barrier(4, timeout=20)

    def get(self, key: str) -> Stored | None:
        if key.endswith("/redo-1.json"):
            self._together.wait()
        return super().get(key)


@pytest.mark.parametrize(
    "look",
    [
        lambda ledger: open_slots(ledger, 8),
        lambda ledger: observe(ledger, 8),
        lambda ledger: list(ledger.committed(8)),
        lambda ledger: worth_working_on(_settings(), ledger, list(range(8))),
    ],
)
def test_slots_are_read_side_by_side(tmp_path: Path, look: Callable[[Ledger], object]) -> None:
    look(Ledger(SideBySide(tmp_path), "s"))
