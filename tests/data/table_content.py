"""A prepared table's `content_sha256`, written down a second time for the tests."""

from __future__ import annotations

import hashlib

import numpy as np

from job.data.samples import SampleTable


def content_sha256(table: SampleTable) -> str:
    """The sha256 of the offsets, the tokens and the targets, in this order."""
    content = hashlib.sha256()
    for array, dtype in (
        (table.offsets, "<i8"),
        (table.input_ids, "<i4"),
        (table.is_target, "|b1"),
    ):
        content.update(np.ascontiguousarray(array, dtype=dtype).data)
    return content.hexdigest()
