"""Where trials are committed: a folder or a bucket prefix behind one protocol."""

from __future__ import annotations

import uuid
from pathlib import Path

from job.errors import SettingsError, StoreError
from job.file_uri import path_of
from job.store.base import Store
from job.store.local import open_local_store
from job.store.retries import Limits


def open_store(
    uri: str,
    *,
    outage_seconds: float = 1200,
    limits: Limits | None = None,
    setting: str = "JOB_OUTPUT_URI",
) -> Store:
    """The store at `JOB_OUTPUT_URI`: a bucket, `file://` or a path. Touches nothing yet.

    `limits`, where given, wins over `outage_seconds`. Errors name `setting`.
    """
    scheme, separator, rest = uri.partition("://")
    try:
        folder = path_of(uri) if separator else Path(uri)
    except ValueError as error:
        raise SettingsError(f"{setting}: {uri} {error}") from error
    if folder is not None:
        return open_local_store(folder, setting)
    scheme = scheme.lower()
    name, _, prefix = rest.partition("/")
    limits = limits or Limits(outage_seconds=outage_seconds)
    if name and scheme == "s3":
        from job.store.s3 import open_s3_store

        return open_s3_store(name, prefix.strip("/"), limits, setting)
    if name and scheme == "gs":
        from job.store.gcs import open_gcs_store

        return open_gcs_store(name, prefix.strip("/"), limits, setting)
    if name and scheme == "az":
        from job.store.azure import open_azure_store

        return open_azure_store(name, prefix.strip("/"), limits, setting)
    raise SettingsError(
        f"{setting}: {scheme}:// is not supported; allowed: s3://bucket/prefix, gs://bucket/prefix,"
        " az://container/prefix, file:///folder or a path"
    )


def probe(store: Store) -> None:
    """Accept a store by what it does: conditional writes must be refused when they should.

    Raises `StoreError` for a store that would let two writers both win. What stands in the store
    decides where a write's own answer may have been lost on the way (see `documents`).
    """
    key = f"probe-{uuid.uuid4().hex}"
    store.put_if_absent(key, b"1")
    created_twice = store.put_if_absent(key, b"2")
    first = store.get(key)
    if first is None or first.data != b"1" or created_twice:
        store.delete(key)
        raise StoreError(f"{store.uri}: ignores create-if-absent, trials could commit twice")
    store.put_if_version(key, b"3", first.version)
    swapped_stale = store.put_if_version(key, b"4", first.version)
    last = store.get(key)
    store.delete(key)
    if last is None or last.data != b"3" or swapped_stale:
        raise StoreError(f"{store.uri}: ignores swap-if-version, trials could commit twice")
