"""Where trials are committed: a folder or a bucket prefix behind one protocol."""

from __future__ import annotations

import uuid
from pathlib import Path

from job.errors import SettingsError, StoreError
from job.store.base import Store
from job.store.local import LocalStore


def open_store(uri: str) -> Store:
    """The store at `JOB_OUTPUT_URI`: `file://` or a path. Touches nothing yet."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return LocalStore(Path(uri))
    if scheme == "file" and rest.startswith("/"):
        return LocalStore(Path(rest))
    raise SettingsError(
        f"JOB_OUTPUT_URI: {scheme}:// is not supported by this version;"
        " allowed: file:///folder or a path"
    )


def probe(store: Store) -> None:
    """Accept a store by what it does: conditional writes must be refused when they should.

    Raises `StoreError` for a store that would let two writers both win.
    """
    key = f"probe-{uuid.uuid4().hex}"
    created = store.put_if_absent(key, b"1")
    created_twice = store.put_if_absent(key, b"2")
    first = store.get(key)
    if first is None or not created or created_twice:
        raise StoreError(f"{store.uri}: ignores create-if-absent, trials could commit twice")
    swapped = store.put_if_version(key, b"3", first.version)
    swapped_stale = store.put_if_version(key, b"4", first.version)
    if not swapped or swapped_stale:
        raise StoreError(f"{store.uri}: ignores swap-if-version, trials could commit twice")
    store.delete(key)
