"""What google-cloud-storage's errors mean: an outage, credentials, or a setting."""

from __future__ import annotations

from typing import Any

from job.store.retries import Fault, FaultKind

_NEEDED = (
    "the identity needs storage.objects.get, create, delete and list (role Storage Object User);"
    " without any, use Workload Identity or set GOOGLE_APPLICATION_CREDENTIALS"
)

_URL_ERRORS = {"InvalidSchema", "InvalidURL", "MissingSchema"}


def is_absent(error: Exception) -> bool:
    """Whether the object is missing; a missing bucket is another matter, told by the words only."""
    from google.api_core.exceptions import NotFound

    return isinstance(error, NotFound) and not _no_bucket(error)


def _no_bucket(error: Exception) -> bool:
    return "bucket does not exist" in str(error)


def diagnose(error: Exception, bucket: str) -> Fault | None:
    """What an error of the SDK or its HTTP library means; None if it is neither's."""
    import google.auth.exceptions as auth
    import requests.exceptions
    from google.api_core.exceptions import GoogleAPICallError, RetryError
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

    name = type(error).__name__
    if isinstance(error, RetryError) and isinstance(error.cause, Exception):
        return diagnose(error.cause, bucket)
    if isinstance(error, GoogleAPICallError | InvalidResponse):
        return _of_answer(error, bucket)
    if isinstance(error, auth.GoogleAuthError) and not isinstance(error, auth.TransportError):
        return Fault(FaultKind.CREDENTIALS, f"no usable credentials ({name}); {_NEEDED}")
    if name in _URL_ERRORS or "Bucket names must" in str(error):
        return Fault(FaultKind.SETTING, f"unusable bucket name or STORAGE_EMULATOR_HOST ({name})")
    passing = (
        auth.TransportError,
        requests.exceptions.RequestException,
        DataCorruption,
        RetryError,
    )
    if isinstance(error, (*passing, ConnectionError, TimeoutError)):
        return Fault(FaultKind.OUTAGE, f"no whole answer ({name})")
    return None


def _of_answer(error: Any, bucket: str) -> Fault:
    if _no_bucket(error):
        return Fault(FaultKind.SETTING, f"no bucket {bucket} there; create it first")
    answer = getattr(error, "response", None)
    status = int(getattr(error, "code", None) or getattr(answer, "status_code", None) or 0)
    shown = f"{type(error).__name__}, HTTP {status}"
    if status in (401, 403):
        kind = FaultKind.CREDENTIALS if status == 401 else FaultKind.PERMISSION
        return Fault(kind, f"refused ({shown}) in {bucket}; {_NEEDED}")
    if status in (408, 409, 429) or status < 400 or (status >= 500 and status != 501):
        return Fault(FaultKind.OUTAGE, f"the service fails or is busy ({shown})")
    return Fault(FaultKind.REFUSED, f"the service refuses the request ({shown})")
