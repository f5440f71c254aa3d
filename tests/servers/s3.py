"""S3 servers: moto (conditional writes, any signature), Swift's s3api (signatures, no If-Match)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest

from tests.servers.processes import free_port, running

BUCKET = "trials"
ACCESS_KEY = "test:tester"
SECRET_KEY = "testing"


@contextmanager
def moto_server(folder: Path) -> Iterator[str]:
    """The endpoint of moto's server with an empty bucket `BUCKET`."""
    port = free_port()
    arguments = ("-H", "127.0.0.1", "-p", str(port))
    with running("moto.server", *arguments, port=port, log_path=folder / "moto.log"):
        yield _with_bucket(f"http://127.0.0.1:{port}")


@contextmanager
def swift_server(folder: Path) -> Iterator[str]:
    """The endpoint of a one-process OpenStack Swift with an empty bucket `BUCKET`."""
    pytest.importorskip("swift", reason="OpenStack Swift is installed on Linux only")
    port = free_port()
    arguments = (str(port), str(folder))
    with running("tests.servers.swift", *arguments, port=port, log_path=folder / "swift.log"):
        yield _with_bucket(f"http://127.0.0.1:{port}")


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Point boto3 at `endpoint` by its own variables, and away from this machine's own files."""
    for name, value in {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)


def _with_bucket(endpoint: str) -> str:
    session = boto3.session.Session(ACCESS_KEY, SECRET_KEY, region_name="us-east-1")
    session.client("s3", endpoint_url=endpoint).create_bucket(Bucket=BUCKET)
    return endpoint
