"""Which trials can be told apart, and what is said. `pytest tests/report/test_comparison.py`"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from job.ledger.ledger import Ledger
from job.ledger.records import RowLosses
from job.report import charts
from job.report.comparison import comparison_json, read_compared, recommendation
from job.report.overview import Overview
from job.report.page import html_page, markdown
from job.store.local import LocalStore
from tests.ledger.documents import make_identity, make_result, make_rows, make_spec


def _sweep(folder: Path, losses: list[float], adapter_bytes: list[int] | None = None) -> Ledger:
    """Committed slots with these eval/losses, each with its rows."""
    ledger = Ledger(LocalStore(folder), "s")
    ledger.open_sweep(make_identity())
    for number, loss in enumerate(losses):
        num_bytes = adapter_bytes[number] if adapter_bytes else 8_400_000
        _commit(ledger, number, make_rows(loss, trial=number), adapter_bytes=num_bytes)
    return ledger


def _commit(ledger: Ledger, number: int, rows: RowLosses | None, **changes: object) -> None:
    slot = ledger.slot(number)
    if rows is not None:
        content = json.dumps(rows.to_json()).encode()
        key = slot.key(f"rows-{hashlib.sha256(content).hexdigest()}.json")
        ledger.store.put_if_absent(key, content)
        changes |= {"rows_key": key, "eval_loss": rows.loss}
    slot.specify(make_spec(params={"lora_r": 8}))
    slot.commit(make_result(slot.folder, **changes))


def _read(ledger: Ledger) -> Overview:
    return read_compared(ledger, 4)


def test_clear_differences_are_told_with_the_closest(tmp_path: Path) -> None:
    overview = _read(_sweep(tmp_path, [1.5, 1.2, 1.4, 1.3]))
    assert overview.comparison is not None
    assert overview.comparison.ties == []
    said = recommendation(overview)
    assert said is not None
    assert said.startswith(
        "take slot 1: it beats every other on these 192 rows, slot 3 by 100.0 ± "
    )


def test_ties_are_called_ties_and_a_smaller_adapter_is_named(tmp_path: Path) -> None:
    sizes = [8_400_000, 4_200_000, 16_800_000, 4_200_000]
    overview = _read(_sweep(tmp_path, [1.2, 1.2005, 1.2004, 1.4], sizes))
    assert recommendation(overview) == (
        "take slot 0; slots 1 and 2 cannot be told apart from it on these 192 rows; slot 1's"
        " adapter is smaller, 4.2 MB for 8.4 MB: `job best --slot 1`"
    )
    one_tie = _read(_sweep(tmp_path / "other", [1.2, 1.4, 1.2004, 1.4]))
    assert recommendation(one_tie) == (
        "take slot 0; slot 2 cannot be told apart from it on these 192 rows"
    )


def test_json_tells_each_difference_in_nats(tmp_path: Path) -> None:
    content = comparison_json(_read(_sweep(tmp_path, [1.2, 1.2004, 1.4, 1.3])))
    assert content is not None
    assert (content["best"], content["num_rows"], content["level"]) == (0, 192, 0.95)
    assert [entry["slot"] for entry in content["behind"]] == [1, 2, 3]
    assert [entry["tied"] for entry in content["behind"]] == [True, False, False]
    assert content["behind"][1]["nats"] == pytest.approx(0.2)
    for entry in content["behind"]:
        assert 0 < entry["standard_error"] < entry["half_width"] < 0.02


def test_both_reports_show_intervals_and_the_advice(tmp_path: Path) -> None:
    overview = _read(_sweep(tmp_path, [1.2, 1.2004, 1.4, 1.3]))
    page, text = html_page(overview, usd_per_hour=None), markdown(overview, usd_per_hour=None)
    for shown in (page, text):
        assert "Take slot 0; slot 1 cannot be told apart from it on these 192 rows." in shown
        assert "200.0 ± " in shown
    drawing = ElementTree.fromstring(charts.intervals(overview))  # noqa: S314 - our own
    assert len(drawing.findall(".//{*}circle")) == 3
    assert [m.get("class") for m in drawing.findall(".//{*}polyline")][1:] == [
        "good", "trial", "trial",
    ]  # fmt: skip


@pytest.mark.parametrize("damaged", ["gone", "flipped", "another shape"])
def test_damaged_rows_are_told_and_hide_no_other(
    tmp_path: Path, damaged: str, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = _sweep(tmp_path, [1.2, 1.2004, 1.4, 1.3])
    result = ledger.slot(2).result()
    assert result is not None
    assert result.rows_key is not None
    path = tmp_path / result.rows_key
    if damaged == "gone":
        path.unlink()
    else:
        content = b"[]" if damaged == "another shape" else path.read_bytes().replace(b"1", b"2", 1)
        path.write_bytes(content)
    found = _read(ledger).comparison
    assert found is not None
    assert set(found.behind) == {1, 3}
    assert "slot 2 is not compared" in caplog.text


def test_a_sweep_of_a_version_that_kept_no_rows_reads_as_before(tmp_path: Path) -> None:
    ledger = _sweep(tmp_path, [])
    for number in range(3):
        _commit(ledger, number, None)
    overview = _read(ledger)
    assert overview.comparison is None
    assert comparison_json(overview) is None
    page = html_page(overview, usd_per_hour=None)
    assert "behind the best" not in page
    assert "Take slot" not in page + markdown(overview, usd_per_hour=None)
