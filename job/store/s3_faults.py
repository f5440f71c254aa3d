"""What boto3's errors mean: an outage, this node, credentials, the data, or a setting.

S3 gives its codes at https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html; other
servers have more. A status is shared by many of them (403 by wrong clocks, full quotas, archived
objects), so code and sentence are looked at first, and the sentence stands in the line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from job.store.retries import SKEW_HINT, Fault, FaultKind, in_one_line, is_bad_header

_NEEDED = (
    "the identity needs s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket; without"
    " any, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or give the pod a service account"
)
_REFUSED = {
    "AuthFailure", "ExpiredToken", "ExpiredTokenException", "IDPRejectedClaim",
    "InvalidAccessKeyId", "InvalidClientTokenId", "InvalidIdentityToken",
    "InvalidToken", "SignatureDoesNotMatch", "TokenRefreshRequired",
    "UnrecognizedClientException",
}  # fmt: skip
_PASSING = {  # 4xx that another try can cure
    "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "OperationAborted",
    "RequestTimeout", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch",
}  # fmt: skip
_REGION = {
    "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect",
}  # fmt: skip
_CHECKSUMS = "set AWS_REQUEST_CHECKSUM_CALCULATION={0} and AWS_RESPONSE_CHECKSUM_VALIDATION={0}"
# What "status code: sentence" means where the status alone would mislead; the first row counts.
_MEANINGS = (
    (  # STS tells a wrong clock in words only, under SignatureDoesNotMatch
        (r" (RequestExpired|RequestInTheFuture|RequestTimeTooSkewed):"
        r"|Signature (expired|not yet current)"),
        FaultKind.NODE, f"refused ({{}}); {SKEW_HINT}",
    ),
    (  # Ceph and Versity: 403; MinIO; Backblaze: "storage cap exceeded"
        (r"^507 | (QuotaExceeded|ServiceQuotaExceededException|XMinioAdminBucketQuotaExceeded"
        r"|XMinioStorageFull|InsufficientStorage):|^4.*(\bcap|quota) exceeded"),
        FaultKind.OUTAGE, "the store is full ({}); free space there or raise its quota",
    ),
    (
        r" (InvalidObjectState|ObjectNotInActiveTierError|RestoreAlreadyInProgress):",
        FaultKind.ARCHIVED,
        "the object is archived ({}); restore it, or copy it to a class that is read at once",
    ),
    (
        r" KMS\.\w*(Throttl|Internal|Unavailable|Timeout)",
        FaultKind.OUTAGE, "the service fails or is busy ({})",
    ),
    (
        r"^40[03] (KMS\.|.*(\bkms:|KMS key|customer master key|ciphertext))",
        FaultKind.PERMISSION,
        ("refused by the bucket's key ({}); the identity needs kms:GenerateDataKey and kms:Decrypt"
        " on an enabled key"),
    ),
    (
        r"explicit deny",
        FaultKind.PERMISSION,
        ("refused ({}); a deny outdoes every grant: look at the policies of the bucket, of the VPC"
         " endpoint and of the organisation"),
    ),
    (
        r"requester.?pays|request-payer",
        FaultKind.PERMISSION,
        "refused ({}); this job never pays as a requester: copy what it needs to a bucket of yours",
    ),
    (
        r"^400 .*Object.?Lock",
        FaultKind.SETTING,
        f"the bucket wants checksums ({{}}); {_CHECKSUMS.format('when_supported')}",
    ),
    (  # R2: 501; Backblaze, older gateways: 400
        (r"^(400|501) .*(x-amz-(sdk-)?checksum|x-amz-trailer|aws-chunked|STREAMING-"
        r"|x-amz-content-sha256 must)"),
        FaultKind.SETTING,
        f"the service refuses checksums ({{}}); {_CHECKSUMS.format('when_required')}",
    ),
)  # fmt: skip
# By name, so that botocore is imported only with the store in use.
_CREDENTIAL_ERRORS = {
    "CredentialRetrievalError", "MetadataRetrievalError", "NoAuthTokenError", "NoCredentialsError",
    "PartialCredentialsError", "SSOError", "SSOTokenLoadError", "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
}  # fmt: skip
# Token files of IRSA and Pod Identity: one that is not mounted (yet) is a plain OSError.
_TOKEN_FILES = ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
_SETTING_ERRORS = {
    "ConfigNotFound", "ConfigParseError", "InvalidConfigError", "InvalidRegionError",
    "InvalidChecksumConfigError", "InvalidMaxRetryAttemptsError", "InvalidRetryModeError",
    "NoRegionError", "ParamValidationError", "ProfileNotFound", "UnsupportedS3ConfigurationError",
}  # fmt: skip


def error_code(error: Exception) -> str:
    """S3's code of a refused request, "" for any other error."""
    from botocore.exceptions import ClientError

    if not isinstance(error, ClientError):
        return ""
    return str(error.response.get("Error", {}).get("Code", ""))


def diagnose(error: Exception, bucket: str) -> Fault | None:
    """What an error of boto3 or s3transfer means; None if it is neither's."""
    import urllib3.exceptions
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
    from botocore.parsers import ResponseParserError
    from s3transfer.exceptions import RetriesExceededError

    if isinstance(error, ClientError):
        return _of_answer(error.response, bucket)
    if fault := _unsent(error):
        return fault
    sdk = (BotoCoreError, Boto3Error, ResponseParserError, RetriesExceededError)
    if isinstance(error, (*sdk, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError)):
        # ResponseParserError: not S3's answer, so a proxy's.
        sent = isinstance(error, HTTPClientError) and error.__cause__  # by `Sender`
        return Fault(FaultKind.OUTAGE, f"no whole answer ({type(sent or error).__name__})")
    return None


def _unsent(error: Exception) -> Fault | None:
    """What the error means if it kept the SDK from sending the request; None if it did not."""
    name = type(error).__name__
    if isinstance(error, OSError) and error.filename in _token_files():
        return Fault(FaultKind.CREDENTIALS, f"no token in {error.filename}; {_NEEDED}")
    if name in _CREDENTIAL_ERRORS:
        return Fault(FaultKind.CREDENTIALS, f"no usable credentials ({name}); {_NEEDED}")
    if is_bad_header(error):
        return Fault(FaultKind.SETTING, _bad_header())
    if name in _SETTING_ERRORS or "Invalid endpoint" in str(error):
        tried = "bucket name, region, AWS_PROFILE or AWS_ENDPOINT_URL_S3"
        return Fault(FaultKind.SETTING, f"unusable {tried} ({name})")
    return None


def _token_files() -> set[str]:
    return {os.environ[name] for name in _TOKEN_FILES if name in os.environ}


def _bad_header() -> str:
    """Which secret holds a line break; the error's own words would show it."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN")
    broken = [name for name in names if not os.environ.get(name, "").isprintable()]
    return (
        f"{' and '.join(broken or names)}: holds a line break or another sign that no header may"
        " hold (Invalid header value); make the secret again without it"
    )


def _of_answer(response: Mapping[str, Any], bucket: str) -> Fault:
    error = response.get("Error", {})
    code, words = str(error.get("Code", "")), in_one_line(error.get("Message"))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    shown = code if code == str(status) else f"{code}, HTTP {status}"
    shown += f": {words}" if words else ""
    said = f"{status} {code}: {words} {error.get('Header', '')}"
    for pattern, kind, text in _MEANINGS:
        if code not in _PASSING and re.search(pattern, said, re.IGNORECASE):
            return Fault(kind, text.format(shown))
    if code in ("NoSuchBucket", "InvalidBucketName"):
        return Fault(FaultKind.SETTING, f"no bucket {bucket} there ({shown}); create it first")
    if code in _REGION:
        region = f" to {error['Region']}" if error.get("Region") else ""
        way_out = f"set AWS_REGION (or AWS_DEFAULT_REGION, which wins){region}"
        return Fault(FaultKind.SETTING, f"the bucket is in another region ({shown}); {way_out}")
    return _of_status(status, code, shown)


def _of_status(status: int, code: str, shown: str) -> Fault:
    if code in _REFUSED or status in (401, 403):
        unknown = code in _REFUSED or status == 401
        kind = FaultKind.CREDENTIALS if unknown else FaultKind.PERMISSION
        return Fault(kind, f"refused ({shown}); {_NEEDED}")
    busy = status in (408, 409, 429) or status < 400 or code in _PASSING
    if busy or (status >= 500 and status != 501):
        return Fault(FaultKind.OUTAGE, f"the service fails or is busy ({shown})")
    if status == 501:
        reason = f"the service lacks If-None-Match or If-Match on writes ({shown})"
        return Fault(FaultKind.REFUSED, f"{reason}; use one with conditional writes")
    return Fault(FaultKind.REFUSED, f"the service refuses the request ({shown})")
