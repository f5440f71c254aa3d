"""Imports while the garbage collector rests. `pytest tests/process/test_imports.py`"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.process.imports import import_for_good

SEEN = "import gc\nwas_on = gc.isenabled()\nmade = [[n] for n in range(100)]\n"


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "large_library.py").write_text(SEEN)
    (tmp_path / "broken_library.py").write_text(SEEN + "raise ImportError('no such file')\n")
    yield
    sys.modules.pop("large_library", None)
    gc.unfreeze()


def test_a_module_is_imported_without_collections_and_left_alone() -> None:
    before = gc.get_freeze_count()
    seconds = import_for_good("large_library")
    assert seconds is not None
    assert seconds >= 0
    assert not sys.modules["large_library"].was_on
    assert gc.isenabled()
    assert gc.get_freeze_count() > before + 100


def test_what_is_made_after_the_first_import_can_be_freed() -> None:
    import_for_good("large_library")
    frozen = gc.get_freeze_count()
    model = [[n] for n in range(100)]
    assert import_for_good("large_library") is None
    assert gc.get_freeze_count() <= frozen
    assert len(model) == 100


def test_a_library_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ImportError, match="no such file"):
        import_for_good("broken_library")
    assert gc.isenabled()
