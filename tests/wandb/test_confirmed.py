"""Which committed slots a later pod mirrors to W&B. `pytest tests/wandb/test_confirmed.py`"""

from __future__ import annotations

from pathlib import Path

from job.ledger.ledger import Ledger
from job.ledger.redo import redo
from job.store.documents import create_document
from job.store.local import LocalStore
from job.wandb.confirmed import unconfirmed
from job.wandb.run import MIRROR_FILE
from tests.ledger.documents import make_result, make_spec


def test_whole_committed_slots_without_word_from_wandb_are_left(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    for number in range(1, 6):  # slot 0 is empty, slot 1 only drawn
        slot = ledger.slot(number)
        slot.specify(make_spec(wandb_run_id=f"run-{number}"))
        if number > 1:
            slot.commit(make_result(slot.folder))
    create_document(ledger.store, ledger.slot(2).key(MIRROR_FILE), {"run": "a/b/c"})
    redo(ledger.slot(4))
    (tmp_path / ledger.slot(5).key("result.json")).write_text("{")
    (left,) = unconfirmed(ledger, 6)
    assert (left.slot.number, left.spec.wandb_run_id) == (3, "run-3")
    redo(ledger.slot(3))
    assert unconfirmed(ledger, 6) == [], "what a redo begins is not committed"
    assert left.slot.generation == 0
