"""Rows that give no sample: each is counted by its reason, and too many of them are an error."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from job.errors import DataError

UNUSABLE_LIMIT = 0.05  # share of the rows; above it the data set is not what the user thinks it is
_NUM_PLACES = 3


class UnusableRowError(Exception):
    """A row gives no sample; the message is one of a few reasons, by which rows are counted."""


@dataclass
class UnusableRows:
    """Rows that gave no sample, by reason, with the places of the first three of each."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Count one row."""
        self.counts[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < _NUM_PLACES:
            places.append(place)

    def check_share(self, num_rows: int, *, way_out: str) -> None:
        """Raise `DataError` if more than 5 % of `num_rows` are unusable."""
        num_unusable = self.counts.total()
        if num_unusable <= UNUSABLE_LIMIT * num_rows:
            return
        reasons = "; ".join(
            f"{count} x {reason} ({some_of(self.places[reason], count)})"
            for reason, count in self.counts.most_common()
        )
        raise DataError(
            f"JOB_DATASET_URI: {num_unusable} of {num_rows} rows are unusable, limit is 5 %: "
            f"{reasons}: correct the rows, or {way_out}"
        )


def some_of(places: list[str], count: int) -> str:
    """The places of the first rows of `count`, for a message."""
    return ", ".join(places) + (", ..." if count > len(places) else "")


def no_such_column(name: str, columns_seen: Collection[str]) -> str:
    """What is wrong with a column's name that no row has, with the nearest one that is there."""
    nearest = difflib.get_close_matches(name, columns_seen, n=1, cutoff=0.0)
    hint = f"did you mean {nearest[0]!r}" if nearest else "the rows have no columns at all"
    return f"no row has a column {name!r}, {hint}: columns present: {listing(sorted(columns_seen))}"


def listing(names: list[str]) -> str:
    """At most twenty names in one line, for a message."""
    shown = [name[:60] for name in names[:20]]
    return ", ".join(shown) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
