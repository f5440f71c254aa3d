"""JSON documents with exactly-once writes: create and swap that survive a lost answer.

A conditional write whose answer is lost is repeated by the SDK and then refused, though it was
applied, and equal bytes would give equal version tags. So every body carries a fresh nonce, and
what reading back shows decides: our nonce means that we wrote it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

from job.errors import DamagedError, SlotError
from job.store.base import Store

Json = dict[str, Any]
_NONCE = "nonce"


class Document(NamedTuple):
    """A document's content, the version to swap it by, and whether this call wrote it."""

    content: Json
    version: str
    ours: bool


def read_document(store: Store, key: str) -> Document | None:
    """The document, or None if absent. Raises `SlotError` if it is not a JSON object."""
    return _read(store, key, own_nonce=None)


def create_document(store: Store, key: str, content: Mapping[str, Any]) -> Document:
    """Create the document once; return what stands there now, ours or an earlier writer's."""
    body, nonce = _encode(content)
    store.put_if_absent(key, body)
    return _read_back(store, key, nonce)


def swap_document(store: Store, key: str, content: Mapping[str, Any], version: str) -> Document:
    """Replace the document if its version is `version`; return what stands there now."""
    body, nonce = _encode(content)
    store.put_if_version(key, body, version)
    return _read_back(store, key, nonce)


def _encode(content: Mapping[str, Any]) -> tuple[bytes, str]:
    nonce = uuid.uuid4().hex
    text = json.dumps({**content, _NONCE: nonce}, indent=1, allow_nan=False)
    return text.encode(), nonce


def _read_back(store: Store, key: str, nonce: str) -> Document:
    document = _read(store, key, own_nonce=nonce)
    if document is None:
        raise SlotError(f"{store.uri}/{key}: vanished right after it was written")
    return document


def _read(store: Store, key: str, *, own_nonce: str | None) -> Document | None:
    try:
        stored = store.get(key)
        if stored is None:
            return None
        content = json.loads(stored.data)
    except DamagedError as error:
        raise SlotError(str(error)) from error
    except ValueError as error:
        raise SlotError(f"{store.uri}/{key}: damaged, not JSON ({error})") from error
    if not isinstance(content, dict):
        raise SlotError(f"{store.uri}/{key}: damaged, not a JSON object")
    nonce = content.pop(_NONCE, None)
    return Document(content, stored.version, ours=nonce is not None and nonce == own_nonce)
