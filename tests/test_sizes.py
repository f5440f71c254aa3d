"""Bytes as people read them. `pytest tests/test_sizes.py`"""

from __future__ import annotations

import pytest

from job.progress import size


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (34_123, "34.1 kB"),
        (999_499, "999 kB"),
        (999_600, "1 MB"),  # and not 1e+03 kB
        (1_234_567, "1.23 MB"),
        (99_960_000, "100 MB"),
        (335_500_000, "336 MB"),
        (4_100_000_000, "4.1 GB"),
        (123_456_000_000_000, "123456 GB"),
    ],
)
def test_a_size_has_the_unit_that_fits(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text
