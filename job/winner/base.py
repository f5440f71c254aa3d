"""The base that an adapter was trained on, as it was then."""

from __future__ import annotations

from job.base_model import BaseModel
from job.errors import SettingsError
from job.ledger.records import Result
from job.settings import Settings
from job.staged_base import resolve_base
from job.store.base import Store


def base_of(store: Store, result: Result, settings: Settings) -> BaseModel:
    """The base of a committed trial's adapter, at the revision that its result names.

    Raises `SettingsError` before any weight moves if the folder or the bucket holds another one by
    now, and what `resolve_base` raises.
    """
    was = result.base_model_revision

    def check(revision: str) -> None:
        if revision != was:
            raise SettingsError(
                f"the base in {result.base_model} is not the one that this adapter was trained on"
                f" ({was} -> {revision}): put that one back, or begin a new sweep with this one"
            )

    return resolve_base(
        store,
        result.base_model,
        was,
        settings.work_dir,
        outage_seconds=60 * settings.outage_minutes,
        check_digest=check,
    )
