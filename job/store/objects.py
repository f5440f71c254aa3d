"""Objects of a bucket that other people wrote: any key names, read-only."""

from __future__ import annotations

import functools
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from job.errors import SettingsError, StoreError
from job.store.bucket import BucketReader
from job.store.retries import Limits


@dataclass(frozen=True)
class ObjectInfo:
    """An object as listed: its whole key in the bucket, its size and the service's version tag."""

    key: str
    size_bytes: int
    version: str  # S3, Azure: ETag; GCS: generation


def list_objects(
    uri: str, *, setting: str = "JOB_DATASET_URI", outage_seconds: float = 1200
) -> list[ObjectInfo]:
    """Every object whose key starts with the prefix of `s3://bucket/prefix`, `gs://…` or `az://…`.

    Sorted by key. Folder markers (empty objects whose key ends in "/") are left out. Empty if there
    is none.
    Raises `SettingsError` (no such bucket), `CredentialsError` and `StoreError`.
    """
    reader, prefix = _open(uri, setting, outage_seconds)
    return [
        ObjectInfo(listed.key, listed.size_bytes, listed.version)
        for listed in reader.list(prefix)
        if not listed.key.endswith("/")
    ]


def download_object(
    uri: str,
    info: ObjectInfo,
    path: Path,
    on_progress: Callable[[int], None],
    *,
    setting: str = "JOB_DATASET_URI",
    outage_seconds: float = 1200,
) -> None:
    """Fetch exactly the listed version of an object to `path`, which is replaced in one step.

    `uri` names the bucket (its prefix is not looked at). `on_progress` is called with the bytes
    that arrived since its last call, from other threads too, negative when a try starts over.
    Raises `StoreError` if the object is gone or was changed since it was listed.
    """
    reader, _ = _open(uri, setting, outage_seconds)
    where = f"{reader.bucket.uri}/{info.key}"
    whole = path.with_name(f".whole-{uuid.uuid4().hex}")  # downloaded, its size not yet checked
    try:
        if not reader.download(info.key, whole, _Bytes(on_progress), version=info.version):
            raise StoreError(f"{where}: was changed or removed while it was read; run again")
        if whole.stat().st_size != info.size_bytes:
            raise StoreError(
                f"{where}: {whole.stat().st_size} bytes came, {info.size_bytes} were listed"
            )
        whole.replace(path)
    finally:
        whole.unlink(missing_ok=True)


def _open(uri: str, setting: str, outage_seconds: float) -> tuple[BucketReader, str]:
    scheme, _, rest = uri.partition("://")
    name, _, prefix = rest.partition("/")
    if not name or scheme not in ("s3", "gs", "az"):
        raise SettingsError(f"{setting}: allowed: s3://bucket/prefix, gs:// or az://")
    prefixes = ("AWS_", "AZURE_", "GOOGLE_", "STORAGE_")
    environment = tuple(sorted(v for v in os.environ.items() if v[0].startswith(prefixes)))
    return _reader(scheme, name, setting, outage_seconds, environment), prefix


@functools.lru_cache(maxsize=4)  # a new boto3 client costs 0.1 s, and there may be many shards
def _reader(
    scheme: str, name: str, setting: str, outage_seconds: float, _: tuple[tuple[str, str], ...]
) -> BucketReader:
    """The bucket's reader, kept for later calls under the same credentials and endpoint."""
    limits = Limits(outage_seconds=outage_seconds)
    if scheme == "s3":
        from job.store.s3 import S3Bucket

        return BucketReader(S3Bucket(name, limits), limits, setting)
    if scheme == "az":
        from job.store.azure import open_azure_bucket

        return BucketReader(open_azure_bucket(name, limits, setting), limits, setting)
    from job.store.gcs import open_gcs_bucket

    return BucketReader(open_gcs_bucket(name, limits, setting), limits, setting)


@dataclass(frozen=True)
class _Bytes:
    """A `TransferProgress` that passes on the bytes only: the listing has told the size."""

    advance: Callable[[int], None]

    def expect(self, total: int) -> None:
        pass
