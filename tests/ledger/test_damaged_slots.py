"""A slot's damage is its own, and the line says what helps.

`pytest tests/ledger/test_damaged_slots.py`
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from job.errors import SlotError
from job.ledger.ledger import Ledger
from job.ledger.redo import redo
from job.report.attempts_table import attempts_table
from job.report.overview import read_overview
from job.store.local import LocalStore
from job.trial.draw import observe
from job.trial.slots import open_slots
from tests.ledger.documents import make_identity, make_result, make_spec

SPEC = make_spec()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A sweep with slots 0 and 1 committed."""
    ledger = Ledger(LocalStore(tmp_path / "out"), "s")
    ledger.open_sweep(make_identity())
    for slot in (0, 1):
        ledger.slot(slot).specify(SPEC)
        _commit(ledger, slot)
    return ledger


def _commit(ledger: Ledger, number: int) -> None:
    slot = ledger.slot(number)
    slot.commit(make_result(slot.folder))


def _not_json(path: Path) -> None:
    path.write_text("{")


def _a_folder(path: Path) -> None:
    path.mkdir()


def _a_link_outside(path: Path) -> None:
    outside = path.parents[5] / "outside.json"
    outside.write_text('{"status": "completed"}')
    path.symlink_to(outside)


@pytest.mark.parametrize("name", ["result.json", "spec.json"])
@pytest.mark.parametrize("damage", [_not_json, _a_folder, _a_link_outside])
def test_a_damaged_document_is_its_slots_and_the_line_says_what_helps(
    ledger: Ledger, name: str, damage: Callable[[Path], None]
) -> None:
    path = Path(ledger.store.uri) / ledger.slot(0).folder / name
    path.unlink()
    damage(path)
    with pytest.raises(SlotError) as caught:
        (ledger.slot(0).result if name == "result.json" else ledger.slot(0).spec)()
    assert str(caught.value).startswith(f"slot 0: {path}: ")
    assert str(caught.value).endswith("; `job redo 0` begins it again")
    assert [slot.number for slot, _, _ in ledger.committed(2)] == [1]
    assert [seen.slot for seen in observe(ledger, 2)[0]] == [1], "no other slot's draw ends by it"
    assert [view.state for view in read_overview(ledger, 2).slots] == ["damaged", "completed"]
    with pytest.raises(SlotError, match="^slot 0: "):
        open_slots(ledger, 2)  # nothing else is left
    ledger.slot(3).specify(SPEC)
    assert open_slots(ledger, 4) == [2, 3], "a worker for all slots takes another"
    _commit(ledger, 2)
    _commit(ledger, 3)
    ledger.slot(0).exclude("damaged")
    assert open_slots(ledger, 4) == [], "nor is an excluded one told again"
    redo(ledger.slot(0))
    assert open_slots(ledger, 2) == [0]


@pytest.mark.parametrize("name", ["result.json", "lease.json"])
def test_damage_before_a_redo_is_told_once_and_without_the_advice_to_redo_it(
    ledger: Ledger, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(ledger.store.uri) / ledger.slot(0).folder / name
    path.unlink(missing_ok=True)
    path.write_text("{")
    redo(ledger.slot(0))
    seen_later = Ledger(ledger.store, "s")
    caplog.clear()
    assert [view.state for view in read_overview(seen_later, 2).slots] == ["waiting", "completed"]
    (told,) = [record.getMessage() for record in caplog.records]
    assert f"{path}: damaged" in told
    assert told.endswith("; it was begun again since")
    cells = [*attempts_table(seen_later, 1).columns[-1].cells]
    assert not any("job redo" in cell for cell in cells)


def test_a_damaged_redo_document_is_its_slots_too(ledger: Ledger) -> None:
    (Path(ledger.store.uri) / ledger.redo_key(0, 1)).mkdir()
    with pytest.raises(SlotError, match=r"^slot 0: .*redo-1\.json: damaged, not a file; remove it"):
        ledger.slot(0).state()
    assert [view.state for view in read_overview(ledger, 2).slots] == ["damaged", "completed"]


def test_a_slot_that_is_a_link_outside_ends_no_other(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (Path(ledger.store.uri) / "sweeps/s/slots/0002").symlink_to(tmp_path / "outside")
    states = [view.state for view in read_overview(ledger, 3).slots]
    assert states == ["completed", "completed", "damaged"]
    with pytest.raises(SlotError, match="^slot 2: .*leads outside .*; remove it"):
        ledger.slot(2).is_open()
