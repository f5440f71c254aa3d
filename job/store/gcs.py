"""`GcsBucket`: Google Cloud Storage through google-cloud-storage, the extra `gcs`.

Credentials: Google's application default ones. Large files go in one stream each way, which the
SDK resumes where it broke off and checks by crc32c.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from job.errors import SettingsError, StoreError
from job.store.base import Stored, check_document_size
from job.store.bucket import BucketStore, Expiry, Listed, OnProgress, TransferProgress
from job.store.gcs_faults import diagnose, is_absent
from job.store.retries import Fault, Limits

_RESUMABLE_BYTES = 8 * 2**20  # from here on an upload is resumable, not one request
_NUM_CONNECTIONS = 20  # kept open, as to the other buckets
_CHUNK_BYTES = 32 * 2**20  # a resumed upload repeats at most this much; a multiple of 256 KiB


def open_gcs_store(name: str, prefix: str, limits: Limits, setting: str) -> BucketStore:
    """The `Store` under a prefix of a GCS bucket; sends nothing yet."""
    return BucketStore(open_gcs_bucket(name, limits, setting), prefix, limits, setting)


def open_gcs_bucket(name: str, limits: Limits, setting: str) -> GcsBucket:
    """The `Bucket` of this name on GCS; `SettingsError` where the extra is not installed."""
    try:
        import google.cloud.storage  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            f"{setting}: gs:// needs google-cloud-storage: pip install 'qlora-sweep-job[gcs]'"
        ) from error
    return GcsBucket(name, limits)


class GcsBucket:
    """The `Bucket` protocol on GCS; a version is an object's generation."""

    def __init__(self, name: str, limits: Limits) -> None:
        self._name = name
        self._timeout = (limits.connect_seconds, limits.read_seconds)
        self._limits = limits
        self._lock = threading.Lock()
        self._bucket: Any = None

    @property
    def uri(self) -> str:
        return f"gs://{self._name}"

    def read(self, key: str) -> Stored | None:
        blob = self._gcs().blob(key)
        try:
            data = blob.download_as_bytes(timeout=self._timeout, retry=None)
        except Exception as error:
            if is_absent(error):
                return None
            raise
        check_document_size(f"{self.uri}/{key}", len(data))
        if not blob.generation:  # content and generation must come in one answer
            raise StoreError(f"{self.uri}/{key}: the service names no generation of the object")
        return Stored(data, str(blob.generation))

    def write(self, key: str, data: bytes, *, version: str | None) -> bool:
        from google.api_core.exceptions import PreconditionFailed

        try:
            self._gcs().blob(key).upload_from_string(
                data,
                content_type="application/json",
                if_generation_match=int(version) if version else 0,
                timeout=self._timeout,
                retry=None,  # Retries tries again, and documents.py tells whose the object is
            )
        except PreconditionFailed:
            return False
        except Exception as error:
            if version and is_absent(error):
                return False
            raise
        return True

    def send(self, key: str, path: Path, on_progress: OnProgress) -> None:
        size_bytes = path.stat().st_size
        large = size_bytes >= _RESUMABLE_BYTES
        blob = self._gcs().blob(key, chunk_size=_CHUNK_BYTES if large else None)
        with path.open("rb") as file:
            blob.upload_from_file(
                _Watched(file, on_progress),
                size=size_bytes,
                timeout=self._timeout,
                retry=self._resuming() if large else None,
            )

    def fetch(
        self, key: str, path: Path, progress: TransferProgress, *, version: str | None
    ) -> bool:
        blob = self._gcs().blob(key, generation=int(version) if version else None)
        try:
            blob.reload(timeout=self._timeout, retry=None)
            progress.expect(blob.size or 0)
            # A resumed download must go on in the same generation.
            blob = self._gcs().blob(key, generation=blob.generation)
            with path.open("wb") as file:
                blob.download_to_file(
                    _Watched(file, progress.advance), timeout=self._timeout, retry=self._resuming()
                )
        except Exception as error:
            if is_absent(error):
                return False
            raise
        return True

    def list(self, prefix: str, page: str | None) -> tuple[list[Listed], str | None]:
        pages = self._gcs().list_blobs(
            prefix=prefix, page_token=page, timeout=self._timeout, retry=None
        )
        blobs = next(pages.pages, ())
        objects = [Listed(blob.name, blob.size, str(blob.generation)) for blob in blobs]
        return objects, pages.next_page_token

    def delete(self, key: str) -> None:
        try:
            self._gcs().blob(key).delete(timeout=self._timeout, retry=None)
        except Exception as error:
            if not is_absent(error):
                raise

    def expiries(self) -> Sequence[Expiry]:
        bucket = self._gcs()
        bucket.reload(timeout=self._timeout, retry=None)
        found = []
        for rule in bucket.lifecycle_rules:
            condition = rule.get("condition", {})
            if rule.get("action", {}).get("type") != "Delete" or condition.get("isLive") is False:
                continue  # versions that were overwritten are nothing of ours
            age = condition.get("age")
            when = "by another condition" if age is None else f"{age} days after they were written"
            found += [Expiry(prefix, when) for prefix in condition.get("matchesPrefix", [""])]
        return found

    def diagnose(self, error: Exception) -> Fault | None:
        return diagnose(error, self._name)

    def renew(self) -> None:
        with self._lock:
            self._bucket = None

    def _gcs(self) -> Any:
        with self._lock:
            if self._bucket is None:
                self._bucket = _connect(self._limits).bucket(self._name)
            return self._bucket

    def _resuming(self) -> Any:
        from google.cloud.storage.retry import DEFAULT_RETRY

        return DEFAULT_RETRY.with_timeout(self._limits.seconds_in_sdk)


def _connect(limits: Limits) -> Any:
    """A client whose connections keep the pace; mutual TLS, where it is set up, keeps its own.

    The constructor's argument `_http` is in Google's reference, though it may change; there is no
    other for a session. tests/store/test_pace.py sees it if it does.
    """
    import google.auth
    from google.auth.credentials import AnonymousCredentials
    from google.auth.transport.requests import AuthorizedSession
    from google.cloud import storage

    from job.store.transport import mount

    if os.environ.get("STORAGE_EMULATOR_HOST"):
        credentials = AnonymousCredentials()
    else:
        credentials, _ = google.auth.default(scopes=storage.Client.SCOPE)
    session = AuthorizedSession(credentials, refresh_timeout=limits.credentials_seconds)
    mount(session, limits, num_connections=_NUM_CONNECTIONS)
    session.configure_mtls_channel()
    return storage.Client(project=None, credentials=credentials, _http=session)


class _Watched:
    """A file that reports how many bytes went through it; a step back counts as negative."""

    def __init__(self, file: BinaryIO, on_progress: OnProgress) -> None:
        self._file = file
        self._on_progress = on_progress

    def read(self, num_bytes: int = -1) -> bytes:
        data = self._file.read(num_bytes)
        self._on_progress(len(data))
        return data

    def write(self, data: bytes) -> int:
        self._on_progress(len(data))
        return self._file.write(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        before = self._file.tell()
        after = self._file.seek(offset, whence)
        self._on_progress(after - before)
        return after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
