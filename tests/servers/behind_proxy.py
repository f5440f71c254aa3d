"""A store of each service behind a `FaultProxy`, with limits short enough for tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from job.store import open_store
from job.store.base import Store
from job.store.retries import Limits
from tests.servers import azurite, s3
from tests.servers.proxy import FaultProxy, proxy_to

LIMITS = Limits(
    outage_seconds=10,
    credentials_seconds=0.5,
    connect_seconds=0.5,
    read_seconds=0.4,
    attempts=1,  # ours is tried; RETRYING_LIMITS let boto3 retry too
    pause_seconds=0.05,
)
SHORT_LIMITS = dataclasses.replace(LIMITS, outage_seconds=0.3, credentials_seconds=0.2)
RETRYING_LIMITS = dataclasses.replace(LIMITS, attempts=3)
LARGE_BYTES = 9_000_000  # in parts


def write_verb(store: Store) -> str:
    """What the first line of a write begins with; only GCS writes with POST."""
    return "POST " if store.uri.startswith("gs") else "PUT "


@contextmanager
def store(
    scheme: str, endpoint: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> Iterator[tuple[Store, FaultProxy]]:
    """A store whose every request goes through the proxy; its prefix is the folder's name."""
    with proxy_to(endpoint) as proxy:
        s3.use(monkeypatch, proxy.endpoint)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.endpoint)
        azurite.use(monkeypatch, proxy.endpoint)
        yield open_store(f"{scheme}://{s3.BUCKET}/{folder.name}", limits=LIMITS), proxy
