"""`BucketStore`: the `Store` protocol on any bucket service that has conditional writes."""

from __future__ import annotations

import contextlib
import errno
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from job.errors import VOLUME_FULL
from job.progress import CountProgress
from job.store.base import Stored, check_key
from job.store.pace import slowness
from job.store.retries import Action, Fault, FaultKind, Limits, Retries

T = TypeVar("T")
OnProgress = Callable[[int], None]


class Listed(NamedTuple):
    """An object as listed; `version` is what `Bucket.fetch` compares."""

    key: str
    size_bytes: int
    version: str


class TransferProgress(Protocol):
    """Where a transfer reports its progress; several threads call it."""

    def expect(self, total: int) -> None:
        """Note how many bytes the object has."""

    def advance(self, num: int) -> None:
        """Note how many more bytes came; negative when a try starts over."""


class Expiry(NamedTuple):
    """A rule by which the service deletes objects under `prefix` by itself."""

    prefix: str
    when: str  # in words: "7 days after they were written"


class Bucket(Protocol):
    """The requests to one bucket service, each tried once; keys are whole, any prefix included.

    Errors are the SDK's own; `diagnose` says what they mean.
    """

    @property
    def uri(self) -> str:
        """Where the bucket is: `s3://bucket`, `gs://bucket` or `az://container`."""

    def read(self, key: str) -> Stored | None:
        """A small object and its version; None if absent."""

    def write(self, key: str, data: bytes, *, version: str | None) -> bool:
        """Write if the object's version is `version` (None: if absent); False if it is not."""

    def send(self, key: str, path: Path, on_progress: OnProgress) -> None:
        """Write a file of any size, in parallel parts where it is large."""

    def fetch(
        self, key: str, path: Path, progress: TransferProgress, *, version: str | None
    ) -> bool:
        """Read an object of any size into `path`; False if it, or that version of it, is absent."""

    def list(self, prefix: str, page: str | None) -> tuple[list[Listed], str | None]:
        """One page of the objects under a prefix, and the token of the next, None at the end."""

    def delete(self, key: str) -> None:
        """Remove an object; an absent one is no error."""

    def expiries(self) -> Sequence[Expiry] | None:
        """Rules by which the service deletes objects by itself; None where it tells none."""

    def diagnose(self, error: Exception) -> Fault | None:
        """What one of this bucket's errors means; None if it is not the service's."""

    def renew(self) -> None:
        """Look for credentials again before the next request."""


class BucketReader:
    """Listing and downloading with retries: what a store and a data source share."""

    def __init__(self, bucket: Bucket, limits: Limits, setting: str) -> None:
        self.bucket = bucket
        self._retries = Retries(limits, setting, diagnose=self._diagnose, renew=bucket.renew)

    def run(self, key: str, action: Action, attempt: Callable[[], T]) -> T:
        """Return what `attempt` returns, trying again as `Retries` says."""
        return self._retries.run(f"{self.bucket.uri}/{key}", action, attempt)

    def _page(self, prefix: str, page: str | None) -> tuple[list[Listed], str | None]:
        return self.run(prefix, Action.LIST, lambda: self.bucket.list(prefix, page))

    def list(self, prefix: str) -> Iterator[Listed]:
        """Every object whose key starts with `prefix`, sorted by key."""
        found: list[Listed] = []
        page: str | None = None
        while True:
            objects, page = self._page(prefix, page)
            found += objects
            if page is None:
                return iter(sorted(found))

    def download(
        self, key: str, path: Path, progress: TransferProgress, *, version: str | None = None
    ) -> bool:
        """Replace `path` by the object in one step; False if it is absent."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
        counted = _Counted(progress)

        def attempt() -> bool:
            counted.start_over()
            return self.bucket.fetch(key, temporary, counted, version=version)

        try:
            found = self.run(key, Action.READ, attempt)
            if found:
                temporary.replace(path)
            return found
        finally:
            temporary.unlink(missing_ok=True)

    def upload(self, key: str, path: Path, progress: TransferProgress) -> None:
        """Send a file, from its beginning in every try."""
        counted = _Counted(progress)

        def attempt() -> None:
            counted.start_over()
            self.bucket.send(key, path, counted.advance)

        self.run(key, Action.WRITE, attempt)

    def _diagnose(self, error: Exception) -> Fault | None:
        if isinstance(error, OSError) and error.errno in VOLUME_FULL:
            reason = f"{error.filename or 'work volume'}: {error.strerror}; free space on it"
            return Fault(FaultKind.REFUSED, reason)
        if slow := slowness(error):
            return Fault(FaultKind.OUTAGE, f"the service is too slow ({slow})")
        return self.bucket.diagnose(error)


class BucketStore:
    """The `Store` protocol under a prefix of a bucket."""

    def __init__(self, bucket: Bucket, prefix: str, limits: Limits, setting: str) -> None:
        self._reader = BucketReader(bucket, limits, setting)
        self._bucket = bucket
        self._top = f"{prefix}/" if prefix else ""

    @property
    def uri(self) -> str:
        return f"{self._bucket.uri}/{self._top}".rstrip("/")

    def expiries(self) -> Sequence[Expiry] | None:
        """The rules by which the bucket would delete objects of ours; None where it does not say.

        Asked once, without retries: it takes a permission that a trial does not need.
        """
        try:
            rules = self._bucket.expiries()
        except Exception as error:
            if self._bucket.diagnose(error) is None:
                raise
            return None
        return rules and [
            rule
            for rule in rules
            if rule.prefix.startswith(self._top) or self._top.startswith(rule.prefix)
        ]

    def get(self, key: str) -> Stored | None:
        full = self._full(key)
        return self._reader.run(full, Action.READ, lambda: self._bucket.read(full))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._write(key, data, version=None)

    def put_if_version(self, key: str, data: bytes, version: str) -> bool:
        return self._write(key, data, version=version)

    def upload(self, key: str, path: Path) -> None:
        full = self._full(key)
        with CountProgress(f"upload of {key}", "bytes", total=path.stat().st_size) as progress:
            self._reader.upload(full, path, progress)

    def download(self, key: str, path: Path) -> None:
        with CountProgress(f"download of {key}", "bytes") as progress:
            found = self._reader.download(self._full(key), path, progress)
        if not found:
            raise FileNotFoundError(errno.ENOENT, "no such object", f"{self.uri}/{key}")

    def list(self, prefix: str) -> Iterator[str]:
        for listed in self._reader.list(self._top + prefix):
            key = listed.key.removeprefix(self._top)
            with contextlib.suppress(ValueError):  # not one of ours: it is left alone
                yield check_key(key)

    def delete(self, key: str) -> None:
        full = self._full(key)
        self._reader.run(full, Action.DELETE, lambda: self._bucket.delete(full))

    def _write(self, key: str, data: bytes, *, version: str | None) -> bool:
        full = self._full(key)
        write = partial(self._bucket.write, full, data, version=version)
        return self._reader.run(full, Action.WRITE, write)

    def _full(self, key: str) -> str:
        return self._top + check_key(key)


class _Counted:
    """Reports the bytes of one try, and takes them back when the next one starts over."""

    def __init__(self, progress: TransferProgress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._num_bytes = 0

    def start_over(self) -> None:
        if self._num_bytes:
            self.advance(-self._num_bytes)

    def expect(self, total: int) -> None:
        self._progress.expect(total)

    def advance(self, num: int) -> None:
        with self._lock:
            self._num_bytes += num
        self._progress.advance(num)
