"""Unusable rows are counted, and too many are one error. `pytest tests/data/test_unusable.py`"""

from __future__ import annotations

import pytest

from job.data.unusable import UnusableRows
from job.errors import DataError


def tally(num_unusable: int, reason: str = "empty answer") -> UnusableRows:
    rows = UnusableRows()
    for number in range(num_unusable):
        rows.add(reason, f"rows.jsonl:{number + 1}")
    return rows


def test_five_percent_of_unusable_rows_pass_and_one_more_does_not() -> None:
    tally(5).check_share(100, way_out="go home")
    with pytest.raises(DataError) as caught:
        tally(6).check_share(100, way_out="go home")
    message = str(caught.value)
    assert "6 of 100 rows are unusable, limit is 5 %" in message
    assert "6 x empty answer (rows.jsonl:1, rows.jsonl:2, rows.jsonl:3, ...)" in message
    assert message.endswith(": correct the rows, or go home")
