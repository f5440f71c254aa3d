"""What Azure's errors mean: an outage, this node, credentials, the data, or a setting.

Codes and sentences: https://learn.microsoft.com/rest/api/storageservices/blob-service-error-codes,
…/common-rest-api-error-codes and …/sas-error-codes. A status is shared by many of them (409 by a
rival, an archived blob and a retention policy; 412 by a rival and somebody's lease), so the code
decides, and the sentence stands in the line.
"""

from __future__ import annotations

import re
from typing import Any

from job.store.retries import SKEW_HINT, Fault, FaultKind, in_one_line, is_bad_header

_NEEDED = (
    "the identity needs the role Storage Blob Data Contributor on the container (a new role counts"
    " after up to ten minutes), or a SAS token the permissions racwdl; without any, use workload"
    " identity or set AZURE_STORAGE_CONNECTION_STRING"
)
_UNKNOWN_TO_US = {
    "AuthenticationFailed",
    "InvalidAuthenticationInfo",
    "NoAuthenticationInformation",
    "PublicAccessNotPermitted",  # 409, where we send no credentials
}
_PASSING = {"Md5Mismatch", "ConditionNotMet", "TargetConditionNotMet", "OperationTimedOut"}
_NAMES = {"InvalidResourceName", "InvalidUri", "OutOfRangeInput", "RequestUrlFailedToParse"}
# What "status code: sentence" means where the status alone would mislead; the first row counts.
_MEANINGS = (
    (
        "Request date header|AADSTS(700024|50013.*(time range|expired))",
        FaultKind.NODE, f"refused ({{}}); {SKEW_HINT}",
    ),
    (
        " AuthenticationFailed:.*(Signature not valid in the specified time frame|[Ll]ifetime)",
        FaultKind.CREDENTIALS, "refused ({}); make a new AZURE_STORAGE_SAS_TOKEN that is valid now",
    ),
    (  # of a request signed by a key; of a SAS token
        " AuthenticationFailed:.*(MAC signature|Signature (did not match|fields not well formed))",
        FaultKind.CREDENTIALS,
        ("refused ({}); the key or the SAS token is cut off, another account's, or was renewed:"
         " make AZURE_STORAGE_KEY, AZURE_STORAGE_SAS_TOKEN or the connection string again"),
    ),
    (
        " Authorization(Protocol|ResourceType|Service)Mismatch:",
        FaultKind.PERMISSION,
        ("refused ({}); a SAS token of the account needs the service b, the resource types c and o"
         " and https: make it again, or take one of the container"),
    ),
    (
        " AccountIsDisabled:",
        FaultKind.PERMISSION,
        "refused ({}); the account's subscription is disabled: pay for it, or enable it again",
    ),
    (
        " ContainerBeingDeleted:",
        FaultKind.OUTAGE,
        "the container is being deleted ({}); restore it, or name another one",
    ),
    (
        " KeyBasedAuthenticationNotPermitted:",
        FaultKind.CREDENTIALS,
        ("refused ({}); unset AZURE_STORAGE_CONNECTION_STRING and AZURE_STORAGE_KEY, and use an"
        " identity with the role Storage Blob Data Contributor"),
    ),
    (
        " Blob(Archived|BeingRehydrated):",
        FaultKind.ARCHIVED,
        "the blob is archived ({}); move it to the hot or cool tier, which takes hours",
    ),
    (
        " BlobImmutableDueTo|AccountProtectedFromDeletion",
        FaultKind.SETTING,
        "the container keeps every blob ({}); name one without an immutability policy or a hold",
    ),
    (
        " LeaseId(Missing|Mismatch)| LeaseLost",
        FaultKind.REFUSED,
        "somebody holds a lease on it ({}); end that: az storage blob lease break",
    ),
    (
        " KeyVault",
        FaultKind.PERMISSION,
        ("refused by the account's key ({}); its identity needs Key Vault Crypto Service Encryption"
        " User on an enabled key"),
    ),
    (
        " Authorization(Failure|SourceIPMismatch):",
        FaultKind.PERMISSION,
        f"refused ({{}}) by the account's firewall, or for want of a role: {_NEEDED}",
    ),
    (
        " UnauthorizedBlobOverwrite:",
        FaultKind.PERMISSION,
        f"refused ({{}}); a SAS token that may only create is not enough: {_NEEDED}",
    ),
    (" (InvalidBlobType|SnapshotsPresent|BlockCountExceedsLimit):", FaultKind.REFUSED,
     "the service refuses the request ({}); delete that blob by hand"),
    (" ContainerDisabled:", FaultKind.REFUSED, "the service refuses the request ({})"),
)  # fmt: skip
# What the chain says of a credential that it did not try.
_UNTRIED = re.compile(
    "unavailable|not found on path|not installed|could not be found|to be installed"
)
_NETWORK_WORDS = re.compile(
    "Failed to (establish|resolve)|Max retries exceeded|Connection (aborted|refused|reset)"
    "|Read timed out|AADSTS90033"
)


def error_code(error: Exception) -> str:
    """The service's code of a refused request, "" for any other error."""
    code = getattr(error, "error_code", None)
    return str(getattr(code, "value", code) or "")


def diagnose(error: Exception, container: str) -> Fault | None:
    """What an error of Azure's SDKs or their HTTP library means; None if it is neither's."""
    import requests.exceptions
    from azure.core.exceptions import AzureError, ClientAuthenticationError

    status = int(getattr(error, "status_code", None) or 0)
    if isinstance(error, AzureError) and status:
        return _of_answer(error, status, container)
    if fault := _unsent(error):
        return fault
    if isinstance(error, ClientAuthenticationError):
        return _of_identity(error)
    no_answer = isinstance(error, ValueError) and "Content-Range" in str(error)  # a proxy's
    network = (AzureError, requests.exceptions.RequestException, ConnectionError, TimeoutError)
    if no_answer or isinstance(error, network):
        return Fault(FaultKind.OUTAGE, f"no whole answer ({_innermost(error)})")
    return None


def _innermost(error: Exception) -> str:
    """What happened, told by the type of the error that the SDK wraps."""
    inner = getattr(error, "inner_exception", None)
    said = str(error)
    if "Name or service not known" in said or "Failed to resolve" in said:
        return "the account's name is unknown to DNS: look at AZURE_STORAGE_ACCOUNT"
    return type(inner or error).__name__


def _unsent(error: Exception) -> Fault | None:
    """What the error means if it kept the SDK from sending the request; None if it did not."""
    if is_bad_header(error):
        return Fault(
            FaultKind.SETTING,
            "the credentials hold a line break, which no header may (Invalid header value); make"
            " the secret again without it",
        )
    if type(error).__name__ == "AzureSigningError":
        named = "AZURE_STORAGE_KEY, or AccountKey in AZURE_STORAGE_CONNECTION_STRING"
        return Fault(FaultKind.SETTING, f"{named}: is no key of a storage account (not base64)")
    if "not permitted for non-TLS" in str(error):
        return Fault(FaultKind.SETTING, f"AZURE_STORAGE_SERVICE_ENDPOINT: {in_one_line(error)}")
    if _innermost(error) in ("InvalidURL", "InvalidSchema", "MissingSchema"):
        tried = "AZURE_STORAGE_SERVICE_ENDPOINT or BlobEndpoint"
        return Fault(FaultKind.SETTING, f"unusable {tried} ({_innermost(error)})")
    return None


def _of_identity(error: Exception) -> Fault:
    """Entra ID gave no token; of the chain's report only what was really tried matters."""
    chain = [line for line in str(error).splitlines() if "Credential: " in line]
    tried = [line for line in chain if not _UNTRIED.search(line)]
    words = in_one_line(" ".join(tried) or ("none was found" if chain else error))
    for pattern, kind, text in _MEANINGS:
        if re.search(pattern, words):
            return Fault(kind, text.format(words))
    if _NETWORK_WORDS.search(words):
        return Fault(FaultKind.OUTAGE, f"Entra ID cannot be reached or fails ({words})")
    return Fault(FaultKind.CREDENTIALS, f"no usable credentials ({words}); {_NEEDED}")


def _of_answer(error: Any, status: int, container: str) -> Fault:
    code = error_code(error)
    words = _said(error)
    shown = f"{code}, HTTP {status}" if code else f"HTTP {status}"
    shown += f": {words}" if words else ""
    for pattern, kind, text in _MEANINGS:
        if re.search(pattern, f"{status} {code}: {words}"):
            return Fault(kind, text.format(shown))
    if code == "ContainerNotFound":
        way_out = "create the container first, or restore a deleted one"
        return Fault(FaultKind.SETTING, f"no bucket {container} there ({shown}); {way_out}")
    if code in _NAMES and status == 400:
        return Fault(FaultKind.SETTING, f"{container} cannot be a container's name ({shown})")
    if code in _UNKNOWN_TO_US or status in (401, 403):
        unknown = code in _UNKNOWN_TO_US or status == 401
        kind = FaultKind.CREDENTIALS if unknown else FaultKind.PERMISSION
        return Fault(kind, f"refused ({shown}); {_NEEDED}")
    busy = status in (408, 409, 429) or status < 400 or (status >= 500 and status != 501)
    if busy or code in _PASSING:
        return Fault(FaultKind.OUTAGE, f"the service fails or is busy ({shown})")
    return Fault(FaultKind.REFUSED, f"the service refuses the request ({shown})")


def _said(error: Any) -> str:
    """The service's sentence, after the detail that it gives for refused credentials."""
    sentence = re.split(r"\n(RequestId|Time|ErrorCode):", str(error.message or ""))[0]
    more = getattr(error, "additional_info", None) or {}
    detail = str(more.get("authenticationerrordetail") or "")
    return in_one_line(" ".join(part for part in (detail, sentence.strip()) if part))
