"""`AzureBucket`: a container of Azure Blob Storage through azure-storage-blob, the extra `azure`.

Account and credentials are named by the variables of Azure's own command line: a connection
string, or an account with a SAS token, a key, or else Entra ID (`DefaultAzureCredential`: workload
identity, managed identity, a service principal's variables, `az login`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from job.errors import SettingsError
from job.store.azure_faults import diagnose, error_code
from job.store.base import Stored, check_document_size, check_whole
from job.store.bucket import BucketStore, Expiry, Listed, OnProgress, TransferProgress
from job.store.retries import Fault, Limits

_PART_BYTES = 8 * 2**20  # a blob has at most 50,000 blocks: 400 GB
_PARALLEL_PARTS = 10
_CREDENTIALS = "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT and what vouches for you"
_ABSENT = {"BlobNotFound", "ResourceNotFound"}
_EXISTS = {"BlobAlreadyExists", "ConditionNotMet", "TargetConditionNotMet"}


def open_azure_store(name: str, prefix: str, limits: Limits, setting: str) -> BucketStore:
    """The `Store` under a prefix of a container; sends nothing yet."""
    return BucketStore(open_azure_bucket(name, limits, setting), prefix, limits, setting)


def open_azure_bucket(name: str, limits: Limits, setting: str) -> AzureBucket:
    """The `Bucket` of this name; `SettingsError` without the extra, or without an account."""
    try:
        import azure.identity
        import azure.storage.blob  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            f"{setting}: az:// needs azure-storage-blob and azure-identity:"
            " pip install 'qlora-sweep-job[azure]'"
        ) from error
    if not {"AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT"} & set(os.environ):
        raise SettingsError(f"{setting}: az:// names no storage account; set {_CREDENTIALS}")
    return AzureBucket(name, limits, setting)


class AzureBucket:
    """The `Bucket` protocol on a container of Azure Blob Storage; a version is an ETag."""

    def __init__(self, name: str, limits: Limits, setting: str) -> None:
        self._name = name
        self._limits = limits
        self._setting = setting
        self._lock = threading.Lock()
        self._container: Any = None

    @property
    def uri(self) -> str:
        return f"az://{self._name}"

    def read(self, key: str) -> Stored | None:
        try:
            stream = self._azure().download_blob(key, max_concurrency=1)
            check_document_size(f"{self.uri}/{key}", stream.size)
            return Stored(stream.readall(), stream.properties.etag)
        except Exception as error:
            if error_code(error) in _ABSENT:
                return None
            raise

    def write(self, key: str, data: bytes, *, version: str | None) -> bool:
        from azure.core import MatchConditions

        condition: dict[str, Any] = {"overwrite": False}
        if version is not None:
            unchanged = MatchConditions.IfNotModified
            condition = {"overwrite": True, "etag": version, "match_condition": unchanged}
        try:
            self._azure().upload_blob(key, data, length=len(data), **condition)
        except Exception as error:
            # Other 409s and 412s (a lease of somebody's, a retention policy) are no rival's.
            if error_code(error) in (_EXISTS | (_ABSENT if version else set())):
                return False
            raise
        return True

    def send(self, key: str, path: Path, on_progress: OnProgress) -> None:
        with path.open("rb") as file:
            self._azure().upload_blob(
                key,
                file,
                length=path.stat().st_size,
                overwrite=True,
                max_concurrency=_PARALLEL_PARTS,
                validate_content=True,  # the service compares the MD5 of every block
                progress_hook=_Progress(on_progress),
            )

    def fetch(
        self, key: str, path: Path, progress: TransferProgress, *, version: str | None
    ) -> bool:
        from azure.core import MatchConditions

        condition: dict[str, Any] = {}
        if version is not None:
            condition = {"etag": version, "match_condition": MatchConditions.IfNotModified}
        try:
            stream = self._azure().download_blob(
                key,
                max_concurrency=_PARALLEL_PARTS,
                progress_hook=_Progress(progress.advance),
                **condition,
            )
            progress.expect(stream.size)
            with path.open("wb") as file:  # every part asks for the first one's ETag
                stream.readinto(file)
        except Exception as error:
            if error_code(error) in (_ABSENT | ({"ConditionNotMet"} if version else set())):
                return False
            raise
        check_whole(f"{self.uri}/{key}", path, stream.size)
        return True

    def list(self, prefix: str, page: str | None) -> tuple[list[Listed], str | None]:
        blobs = self._azure().list_blobs(name_starts_with=prefix, include=["metadata"])
        pages = blobs.by_page(continuation_token=page)
        objects = [
            Listed(blob.name, blob.size, _quoted(blob.etag))
            for blob in next(pages, ())
            if (blob.metadata or {}).get("hdi_isfolder") != "true"  # of a hierarchical namespace
        ]
        return objects, pages.continuation_token or None

    def delete(self, key: str) -> None:
        try:
            self._azure().delete_blob(key, delete_snapshots="include")
        except Exception as error:
            if error_code(error) not in _ABSENT:
                raise

    def expiries(self) -> Sequence[Expiry] | None:
        return None  # lifecycle rules are the account's, behind another service

    def diagnose(self, error: Exception) -> Fault | None:
        return diagnose(error, self._name)

    def renew(self) -> None:
        with self._lock:  # a credential that found nothing would never look again
            self._container = None

    def _azure(self) -> Any:
        with self._lock:
            if self._container is None:
                try:
                    self._container = _connect(self._name, self._limits)
                except ValueError as error:
                    raise SettingsError(
                        f"{self._setting}: {self.uri}: unusable AZURE_STORAGE_CONNECTION_STRING,"
                        f" AZURE_STORAGE_SERVICE_ENDPOINT or container name ({error})"
                    ) from error
            return self._container


def _quoted(etag: str) -> str:
    """An ETag as headers have it; in a listing it stands without its quotes."""
    return '"{}"'.format(etag.strip('"'))


def _connect(name: str, limits: Limits) -> Any:
    """A client whose connections keep the pace. Raises `ValueError` for what names no container."""
    from azure.storage.blob import ContainerClient

    options = {
        "transport": _transport(limits),
        "retry_policy": _retry_policy(limits),
        "max_single_put_size": _PART_BYTES,
        "max_block_size": _PART_BYTES,
        "max_single_get_size": _PART_BYTES,
        "max_chunk_get_size": _PART_BYTES,
    }
    if connection := os.environ.get("AZURE_STORAGE_CONNECTION_STRING"):
        return ContainerClient.from_connection_string(connection, name, **options)
    return ContainerClient(_account_url(), name, credential=_credential(), **options)


def _transport(limits: Limits) -> Any:
    import requests
    from azure.core.pipeline.transport import RequestsTransport

    from job.store.transport import mount

    session = requests.Session()
    mount(session, limits, num_connections=2 * _PARALLEL_PARTS)
    return RequestsTransport(
        session=session,
        session_owner=False,
        connection_timeout=limits.connect_seconds,
        read_timeout=limits.read_seconds,
    )


def _retry_policy(limits: Limits) -> Any:
    """As many tries as fit into the SDK's time if each ends by silence."""
    from azure.storage.blob import ExponentialRetry

    tries = min(limits.attempts, int(limits.seconds_in_sdk / limits.read_seconds))
    again = max(0, tries - 1)
    return ExponentialRetry(
        initial_backoff=0,
        increment_base=2,
        random_jitter_range=1,
        retry_total=again,
        retry_connect=again,
        retry_read=again,
        retry_status=again,
    )


def _account_url() -> str:
    endpoint = os.environ.get("AZURE_STORAGE_SERVICE_ENDPOINT")
    return endpoint or f"https://{os.environ['AZURE_STORAGE_ACCOUNT']}.blob.core.windows.net"


def _credential() -> Any:
    """What vouches for us: a SAS token, the account's key, or an identity of Entra ID."""
    from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential

    if token := os.environ.get("AZURE_STORAGE_SAS_TOKEN"):
        return AzureSasCredential(token.removeprefix("?"))
    if key := os.environ.get("AZURE_STORAGE_KEY"):
        return AzureNamedKeyCredential(os.environ["AZURE_STORAGE_ACCOUNT"], key)
    from azure.identity import DefaultAzureCredential

    return DefaultAzureCredential()


class _Progress:
    """The SDK's progress hook: it tells what has come in all, its threads not always in order."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._told = 0

    def __call__(self, num_bytes: int, _total: int | None) -> None:
        with self._lock:
            more = max(0, num_bytes - self._told)
            self._told += more
        self._on_progress(more)
