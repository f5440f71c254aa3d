"""Credentials refused, absent or late, and environment that cannot work.

`pytest tests/store/test_credentials.py`
"""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest

from job.errors import CredentialsError, JobError, SettingsError, StoreError
from job.store import open_store
from job.store.base import Store
from tests.servers import s3
from tests.servers.behind_proxy import LIMITS, SHORT_LIMITS
from tests.servers.proxy import Fault, FaultProxy


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
    write = "PUT " if store.uri.startswith("s3") else "POST "
    proxy.faults = [Fault("status", match=write, status=403, code="AccessDenied")]
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
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "absent.json"))
    way_out = "AWS_ACCESS_KEY_ID|GOOGLE_APPLICATION_CREDENTIALS"
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
    if store.uri.startswith("gs"):
        pytest.skip("the thin server asks for no credentials")
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
