"""What google-cloud-storage's errors mean: an outage, this node, credentials, or a setting.

Statuses and reasons: https://cloud.google.com/storage/docs/json_api/v1/status-codes.
"""

from __future__ import annotations

import re
from typing import Any

from job.store.retries import SKEW_HINT, Fault, FaultKind, in_one_line, is_bad_header

_NEEDED = (
    "the identity needs storage.objects.get, create, delete and list (role Storage Object User);"
    " without any, use Workload Identity or set GOOGLE_APPLICATION_CREDENTIALS"
)

# 403 with these reasons is a quota's, and passes.
_BUSY = {
    "rateLimitExceeded", "userRateLimitExceeded", "quotaExceeded", "dailyLimitExceeded",
    "concurrentLimitExceeded",
}  # fmt: skip
_SKEWED = re.compile("reasonable timeframe|issued in the future|used too early", re.IGNORECASE)
# What a sentence means where the status alone would mislead.
_MEANINGS = (
    (
        "requester pays",  # 400
        FaultKind.PERMISSION,
        "refused ({}); this job never pays as a requester: copy what it needs to a bucket of yours",
    ),
    (  # https://cloud.google.com/vpc-service-controls/docs/troubleshooting
        "prohibited by organization's policy",
        FaultKind.PERMISSION,
        "refused ({}); let the nodes' network and identity through VPC Service Controls",
    ),
    (
        r"\bKMS\b",
        FaultKind.PERMISSION,
        (
            "refused by the bucket's key ({}); Cloud Storage's own service account needs"
            " roles/cloudkms.cryptoKeyEncrypterDecrypter on an enabled key"
        ),
    ),
    (
        "retention policy|[Rr]etention config|under active .*hold",
        FaultKind.SETTING,
        "the bucket keeps every object ({}); name one without a retention policy or holds",
    ),
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

    if isinstance(error, RetryError) and isinstance(error.cause, Exception):
        return diagnose(error.cause, bucket)
    if isinstance(error, GoogleAPICallError | InvalidResponse):
        return _of_answer(error, bucket)
    if fault := _unsent(error):
        return fault
    passing = (
        auth.TransportError,
        requests.exceptions.RequestException,
        DataCorruption,
        RetryError,
    )
    if isinstance(error, (*passing, ConnectionError, TimeoutError)):
        return Fault(FaultKind.OUTAGE, f"no whole answer ({type(error).__name__})")
    return None


def _unsent(error: Exception) -> Fault | None:
    """What the error means if it kept the SDK from sending the request; None if it did not."""
    import google.auth.exceptions as auth

    name = type(error).__name__
    if is_bad_header(error):
        return Fault(
            FaultKind.SETTING,
            "the credentials hold a line break, which no header may (Invalid header value); make"
            " GOOGLE_APPLICATION_CREDENTIALS' file again",
        )
    if isinstance(error, auth.GoogleAuthError) and not isinstance(error, auth.TransportError):
        words = in_one_line(error.args[0] if error.args else "")
        if _SKEWED.search(words):
            return Fault(FaultKind.NODE, f"refused ({words}); {SKEW_HINT}")
        said = f"{name}: {words}" if words else name
        return Fault(FaultKind.CREDENTIALS, f"no usable credentials ({said}); {_NEEDED}")
    if name in _URL_ERRORS or "Bucket names must" in str(error):
        return Fault(FaultKind.SETTING, f"unusable bucket name or STORAGE_EMULATOR_HOST ({name})")
    return None


def _of_answer(error: Any, bucket: str) -> Fault:
    answer = getattr(error, "response", None)
    status = int(getattr(error, "code", None) or getattr(answer, "status_code", None) or 0)
    reason, words = _said(error)
    shown = f"{type(error).__name__}, HTTP {status}" + (f": {words}" if words else "")
    if _no_bucket(error):
        return Fault(FaultKind.SETTING, f"no bucket {bucket} there ({shown}); create it first")
    busy = status in (408, 409, 429) or status < 400 or (status >= 500 and status != 501)
    if busy or (status == 403 and reason in _BUSY):
        return Fault(FaultKind.OUTAGE, f"the service fails or is busy ({shown})")
    for pattern, kind, text in _MEANINGS:
        if re.search(pattern, words):
            return Fault(kind, text.format(shown))
    if status in (401, 403):
        kind = FaultKind.CREDENTIALS if status == 401 else FaultKind.PERMISSION
        return Fault(kind, f"refused ({shown}) in {bucket}; {_NEEDED}")
    return Fault(FaultKind.REFUSED, f"the service refuses the request ({shown})")


def _said(error: Any) -> tuple[str, str]:
    """The service's reason and sentence, "" where it gives none."""
    try:  # an upload's error holds the answer as text only
        said = error.response.json()["error"]
        details: Any = next(iter(said.get("errors", ())), {})
        return str(details.get("reason", "")), in_one_line(said["message"])
    except (AttributeError, KeyError, TypeError, ValueError):  # no answer, or not Google's
        return "", in_one_line(getattr(error, "message", None))
