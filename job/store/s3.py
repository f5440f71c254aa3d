"""`S3Bucket`: Amazon S3 and servers that speak it, through boto3.

Credentials, region, endpoint (`AWS_ENDPOINT_URL_S3`), checksums: boto3's own variables and files.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.store.base import Stored, check_document_size, check_whole
from job.store.bucket import BucketStore, Expiry, Listed, OnProgress, TransferProgress
from job.store.retries import Fault, Limits
from job.store.s3_faults import diagnose, error_code

if TYPE_CHECKING:
    from s3transfer.manager import TransferManager

_PART_BYTES = 8 * 2**20  # S3 allows 10,000 parts: s3transfer enlarges them beyond 80 GB
_PARALLEL_PARTS = 10
_ABSENT = {"NoSuchKey", "404", "NoSuchVersion"}
# Keys of what is kept in the context that boto3 hands from one try of a request to the next.
_BEGUN, _ANSWER = "job_begun", "job_answer"
_CONDITION_FAILED = {"PreconditionFailed", "412"}


def open_s3_store(name: str, prefix: str, limits: Limits, setting: str) -> BucketStore:
    """The `Store` under a prefix of an S3 bucket; sends nothing yet."""
    return BucketStore(S3Bucket(name, limits), prefix, limits, setting)


class S3Bucket:
    """The `Bucket` protocol on S3; a version is an ETag."""

    def __init__(self, name: str, limits: Limits) -> None:
        self._name = name
        self._limits = limits
        self._lock = threading.Lock()
        self._client: Any = None

    @property
    def uri(self) -> str:
        return f"s3://{self._name}"

    def read(self, key: str) -> Stored | None:
        try:
            answer = self._s3().get_object(Bucket=self._name, Key=key)
        except Exception as error:
            if error_code(error) in _ABSENT:
                return None
            raise
        with answer["Body"] as body:
            check_document_size(f"{self.uri}/{key}", answer["ContentLength"])
            return Stored(body.read(), answer["ETag"])

    def write(self, key: str, data: bytes, *, version: str | None) -> bool:
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        try:
            self._s3().put_object(Bucket=self._name, Key=key, Body=data, **condition)
        except Exception as error:
            # 409 means that a rival is at it and nobody has won yet: that one is tried again.
            if error_code(error) in (_CONDITION_FAILED | (_ABSENT if version else set())):
                return False
            raise
        return True

    def send(self, key: str, path: Path, on_progress: OnProgress) -> None:
        size_bytes = path.stat().st_size
        if size_bytes < _PART_BYTES:
            with path.open("rb") as file:
                self._s3().put_object(Bucket=self._name, Key=key, Body=file)
            on_progress(size_bytes)
            return
        with self._transfers() as transfers:
            watcher = _Watcher(on_progress, size_bytes, None)
            transfers.upload(str(path), self._name, key, subscribers=[watcher]).result()

    def fetch(
        self, key: str, path: Path, progress: TransferProgress, *, version: str | None
    ) -> bool:
        condition = {"IfMatch": version} if version else {}
        try:
            answer = self._s3().get_object(Bucket=self._name, Key=key, **condition)
        except Exception as error:
            if error_code(error) in (_ABSENT | (_CONDITION_FAILED if version else set())):
                return False
            raise
        size_bytes = answer["ContentLength"]
        progress.expect(size_bytes)
        with answer["Body"] as body:
            if size_bytes < _PART_BYTES:  # botocore checks its checksum, where it has one
                path.write_bytes(body.read())
                progress.advance(size_bytes)
                return True
        with self._transfers() as transfers:  # every part asks for this ETag
            watcher = _Watcher(progress.advance, size_bytes, answer["ETag"])
            transfers.download(self._name, key, str(path), subscribers=[watcher]).result()
        check_whole(f"{self.uri}/{key}", path, size_bytes)
        return True

    def list(self, prefix: str, page: str | None) -> tuple[list[Listed], str | None]:
        token = {"ContinuationToken": page} if page else {}
        answer = self._s3().list_objects_v2(Bucket=self._name, Prefix=prefix, **token)
        objects = [Listed(o["Key"], o["Size"], o["ETag"]) for o in answer.get("Contents", [])]
        return objects, answer.get("NextContinuationToken")

    def delete(self, key: str) -> None:
        self._s3().delete_object(Bucket=self._name, Key=key)

    def expiries(self) -> Sequence[Expiry]:
        try:
            answer = self._s3().get_bucket_lifecycle_configuration(Bucket=self._name)
        except Exception as error:
            if error_code(error) == "NoSuchLifecycleConfiguration":
                return []
            raise
        return [
            Expiry(_prefix_of(rule), _when(rule["Expiration"]))
            for rule in answer.get("Rules", [])
            if rule["Status"] == "Enabled" and {"Days", "Date"} & set(rule.get("Expiration", ()))
        ]

    def diagnose(self, error: Exception) -> Fault | None:
        return diagnose(error, self._name)

    def renew(self) -> None:
        with self._lock:  # a client that found no credentials would never look again
            self._client = None

    def _s3(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = _connect(self._limits)
            return self._client

    def _transfers(self) -> TransferManager:
        from s3transfer.manager import TransferConfig, TransferManager

        config = TransferConfig(
            multipart_threshold=_PART_BYTES,
            multipart_chunksize=_PART_BYTES,
            max_request_concurrency=_PARALLEL_PARTS,
            max_io_queue_size=200,  # of 256 kB: at most 50 MB wait for the disk
        )
        return TransferManager(self._s3(), config)


def _prefix_of(rule: dict[str, Any]) -> str:
    """A lifecycle rule's prefix, which has been in three places over the years."""
    found = rule.get("Filter", {})
    places = (found, found.get("And", {}), rule)
    return next((str(place["Prefix"]) for place in places if place.get("Prefix")), "")


def _when(expiration: dict[str, Any]) -> str:
    if "Days" in expiration:
        return f"{expiration['Days']} days after they were written"
    return f"on {expiration['Date']:%Y-%m-%d}"


class _Watcher:
    """A subscriber of s3transfer: counts bytes; tells size and ETag, so that no HEAD is sent."""

    def __init__(self, on_progress: OnProgress, size_bytes: int, etag: str | None) -> None:
        self._on_progress = on_progress
        self._size_bytes = size_bytes
        self._etag = etag

    def on_queued(self, future: Any, **_: object) -> None:
        future.meta.provide_transfer_size(self._size_bytes)
        if self._etag:
            future.meta.provide_object_etag(self._etag)

    def on_progress(self, bytes_transferred: int, **_: object) -> None:
        self._on_progress(bytes_transferred)


def _connect(limits: Limits) -> Any:
    import boto3
    import botocore.session
    from botocore.config import Config

    from job.store.transport import Sender

    # Servers of one's own rarely have a host name for each bucket. boto3 has no variable for this.
    own_server = {"AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"} & set(os.environ)
    config = Config(
        connect_timeout=limits.connect_seconds,
        read_timeout=limits.read_seconds,
        retries={"mode": "standard", "total_max_attempts": limits.attempts},
        max_pool_connections=2 * _PARALLEL_PARTS,
        s3={"addressing_style": "path"} if own_server else None,
    )
    # A session of our own: boto3's default one is not safe across threads and keeps what it found.
    session = botocore.session.get_session()
    # boto3 alone of all SDKs does not read AWS_REGION, which EKS and others set.
    elsewhere = session.get_config_variable("region") is None
    region = os.environ.get("AWS_REGION") if elsewhere else None
    client = boto3.session.Session(botocore_session=session, region_name=region).client(
        "s3", config=config
    )
    sender = Sender(
        limits,
        num_connections=config.max_pool_connections,
        ca_bundle=session.get_config_variable("ca_bundle"),
    )
    client.meta.events.register("before-send.s3", sender)
    client.meta.events.register("request-created.s3", partial(_end_retries, limits.seconds_in_sdk))
    client.meta.events.register("response-received.s3", _note_answer)
    return client


def _end_retries(seconds: float, request: Any, operation_name: str, **_: object) -> None:
    """Raise the last try's error before another one, when the tries took too long together.

    A transfer of slow parts would otherwise stay in boto3 for ten times the pace's two minutes.
    """
    begun = request.context.setdefault(_BEGUN, time.monotonic())
    if time.monotonic() - begun < seconds or _ANSWER not in request.context:
        return
    error, answer = request.context[_ANSWER]
    if error is None:
        from botocore.exceptions import ClientError

        error = ClientError(answer or {}, operation_name)
    raise error


def _note_answer(context: Any, exception: Any, parsed_response: Any, **_: object) -> None:
    context[_ANSWER] = exception, parsed_response
