"""What boto3's errors mean: an outage, credentials, or a setting."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from job.store.retries import Fault, FaultKind

_NEEDED = (
    "the identity needs s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket; without"
    " any, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or give the pod a service account"
)
_REFUSED = {
    "AuthFailure", "ExpiredToken", "ExpiredTokenException", "IDPRejectedClaim",
    "InvalidAccessKeyId", "InvalidClientTokenId", "InvalidIdentityToken",
    "InvalidToken", "RequestExpired", "SignatureDoesNotMatch", "TokenRefreshRequired",
    "UnrecognizedClientException",
}  # fmt: skip
_PASSING = {  # 4xx that another try can cure
    "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "OperationAborted",
    "RequestTimeout", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch",
}  # fmt: skip
_REGION = {
    "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect",
}  # fmt: skip
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

    name = type(error).__name__
    if isinstance(error, OSError) and error.filename in _token_files():
        return Fault(FaultKind.CREDENTIALS, f"no token in {error.filename}; {_NEEDED}")
    if isinstance(error, ClientError):
        return _of_answer(error.response, bucket)
    if name in _CREDENTIAL_ERRORS:
        return Fault(FaultKind.CREDENTIALS, f"no usable credentials ({name}); {_NEEDED}")
    if name in _SETTING_ERRORS or "Invalid endpoint" in str(error):
        tried = "bucket name, region, AWS_PROFILE or AWS_ENDPOINT_URL_S3"
        return Fault(FaultKind.SETTING, f"unusable {tried} ({name})")
    sdk = (BotoCoreError, Boto3Error, ResponseParserError, RetriesExceededError)
    if isinstance(error, (*sdk, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError)):
        # ResponseParserError: not S3's answer, so a proxy's.
        sent = isinstance(error, HTTPClientError) and error.__cause__  # by `Sender`
        return Fault(FaultKind.OUTAGE, f"no whole answer ({type(sent or error).__name__})")
    return None


def _token_files() -> set[str]:
    return {os.environ[name] for name in _TOKEN_FILES if name in os.environ}


def _of_answer(response: Mapping[str, Any], bucket: str) -> Fault:
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    shown = code if code == str(status) else f"{code}, HTTP {status}"
    if code in _REFUSED or status in (401, 403):
        unknown = code in _REFUSED or status == 401
        kind = FaultKind.CREDENTIALS if unknown else FaultKind.PERMISSION
        return Fault(kind, f"refused ({shown}); {_NEEDED}")
    if code in ("NoSuchBucket", "InvalidBucketName"):
        return Fault(FaultKind.SETTING, f"no bucket {bucket} there ({code}); create it first")
    if code in _REGION:
        return Fault(
            FaultKind.SETTING, f"the bucket is in another region ({code}); set AWS_DEFAULT_REGION"
        )
    busy = status in (408, 409, 429) or status < 400 or code in _PASSING
    if busy or (status >= 500 and status != 501):
        return Fault(FaultKind.OUTAGE, f"the service fails or is busy ({shown})")
    if status == 501:
        reason = f"the service lacks If-None-Match or If-Match on writes ({shown})"
        return Fault(FaultKind.REFUSED, f"{reason}; use one with conditional writes")
    return Fault(FaultKind.REFUSED, f"the service refuses the request ({shown})")
