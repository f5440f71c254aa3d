"""How long a sweep waits for its Job: the table of docs/container.md is what the simulation gives.

`pytest tests/deploy/test_sweep_waiting.py`
"""

from __future__ import annotations

import pytest

from tests.deploy.job_controller import ROOT
from tests.deploy.sweep_waiting import WAYS, play, table


def test_the_page_holds_the_table_that_the_simulation_gives() -> None:
    page = (ROOT / "docs/container.md").read_text()
    for row in table():
        assert f"{row}\n" in page


@pytest.mark.parametrize("way", WAYS)
def test_every_healthy_slot_is_committed_once_and_the_broken_one_is_lost(way: str) -> None:
    outcome = play(way)
    assert sorted(outcome.committed) == list(range(1, 12))
    assert outcome.condition == "Failed: FailedIndexes"


def test_a_sweep_that_nothing_befalls_waits_for_nothing() -> None:
    outcome = play("today", broken=None, preempt_every=None)
    assert (outcome.waited_seconds, outcome.pods) == (0, 12)
    assert outcome.condition == "Complete"


def test_a_broken_slot_holds_up_the_others_for_its_six_waits() -> None:
    assert play("today", preempt_every=None).waited_seconds == 10 + 20 + 40 + 80 + 160 + 320
    assert play("standby", preempt_every=None).waited_seconds == 0
