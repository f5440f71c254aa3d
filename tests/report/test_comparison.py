"""Which trials can be told apart, and what is said. `pytest tests/report/test_comparison.py`"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from job.errors import CredentialsError
from job.ledger.ledger import Ledger
from job.ledger.records import MergeLosses, RowLosses
from job.report import charts
from job.report.comparison import comparison_json, read_compared, recommendation
from job.report.overview import Overview
from job.report.page import html_page, markdown
from job.report.table import to_json
from job.store.local import LocalStore
from tests.ledger.documents import NOW, make_identity, make_result, make_rows, make_spec


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
    dots = [m.get("class") for m in drawing.findall(".//{*}circle")]
    assert dots == ["winner", "point", "point", "point"]
    drawn = [m.get("class") for m in drawing.findall(".//{*}polyline")]
    assert [css for css in drawn[1:] if css != "near"] == ["good", "trial", "trial"]


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
    assert "mnat behind" not in page
    assert "Take slot" not in page + markdown(overview, usd_per_hour=None)


def test_what_four_bits_cost_is_told_where_a_merge_measured_it(tmp_path: Path) -> None:
    ledger = _sweep(tmp_path, [1.44, 1.5])
    _commit(ledger, 2, make_rows(1.6, trial=2), curve=((0, 1.594), (50, 1.6)))
    losses = MergeLosses(
        untuned_16bit=1.327, adapter_4bit=1.44, merged_16bit=1.24, merged_4bit=1.441,
        written="16bit", num_rows=192,
    )  # fmt: skip
    ledger.slot(0).write_merge_losses(MergeLosses(merged_4bit=1.441, written="4bit", num_rows=1))
    ledger.slot(0).write_merge_losses(losses)
    overview = _read(ledger)
    assert overview.merges == {0: losses}
    assert json.loads(to_json(overview))["merges"]["0"]["merged_16bit"] == 1.24
    for shown in (html_page(overview, usd_per_hour=None), markdown(overview, usd_per_hour=None)):
        told = "4 bits cost the untuned base 0.267 nats on these 192 rows (1.594 against 1.327)"
        assert told in shown
        assert "merged into its 16-bit base: eval/loss 1.2400" in shown
        assert "untuned, 16 bits" in shown


def test_answers_stand_side_by_side_in_both_reports(tmp_path: Path) -> None:
    ledger = _sweep(tmp_path, [1.2, 1.3])
    assert "Answers to held-out prompts" not in html_page(_read(ledger), usd_per_hour=None)
    rows = [
        {"row": row, "prompt": "<b>1+1?", "reference": "2", "answers": {"base": "3", "a" * 64: "2"}}
        for row in range(14)
    ]
    content = {
        "data_digest": "d", "base_model": "b", "base_model_revision": "r", "max_new_tokens": 8,
        "match": "number", "models": {"base": {}, "a" * 64: {"slot": 0, "eval_loss": 1.2}},
        "rows": rows, "written_at": NOW,
    }  # fmt: skip
    ledger.store.put_if_absent(
        f"{ledger.folder}/answers-{'a' * 64}.json", json.dumps(content).encode()
    )
    page = html_page(_read(ledger), usd_per_hour=None)
    assert "Answers to held-out prompts" in page
    assert "&lt;b&gt;1+1?" in page
    assert "12 of 14 rows" in page
    assert "slot 0: 14 of 14, 78 to 100%" in markdown(_read(ledger), usd_per_hour=None)


def test_answers_of_a_slot_that_was_excluded_are_not_reported(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    ledger.open_sweep(make_identity())
    for number, name in enumerate("ab"):
        loss = 1.2 + number / 10
        _commit(ledger, number, make_rows(loss, trial=number), adapter_sha256=name * 64)
    said = {"base": "3", "a" * 64: "2", "b" * 64: "5"}
    content = {
        "data_digest": "d", "base_model": "b", "base_model_revision": "r", "max_new_tokens": 8,
        "match": "number", "written_at": NOW,
        "models": {"base": {}, "a" * 64: {"slot": 0}, "b" * 64: {"slot": 1}},
        "rows": [{"row": 0, "prompt": "1+1?", "reference": "2", "answers": said}],
    }  # fmt: skip
    key = f"{ledger.folder}/answers-{'a' * 64}.json"
    ledger.store.put_if_absent(key, json.dumps(content).encode())
    assert "- slot 0: 1 of 1" in markdown(_read(ledger), usd_per_hour=None)
    ledger.slot(0).exclude("its rows were wrong")
    told = markdown(_read(ledger), usd_per_hour=None)
    assert "- slot 0: 1 of 1" not in told
    assert "- slot 1: 0 of 1" in told
    assert "- untuned: 0 of 1" in told


def test_whoever_may_not_list_sees_all_but_the_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Unlistable(LocalStore):
        def list(self, prefix: str) -> Iterator[str]:
            raise CredentialsError(f"{self.uri}: may not be listed")

    _sweep(tmp_path, [1.2, 1.3])
    overview = _read(Ledger(Unlistable(tmp_path), "s"))
    assert overview.comparison is not None
    assert overview.answers is None
    assert "answers are not looked for" in caplog.text
