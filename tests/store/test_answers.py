"""A service's answer is understood by its sentence. `pytest tests/store/test_answers.py`

The server is `FaultProxy` with nothing behind it: it gives every request the same answer, status
and body as the public page or issue beside the row has them (rows without one are in S3's list of
errors, or Google's, in the words of these services). What it does not imitate: headers of
the real services beyond the content type. Every row stands in docs/runbook.md as well.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from job.errors import CredentialsError, DataError, JobError, SettingsError, StoreError
from job.log import mask_secrets
from job.store import open_store
from job.store.objects import download_object, list_objects
from job.store.retries import Action, Limits, Retries
from tests.runbook import check_row
from tests.servers import azurite, s3
from tests.servers.behind_proxy import SHORT_LIMITS
from tests.servers.proxy import Fault, FaultProxy, proxy_to


class Row(NamedTuple):
    """One answer of a service, and what it means."""

    status: int
    code: str
    sentence: str
    error: type[JobError]
    way_out: str
    more: str = ""  # further elements of the error


ERRORS = "https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html"
S3 = [
    # The clock; ERRORS
    Row(
        403, "RequestTimeTooSkewed",
        "The difference between the request time and the current time is too large.",
        StoreError, "this node's clock is wrong",
    ),
    Row(400, "RequestExpired", "Request has expired.", StoreError, "this node's clock is wrong"),
    # https://github.com/aws/aws-cli/issues/6676: STS and IAM say it so
    Row(
        403, "SignatureDoesNotMatch",
        "Signature expired: 20180101T000000Z is now earlier than 20180101T001000Z",
        StoreError, "this node's clock is wrong",
    ),
    # Room. https://github.com/versity/versitygw/pull/503; Ceph sends the code without a message
    Row(
        403, "QuotaExceeded", "Your request was denied due to quota exceeded.",
        StoreError, "free space there or raise its quota",
    ),
    Row(403, "QuotaExceeded", "", StoreError, "free space there or raise its quota"),
    # https://github.com/minio/minio/blob/master/cmd/api-errors.go, ErrStorageFull
    Row(
        507, "XMinioStorageFull",
        "Storage backend has reached its minimum free drive threshold. Please delete a few objects"
        " to proceed.",
        StoreError, "free space there",
    ),
    # "storage cap exceeded": https://github.com/Backblaze/B2_Command_Line_Tool/pull/36 (the rest
    # of the sentence is ours)
    Row(
        403, "AccessDenied", "Cannot upload files, storage cap exceeded.",
        StoreError, "raise its quota",
    ),
    # Keys. https://github.com/aws/copilot-cli/issues/5500
    Row(
        403, "AccessDenied",
        "User: arn:aws:iam::0123456789:user/u is not authorized to perform: kms:GenerateDataKey on"
        " resource: arn:aws:kms:ap-northeast-1:0123456789:key/x because no identity-based policy"
        " allows the kms:GenerateDataKey action",
        CredentialsError, "kms:Decrypt",
    ),
    # https://github.com/ministryofjustice/modernisation-platform/issues/3468
    Row(
        403, "AccessDenied",
        "The ciphertext refers to a customer master key that does not exist, does not exist in this"
        " region, or you are not allowed to access.",
        CredentialsError, "kms:Decrypt",
    ),
    # https://docs.aws.amazon.com/kms/latest/developerguide/key-state.html
    Row(
        400, "KMS.DisabledException", "arn:aws:kms:eu-west-1:1:key/x is disabled.",
        CredentialsError, "on an enabled key",
    ),
    # https://docs.aws.amazon.com/AmazonS3/latest/userguide/ObjectsinRequesterPaysBuckets.html has
    # the 403 and the header; S3's sentence is often "Access Denied" alone, as two rows below
    Row(
        403, "AccessDenied", "Access Denied: x-amz-request-payer is required for this bucket",
        CredentialsError, "never pays as a requester",
    ),
    # https://github.com/usdigitalresponse/usdr-gost/pull/4044
    Row(
        403, "AccessDenied",
        "User: arn:aws:sts::1:assumed-role/r/t is not authorized to perform: s3:PutObject on"
        " resource: arn:aws:s3:::b/full-file-export/archive.zip with an explicit deny in a"
        " resource-based policy",
        CredentialsError, "a deny outdoes every grant",
    ),
    # Plain denials keep the identity's needs
    Row(403, "AccessDenied", "Access Denied", CredentialsError, "s3:PutObject"),
    Row(
        403, "SignatureDoesNotMatch",
        "The request signature we calculated does not match the signature you provided. Check your"
        " key and signing method.",
        CredentialsError, "AWS_SECRET_ACCESS_KEY",
    ),
    Row(
        400, "ExpiredToken", "The provided token has expired.",
        CredentialsError, "AWS_ACCESS_KEY_ID",
    ),
    Row(
        403, "AllAccessDisabled", "All access to this Amazon S3 resource has been disabled.",
        CredentialsError, "s3:PutObject",
    ),
    Row(
        404, "NoSuchBucket", "The specified bucket does not exist",
        SettingsError, "create it first",
    ),
    Row(
        403, "InvalidAccessKeyId",
        "The AWS Access Key Id you provided does not exist in our records.",
        CredentialsError, "AWS_ACCESS_KEY_ID",
    ),
    # Regions; ERRORS and https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
    Row(
        400, "AuthorizationHeaderMalformed",
        "The authorization header is malformed; the region 'us-east-1' is wrong; expecting"
        " 'eu-west-1'",
        SettingsError, "AWS_REGION (or AWS_DEFAULT_REGION, which wins) to eu-west-1",
        "<Region>eu-west-1</Region>",
    ),
    Row(
        400, "IllegalLocationConstraintException",
        "The unspecified location constraint is incompatible for the region specific endpoint this"
        " request was sent to.",
        SettingsError, "set AWS_REGION",
    ),
    # Checksums. https://github.com/cloudflare/cloudflare-docs/pull/19236 (R2)
    Row(
        501, "NotImplemented",
        "Header 'x-amz-checksum-crc32' with value '8FJbTw==' not implemented",
        SettingsError, "AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
    ),
    # https://github.com/home-assistant/core/issues/143995 (Backblaze B2)
    Row(
        400, "InvalidArgument",
        "Unsupported header 'x-amz-sdk-checksum-algorithm' received for this API call.",
        SettingsError, "AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
    ),
    # https://github.com/vatesfr/xen-orchestra/issues/8358 (Backblaze B2, on reads)
    Row(
        400, "InvalidArgument",
        "Unsupported header 'x-amz-checksum-mode' received for this API call.",
        SettingsError, "AWS_RESPONSE_CHECKSUM_VALIDATION=when_required",
    ),
    # https://github.com/arnemolland/sigv4/issues/8; what a gateway without trailers says to one
    Row(
        400, "InvalidArgument",
        "x-amz-content-sha256 must be UNSIGNED-PAYLOAD, STREAMING-AWS4-HMAC-SHA256-PAYLOAD, or a"
        " valid sha256 value",
        SettingsError, "AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
    ),
    # https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-lock-managing.html
    Row(
        400, "InvalidRequest",
        "Content-MD5 OR x-amz-checksum- HTTP header is required for Put Object requests with Object"
        " Lock parameters",
        SettingsError, "AWS_REQUEST_CHECKSUM_CALCULATION=when_supported",
    ),
    # A store without conditional writes is still told as one; ERRORS
    Row(
        501, "NotImplemented",
        "A header you provided implies functionality that is not implemented",
        StoreError, "conditional writes", "<Header>If-None-Match</Header>",
    ),
]  # fmt: skip


def _xml(row: Row) -> str:
    message = f"<Message>{row.sentence}</Message>" if row.sentence else ""
    return f"<Error><Code>{row.code}</Code>{message}{row.more}<RequestId>1</RequestId></Error>"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with proxy_to("http://127.0.0.1:9") as proxy:  # the port of "discard": nothing is behind it
        s3.use(monkeypatch, proxy.endpoint)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.endpoint)
        azurite.use(monkeypatch, proxy.endpoint)
        yield proxy


@pytest.mark.parametrize("row", S3, ids=lambda row: f"{row.code}-{row.sentence[:30]}")
def test_s3s_sentence_decides(server: FaultProxy, row: Row) -> None:
    server.faults = [Fault("status", status=row.status, body=_xml(row))]
    with pytest.raises(JobError) as caught:
        open_store("s3://trials/x", limits=SHORT_LIMITS).put_if_absent("doc.json", b"1")
    _check(caught.value, row)


def _check(error: JobError, row: Row) -> None:
    line = str(error)
    assert type(error) is row.error, line
    assert row.way_out in line
    assert row.sentence.rstrip(".") in line
    assert "\n" not in line
    check_row(row.sentence or row.code, error.exit_code)


ARCHIVED = Row(  # https://github.com/getmoto/moto/issues/8748; ERRORS
    403, "InvalidObjectState", "The operation is not valid for the object's storage class",
    DataError, "restore it", "<StorageClass>GLACIER</StorageClass>",
)  # fmt: skip
LISTING = """<ListBucketResult><Name>trials</Name><KeyCount>1</KeyCount>
<Contents><Key>rows.jsonl</Key><Size>9</Size><ETag>"e"</ETag></Contents></ListBucketResult>"""


@pytest.mark.parametrize(
    ("setting", "error"),
    [("JOB_DATASET_URI", DataError), ("JOB_BASE_MODEL", SettingsError)],
)
def test_an_archived_object_is_to_be_restored(
    server: FaultProxy, tmp_path: Path, setting: str, error: type[JobError]
) -> None:
    server.faults = [
        Fault("status", status=200, body=LISTING, match="list-type"),
        Fault("status", status=403, body=_xml(ARCHIVED)),
    ]
    uri = "s3://trials/rows.jsonl"
    (info,) = list_objects(uri, setting=setting)
    with pytest.raises(JobError) as caught:
        download_object(uri, info, tmp_path / "x", lambda _: None, setting=setting)
    _check(caught.value, ARCHIVED._replace(error=error))
    assert setting in str(caught.value)


@pytest.mark.parametrize("code", ["InvalidObjectState", "ObjectNotInActiveTierError"])
def test_an_archived_document_of_a_sweep_is_a_buckets_rule_to_be_mended(
    server: FaultProxy, code: str
) -> None:
    row = ARCHIVED._replace(code=code, error=SettingsError)
    server.faults = [Fault("status", status=403, body=_xml(row))]
    with pytest.raises(SettingsError, match="JOB_OUTPUT_URI: s3://trials/x/doc.json.*restore it"):
        open_store("s3://trials/x", limits=SHORT_LIMITS).get("doc.json")


PASSING = [
    (400, "BadDigest", "The CRC32 you specified did not match the calculated checksum."),
    (400, "XAmzContentChecksumMismatch", "The provided 'x-amz-checksum' header does not match."),
    (400, "KMS.ThrottlingException", "You have exceeded the rate at which you may call KMS."),
    (503, "SlowDown", "Please reduce your request rate."),
    (409, "OperationAborted", "A conflicting conditional operation is currently in progress."),
]


@pytest.mark.parametrize(("status", "code", "sentence"), PASSING)
def test_what_passes_is_waited_for(
    server: FaultProxy, status: int, code: str, sentence: str
) -> None:
    row = Row(status, code, sentence, StoreError, "")
    server.faults = [
        Fault("status", times=2, status=status, body=_xml(row)),
        Fault("status", status=404, code="NoSuchKey"),
    ]
    limits = dataclasses.replace(SHORT_LIMITS, outage_seconds=10)
    assert open_store("s3://trials/x", limits=limits).get("doc.json") is None


def test_a_wrong_clock_is_waited_for_as_long_as_a_cold_node(server: FaultProxy) -> None:
    """chrony may need its first minutes; after them another node is better."""
    skewed = Fault("status", status=403, body=_xml(S3[0]))
    server.faults = [skewed]
    limits = Limits(outage_seconds=30, credentials_seconds=0.2, attempts=1, pause_seconds=0.05)
    with pytest.raises(StoreError, match="clock"):
        open_store("s3://trials/x", limits=limits).get("doc.json")
    skewed.times = 1
    server.faults.append(Fault("status", status=404, code="NoSuchKey"))
    limits = dataclasses.replace(limits, credentials_seconds=10)
    assert open_store("s3://trials/x", limits=limits).get("doc.json") is None


@pytest.mark.parametrize("name", ["AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"])
def test_a_line_break_in_a_secret_names_its_variable_and_not_the_secret(
    server: FaultProxy, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    secret = "FwoGZXIvYXdzE\nBYaDHN0"
    monkeypatch.setenv(name, secret)
    with pytest.raises(
        SettingsError, match=f"JOB_OUTPUT_URI: .*{name}: holds a line break"
    ) as caught:
        open_store("s3://trials/x", limits=SHORT_LIMITS).get("doc.json")
    assert "FwoGZX" not in mask_secrets(str(caught.value))
    assert server.num_requests == 0
    check_row("Invalid header value", 64)


def test_aws_region_counts_where_boto3s_own_variable_is_not_set(
    monkeypatch: pytest.MonkeyPatch, server: FaultProxy
) -> None:
    from job.store.s3 import _connect

    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert _connect(SHORT_LIMITS).meta.region_name == "us-east-1"
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    assert _connect(SHORT_LIMITS).meta.region_name == "eu-west-1"


# https://cloud.google.com/storage/docs/json_api/v1/status-codes, and beside the rows
GCS = [
    # https://github.com/googleapis/google-cloud-python/issues/4674
    Row(
        400, "required", "Bucket is requester pays bucket but no user project provided.",
        CredentialsError, "never pays as a requester",
    ),
    # https://github.com/googleapis/nodejs-storage/issues/1254
    Row(
        403, "forbidden",
        "Permission denied on Cloud KMS key. Please ensure that your Cloud Storage service account"
        " has been authorized to use this key.",
        CredentialsError, "cloudkms.cryptoKeyEncrypterDecrypter",
    ),
    Row(403, "rateLimitExceeded", "The project exceeded the rate limit.", StoreError, "is busy"),
    Row(403, "quotaExceeded", "The quota has been exceeded.", StoreError, "is busy"),
    Row(
        403, "retentionPolicyNotMet",
        "Object 'b/o' is subject to bucket's retention policy or object retention and cannot be"
        " deleted or overwritten until 2030-01-01T00:00:00Z",
        SettingsError, "without a retention policy",
    ),
    Row(
        403, "forbidden",
        "x@y.iam.gserviceaccount.com does not have storage.objects.create access to the Google"
        " Cloud Storage object. Permission 'storage.objects.create' denied on resource",
        CredentialsError, "Storage Object User",
    ),
    # https://cloud.google.com/vpc-service-controls/docs/troubleshooting
    Row(
        403, "vpcServiceControls",
        "Request is prohibited by organization's policy. vpcServiceControlsUniqueIdentifier: x",
        CredentialsError, "through VPC Service Controls",
    ),
    Row(
        404, "notFound", "The specified bucket does not exist.", SettingsError, "create it first",
    ),
    Row(
        403, "accountDisabled",
        "The billing account for the owning project is disabled in state absent",
        CredentialsError, "refused",
    ),
]  # fmt: skip


@pytest.mark.parametrize("row", GCS, ids=lambda row: f"{row.code}-{row.sentence[:30]}")
def test_gcss_sentence_decides(server: FaultProxy, row: Row) -> None:
    details = [{"message": row.sentence, "domain": "global", "reason": row.code}]
    body = {"error": {"code": row.status, "message": row.sentence, "errors": details}}
    server.faults = [Fault("status", status=row.status, body=json.dumps(body))]
    store = open_store("gs://trials/x", limits=SHORT_LIMITS)
    with pytest.raises(JobError) as caught:
        store.put_if_absent("doc.json", b"1")
    _check(caught.value, row)


# https://learn.microsoft.com/rest/api/storageservices/: blob-service-error-codes,
# common-rest-api-error-codes, sas-error-codes; and beside the rows
_UNSIGNED = (
    "Server failed to authenticate the request. Make sure the value of Authorization header is"
    " formed correctly including the signature."
)
AZURE = [
    # The clock. https://github.com/Azure/azure-sdk-for-js/issues/5433
    Row(
        403, "AuthenticationFailed", _UNSIGNED, StoreError, "this node's clock is wrong",
        "Request date header too old: 'Fri, 04 Oct 2019 18:02:12 GMT'",
    ),
    Row(
        403, "AuthenticationFailed", _UNSIGNED, CredentialsError, "new AZURE_STORAGE_SAS_TOKEN",
        "Signature not valid in the specified time frame: Start [Mon, 01 Jan 2024 00:00:00 GMT] -"
        " Expiry [Tue, 02 Jan 2024 00:00:00 GMT] - Current [Wed, 03 Jan 2024 00:00:00 GMT]",
    ),
    Row(
        403, "AuthenticationFailed", _UNSIGNED, CredentialsError, "AZURE_STORAGE_KEY",
        "The MAC signature found in the HTTP request 'x' is not the same as any other.",
    ),
    # https://github.com/Azure/AzureStor/issues/140
    Row(
        403, "AuthenticationFailed", _UNSIGNED, CredentialsError, "or was renewed",
        "Signature did not match. String to sign used was r 2024-03-13T17:07:02Z",
    ),
    # https://github.com/Azure/azure-storage-ruby/issues/115
    Row(
        403, "AuthenticationFailed", _UNSIGNED, CredentialsError, "AZURE_STORAGE_SAS_TOKEN",
        "Signature fields not well formed.",
    ),
    Row(
        401, "NoAuthenticationInformation",
        "Server failed to authenticate the request. Please refer to the information in the"
        " www-authenticate header.",
        CredentialsError, "use workload identity",
    ),
    # https://github.com/MicrosoftDocs/azure-docs/issues/56908
    Row(
        403, "AuthorizationResourceTypeMismatch",
        "This request is not authorized to perform this operation using this resource type.",
        CredentialsError, "the resource types c and o",
    ),
    Row(
        403, "AuthorizationProtocolMismatch",
        "This request is not authorized to perform this operation using this protocol.",
        CredentialsError, "and https",
    ),
    Row(
        403, "AuthorizationSourceIPMismatch",
        "This request is not authorized to perform this operation using this source IP 10.0.0.1.",
        CredentialsError, "the account's firewall",
    ),
    Row(
        403, "AccountIsDisabled", "The specified account is disabled.",
        CredentialsError, "subscription is disabled",
    ),
    Row(
        409, "PublicAccessNotPermitted", "Public access is not permitted on this storage account.",
        CredentialsError, "without any, use workload identity",
    ),
    Row(
        409, "ContainerBeingDeleted",
        "The specified container is being deleted. Try operation later.",
        StoreError, "restore it, or name another one",
    ),
    Row(
        403, "AuthorizationPermissionMismatch",
        "This request is not authorized to perform this operation using this permission.",
        CredentialsError, "Storage Blob Data Contributor",
    ),
    Row(
        403, "AuthorizationFailure", "This request is not authorized to perform this operation.",
        CredentialsError, "the account's firewall",
    ),
    Row(
        403, "KeyBasedAuthenticationNotPermitted",
        "Key based authentication is not permitted on this storage account.",
        CredentialsError, "unset AZURE_STORAGE_CONNECTION_STRING",
    ),
    Row(
        403, "UnauthorizedBlobOverwrite",
        "This request is not authorized to perform blob overwrites.",
        CredentialsError, "only create is not enough",
    ),
    Row(
        403, "InsufficientAccountPermissions", "Write operations are not allowed.",
        CredentialsError, "refused",
    ),
    Row(
        403, "KeyVaultEncryptionKeyNotFound",
        "The key vault key is not found to unwrap the encryption key.",
        CredentialsError, "Key Vault Crypto Service Encryption User",
    ),
    # 409 and 412 that are no rival's
    Row(
        409, "BlobImmutableDueToPolicy",
        "This operation is not permitted as the blob is immutable due to a policy.",
        SettingsError, "without an immutability policy",
    ),
    Row(
        409, "BlobArchived", "This operation is not permitted on an archived blob.",
        SettingsError, "move it to the hot or cool tier",
    ),
    Row(
        409, "ContainerDisabled",
        "The specified container has been disabled by the administrator.",
        StoreError, "refuses the request",
    ),
    Row(
        412, "LeaseIdMissing",
        "There is currently a lease on the blob and no lease ID was specified in the request.",
        StoreError, "az storage blob lease break",
    ),
    # Room and pace. https://github.com/Azure/azure-storage-azcopy/issues/2331
    Row(503, "ServerBusy", "Operations per second is over the account limit.", StoreError, "busy"),
    Row(
        409, "BlockCountExceedsLimit",
        "The uncommitted block count cannot exceed the maximum limit of 100,000 blocks.",
        StoreError, "delete that blob by hand",
    ),
    # Names
    Row(
        404, "ContainerNotFound", "The specified container does not exist.",
        SettingsError, "create the container first",
    ),
    Row(
        400, "InvalidResourceName", "The specified resource name contains invalid characters.",
        SettingsError, "cannot be a container's name",
    ),
]  # fmt: skip


@pytest.mark.parametrize("row", AZURE, ids=lambda row: f"{row.code}-{row.more[:20]}")
def test_azures_code_decides(server: FaultProxy, row: Row) -> None:
    pytest.importorskip("azure.storage.blob")
    detail = f"<AuthenticationErrorDetail>{row.more}</AuthenticationErrorDetail>"
    sentence = f"{row.sentence}\nRequestId:1\nTime:2026-01-01T00:00:00.0000000Z"
    server.faults = [
        Fault(
            "status",
            status=row.status,
            body=f"<Error><Code>{row.code}</Code><Message>{sentence}</Message>{detail}</Error>",
        )
    ]
    store = open_store("az://trials/x", limits=SHORT_LIMITS)
    with pytest.raises(JobError) as caught:
        store.put_if_absent("doc.json", b"1")
    _check(caught.value, row._replace(sentence=row.more or row.sentence))
    assert row.sentence.rstrip(".")[:40] in str(caught.value)
    assert "RequestId" not in str(caught.value)


_ENTRA = "WorkloadIdentityCredential: Microsoft Entra ID error '(invalid_request) "


@pytest.mark.parametrize(
    ("words", "error", "way_out"),
    [
        # https://github.com/Azure/azure-sdk-for-python/issues/44488
        (_ENTRA + "AADSTS700024: Client assertion is not within its valid time range.",
         StoreError, "this node's clock is wrong"),
        # https://github.com/Azure/azure-workload-identity/issues/340
        (_ENTRA + "AADSTS70021: No matching federated identity record found for this.",
         CredentialsError, "use workload identity"),
        # The next two as the SDK says them where there is no network and no identity
        ("EnvironmentCredential: Authentication failed: Failed to resolve 'login'", StoreError,
         "Entra ID cannot be reached"),
        ("AzureCliCredential: Azure CLI not found on path", CredentialsError, "none was found"),
    ],
)  # fmt: skip
def test_entra_ids_words_decide(words: str, error: type[JobError], way_out: str) -> None:
    exceptions = pytest.importorskip("azure.core.exceptions")
    from job.store.azure_faults import diagnose

    unavailable = "ManagedIdentityCredential: ManagedIdentityCredential authentication unavailable."
    report = f"DefaultAzureCredential failed.\nAttempted credentials:\n\t{unavailable}\n\t{words}"

    def refuse() -> None:
        raise exceptions.ClientAuthenticationError(message=report)

    retries = Retries(
        SHORT_LIMITS, "JOB_OUTPUT_URI", diagnose=lambda e: diagnose(e, "c"), renew=lambda: None
    )
    with pytest.raises(error, match=way_out) as caught:
        retries.run("az://c/x", Action.READ, refuse)
    assert "ManagedIdentityCredential" not in str(caught.value)
    if "AADSTS" in words:
        check_row(words, caught.value.exit_code)


@pytest.mark.parametrize(
    "words",
    [
        # https://github.com/DataBiosphere/dsub/issues/194
        (
            "invalid_grant: Invalid JWT: Token must be a short-lived token (60 minutes) and in a"
            " reasonable timeframe. Check your iat and exp values in the JWT claim."
        ),
        # google.auth.jwt
        (
            "Token used too early, 1700000000 < 1700000300. Check that your computer's clock is set"
            " correctly."
        ),
    ],
)
def test_googles_words_for_a_wrong_clock_are_this_nodes(words: str) -> None:
    from google.auth.exceptions import RefreshError

    from job.store.gcs_faults import diagnose
    from job.store.retries import FaultKind

    fault = diagnose(RefreshError(words, {"error": "invalid_grant"}), "trials")
    assert fault is not None
    assert fault.kind is FaultKind.NODE
    assert words[:40] in fault.reason
    check_row(words, 74)
    other = diagnose(RefreshError("invalid_grant: Account not found"), "trials")
    assert other is not None
    assert other.kind is FaultKind.CREDENTIALS
    assert "Account not found" in other.reason
