"""Credentials refused, absent or late, and environment that cannot work.

`pytest tests/store/test_credentials.py`
"""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest

from job.errors import CredentialsError, JobError, SettingsError, StoreError
from job.store import open_store, probe
from job.store.base import Store
from tests.servers import azurite, s3
from tests.servers.behind_proxy import LIMITS, SHORT_LIMITS, write_verb
from tests.servers.proxy import Fault, FaultProxy

_AZURE = "AZURE_STORAGE_CONNECTION_STRING"


def test_an_expired_token_after_success_is_an_outage(
    proxied: tuple[Store, FaultProxy],
) -> None:
    store, proxy = proxied
    store = open_store(store.uri, limits=SHORT_LIMITS)
    assert store.get("doc.json") is None
    proxy.faults = [Fault("status", status=403, code="ExpiredToken")]
    with pytest.raises(StoreError, match="refused"):
        store.get("doc.json")


def test_a_role_that_may_only_read_is_refused_at_its_first_write(
    proxied: tuple[Store, FaultProxy],
) -> None:
    store, proxy = proxied
    store = open_store(store.uri, limits=dataclasses.replace(LIMITS, credentials_seconds=0.2))
    assert store.get("doc.json") is None
    proxy.faults = [Fault("status", match=write_verb(store), status=403, code="AccessDenied")]
    with pytest.raises(CredentialsError, match=r"doc.json: write: credentials refused for 0.2"):
        store.put_if_absent("doc.json", b"1")
    assert store.get("doc.json") is None


@pytest.mark.slow
def test_what_was_written_before_and_is_refused_now_is_an_outage(
    proxied: tuple[Store, FaultProxy],
) -> None:
    store, proxy = proxied
    store = open_store(store.uri, limits=SHORT_LIMITS)
    assert store.put_if_absent("doc.json", b"1")
    assert store.get("doc.json")
    proxy.faults = [Fault("status", status=403, code="AccessDenied")]
    for operation in (lambda: store.get("doc.json"), lambda: store.put_if_absent("b.json", b"")):
        with pytest.raises(StoreError, match="still failing.*refused"):
            operation()


def test_no_credentials_at_all_name_the_way_out(
    proxied: tuple[Store, FaultProxy], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store, _ = proxied
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "STORAGE_EMULATOR_HOST"):
        monkeypatch.delenv(name)
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "tester")
    monkeypatch.setenv("AZURE_STORAGE_SERVICE_ENDPOINT", "https://127.0.0.1:1/tester")
    for name, value in {"CLIENT_ID": "1", "TENANT_ID": "2", "FEDERATED_TOKEN_FILE": "/no"}.items():
        monkeypatch.setenv(f"AZURE_{name}", value)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "absent.json"))
    way_out = "AWS_ACCESS_KEY_ID|GOOGLE_APPLICATION_CREDENTIALS|/no'.*use workload identity"
    with pytest.raises(CredentialsError, match=way_out):
        open_store(store.uri, limits=SHORT_LIMITS).get("doc.json")


@pytest.mark.parametrize(
    ("uri", "environment", "error_type"),
    [
        ("s3://trials", "AWS_ENDPOINT_URL_S3=not a URL", SettingsError),
        ("s3://trials", "AWS_PROFILE=absent", SettingsError),
        ("s3://trials", "AWS_DEFAULT_REGION=a b/", SettingsError),
        ("s3://A_B!", "AWS_DEFAULT_REGION=us-east-1", SettingsError),
        ("gs://A_B!", "STORAGE_EMULATOR_HOST=http://127.0.0.1:1", SettingsError),
        ("gs://trials", "STORAGE_EMULATOR_HOST=not a URL", SettingsError),
        ("az://trials", f"{_AZURE}=secret", SettingsError),
        ("az://trials", f"{_AZURE}=AccountName=a;AccountKey=secret", SettingsError),
        ("az://trials", f"{_AZURE}={azurite.connection_string('not a URL')}", SettingsError),
        ("az://trials", f"{_AZURE}={azurite.connection_string('http://127.0.0.1:1')}", StoreError),
        ("s3://trials", "AWS_ENDPOINT_URL_S3=http://user:secret@127.0.0.1:1", StoreError),
        ("s3://trials", "AWS_WEB_IDENTITY_TOKEN_FILE=/absent/token", CredentialsError),
    ],
)
def test_environment_that_cannot_work_end_in_one_clear_line(
    uri: str,
    environment: str,
    error_type: type[JobError],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    s3.use(monkeypatch, "http://127.0.0.1:1")
    azurite.use(monkeypatch, "http://127.0.0.1:1")
    variable, _, value = environment.partition("=")
    if "TOKEN" in variable:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/trial")
    monkeypatch.setenv(variable, value)
    with pytest.raises(error_type) as caught:  # not FileNotFoundError: that is an absent object
        open_store(uri, limits=SHORT_LIMITS).download("doc.json", tmp_path / "back")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.slow
def test_credentials_that_appear_late_are_found(
    proxied: tuple[Store, FaultProxy], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store, _ = proxied
    if not store.uri.startswith("s3"):
        pytest.skip("the thin server asks for no credentials, Azurite takes none of Entra ID")
    (tmp_path / "credentials").touch()
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    text = "[default]\naws_access_key_id = a\naws_secret_access_key = b\n"
    timer = threading.Timer(0.3, (tmp_path / "credentials").write_text, (text,))
    timer.start()
    limits = dataclasses.replace(LIMITS, credentials_seconds=10)
    assert open_store(store.uri, limits=limits).get("doc.json") is None
    timer.join(timeout=5)


@pytest.mark.slow
def test_a_sas_token_is_enough_and_what_it_may_not_is_told(
    azurite_blobs: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "in").write_bytes(b"1" * 1000)
    every = dict.fromkeys(("read", "add", "create", "write", "delete", "list"), True)
    azurite.use_sas(monkeypatch, azurite_blobs, **every)
    store = open_store(f"az://trials/{tmp_path.name}", limits=SHORT_LIMITS)
    probe(store)
    store.upload("x", tmp_path / "in")
    store.download("x", tmp_path / "back")
    assert list(store.list("")) == ["x"]
    token = azurite.use_sas(monkeypatch, azurite_blobs, read=True, list=True)
    store = open_store(store.uri, limits=SHORT_LIMITS)
    assert store.get("doc.json") is None
    with pytest.raises(
        CredentialsError, match=r"AuthorizationPermissionMismatch.*racwdl"
    ) as caught:
        store.put_if_absent("doc.json", b"1")
    assert token.partition("sig=")[2] not in str(caught.value)


@pytest.mark.slow
def test_another_key_than_the_accounts_is_refused(
    azurite_blobs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", azurite.ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_SERVICE_ENDPOINT", f"{azurite_blobs}/{azurite.ACCOUNT}")
    monkeypatch.setenv("AZURE_STORAGE_KEY", azurite.KEY)
    assert open_store("az://trials/x", limits=SHORT_LIMITS).get("doc.json") is None
    monkeypatch.setenv("AZURE_STORAGE_KEY", "d3Jvbmc=")
    with pytest.raises(CredentialsError, match=r"refused \(AuthorizationFailure|AuthenticationFai"):
        open_store("az://trials/x", limits=SHORT_LIMITS).get("doc.json")


def test_no_account_names_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("azure.storage.blob")
    for name in ("AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_CONNECTION_STRING"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        SettingsError, match="JOB_OUTPUT_URI: az:// names no .*AZURE_STORAGE_ACCOUNT"
    ):
        open_store("az://trials/x")
