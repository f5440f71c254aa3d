"""The `Store` protocol: the operations the whole job rests on, and the keys they take."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from job.errors import StoreError

DOCUMENT_LIMIT_BYTES = 16 * 2**20  # of get(): JSON documents; big files go through download()

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]*(/[A-Za-z0-9][A-Za-z0-9._=-]*)*")


class Stored(NamedTuple):
    """An object's bytes and the opaque version that `put_if_version` compares."""

    data: bytes
    version: str


class Store(Protocol):
    """A bucket prefix or a folder.

    Keys are relative, slash-separated and pass `check_key`. Every operation raises
    `StoreError` (74) when the store still fails after its retries and `CredentialsError` (77)
    when it refuses us. Conditional writes are linearizable: of any number of concurrent writers
    that name the same condition exactly one succeeds.
    """

    @property
    def uri(self) -> str:
        """Where the store is, without a trailing slash and without secrets."""

    def get(self, key: str) -> Stored | None:
        """The newest version of a document of at most `DOCUMENT_LIMIT_BYTES`; None if absent."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create the document; False if it exists."""

    def put_if_version(self, key: str, data: bytes, version: str) -> bool:
        """Replace the document; False if its version is no longer `version`."""

    def upload(self, key: str, path: Path) -> None:
        """Write a file's bytes under a key that no one writes with other bytes, in one step."""

    def download(self, key: str, path: Path) -> None:
        """Fetch an uploaded object to `path`, which is replaced in one step.

        Raises `FileNotFoundError` if the object is absent. The bytes are *not* verified here.
        """

    def list(self, prefix: str) -> Iterator[str]:
        """Every key that starts with `prefix`, sorted. For people and clean-up, never for truth."""

    def delete(self, key: str) -> None:
        """Remove an uploaded object; an absent one is no error."""


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hex: what objects are named by and checked against."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_key(key: str) -> str:
    """Return `key` if it is a plain relative path of safe names; `ValueError` otherwise."""
    if not _KEY.fullmatch(key) or ".." in key.split("/"):
        raise ValueError(f"not a store key: {key!r}")
    return key


def check_document_size(where: str, num_bytes: int) -> None:
    """Raise `StoreError` for an object that is too large for a document."""
    if num_bytes > DOCUMENT_LIMIT_BYTES:
        raise StoreError(f"{where}: over the limit of {DOCUMENT_LIMIT_BYTES} bytes")


def check_whole(where: str, path: Path, num_bytes: int) -> None:
    """Raise `StoreError` for a download that lacks bytes, or has too many."""
    if (size_bytes := path.stat().st_size) != num_bytes:
        raise StoreError(f"{where}: {size_bytes} of {num_bytes} bytes came")
