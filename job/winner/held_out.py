"""The held-out rows that a sweep's trials were judged by, from the bucket alone."""

from __future__ import annotations

from pathlib import Path

from job.data.prepared import PreparedData, stored_tables
from job.data.samples import SampleTable
from job.errors import SettingsError
from job.ledger.ledger import Ledger


def held_out_data(ledger: Ledger, cache_dir: Path) -> PreparedData:
    """The prepared rows that the sweep names. Raises `SettingsError` if they are gone."""
    identity = ledger.identity()
    digest = identity.dataset.prepared if identity else None
    data = stored_tables(ledger.store, digest, cache_dir) if digest else None
    if data is None:
        raise SettingsError(
            f"{ledger.store.uri}/prepared/{digest} is gone or damaged: nothing can be measured on"
            " the rows that the sweep's trials were judged by"
        )
    return data


def judged_rows(ledger: Ledger, data: PreparedData) -> SampleTable:
    """The first `JOB_EVAL_ROWS` of the held-out rows: those of every evaluation."""
    identity = ledger.identity()
    frozen = identity.compared() if identity else {}
    return data.eval.head(int(frozen.get("JOB_EVAL_ROWS", len(data.eval))))
