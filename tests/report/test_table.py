"""The table of `job status` in terminals of three widths. `pytest tests/report/test_table.py`"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from job.report.overview import Overview, read_overview
from job.report.table import slot_table
from tests import every_state

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def overview(tmp_path_factory: pytest.TempPathFactory) -> Overview:
    folder: Path = tmp_path_factory.mktemp("sweep")
    sweep = read_overview(every_state.make_sweep(folder)[0], every_state.NUM_SLOTS)
    slots = (replace(view, node=view.node and "job-14") for view in sweep.slots)
    return replace(sweep, slots=tuple(slots))


def _words(overview: Overview, width: int) -> list[list[str]]:
    """The table's lines as lists of words; an empty line separates two tables."""
    console = Console(file=io.StringIO(), width=width)
    console.print(slot_table(overview, width))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return [line.split() for line in lines]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_width_cuts_what_a_slot_does(overview: Overview, width: int) -> None:
    lines = _words(overview, width)
    for view in overview.slots:
        line = next(line for line in lines if line[:1] == [str(view.slot)])
        told = [*view.state.split()]
        told += [] if view.step is None else [f"{view.step}/{view.planned_steps}"]
        told += [] if view.eval_loss is None else [f"{view.eval_loss:.4f}"]
        told += [] if view.tokens_per_second is None else [f"{view.tokens_per_second:.0f}"]
        assert set(told) <= set(line), f"slot {view.slot}"
        assert ("best" in line) == (view is overview.best)
    assert not any("…" in word for line in lines for word in line)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_every_width_shows_every_parameter(overview: Overview, width: int) -> None:
    lines = _words(overview, width)
    assert any(
        {"accumulation", "lr", "lora_dropout", "weight_decay"} <= set(line) for line in lines
    )
    shown = [line for line in lines if line[:1] == ["0"]]
    assert len(shown) == (1 if width == 160 else 2), "parameters have a table of their own"
    assert {"4", "6.67e-5", "0.05", "0.01"} <= set(shown[-1])
    empty = str(every_state.EMPTY[0])
    assert len([line for line in lines if line[:1] == [empty]]) == 1, "it has none yet"


def test_less_width_drops_the_lease_before_the_cost(overview: Overview) -> None:
    heads = {width: next(filter(None, _words(overview, width))) for width in (80, 100, 160)}
    assert {"attempts", "GPU", "node", "lease"} <= set(heads[160])
    assert {"attempts", "GPU", "node"} <= set(heads[100])
    assert "lease" not in heads[100]
    assert not {"attempts", "GPU", "lease"} & set(heads[80])
