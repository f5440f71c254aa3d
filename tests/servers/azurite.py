"""Azurite, Microsoft's own emulator of Azure Blob Storage: conditions, ETags, signatures, SAS.

It comes from npm (`make azurite`). What it lacks: a firewall, immutability, archives, Entra ID.
"""

from __future__ import annotations

import base64
import datetime
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.servers.processes import free_port, running_command
from tests.servers.s3 import BUCKET, SECRET_KEY

ACCOUNT = "tester"
KEY = base64.b64encode(SECRET_KEY.encode()).decode()
INSTALLED = Path(__file__).parents[2] / "build/azurite/node_modules/.bin/azurite-blob"


@contextmanager
def azurite_server(folder: Path) -> Iterator[str]:
    """The endpoint of an account `ACCOUNT` with an empty container `BUCKET`, in memory."""
    pytest.importorskip("azure.storage.blob", reason="the extra azure is not installed")
    program = str(INSTALLED) if INSTALLED.exists() else shutil.which("azurite-blob")
    if program is None:
        pytest.skip("Azurite is not installed: `make azurite`, which needs npm")
    port = free_port()
    where = ("--blobHost", "127.0.0.1", "--blobPort", str(port))
    quiet = ("--inMemoryPersistence", "--disableTelemetry", "--silent", "--skipApiVersionCheck")
    environ = {**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}
    log_path = folder / "azurite.log"
    with running_command([program, *where, *quiet], port, log_path, environ):
        from azure.storage.blob import ContainerClient

        endpoint = f"http://127.0.0.1:{port}"
        with ContainerClient.from_connection_string(connection_string(endpoint), BUCKET) as client:
            client.create_container()
        yield endpoint


def connection_string(endpoint: str) -> str:
    return f"AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint}/{ACCOUNT};"


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Point the SDK at `endpoint` by its own variables."""
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection_string(endpoint))


def use_sas(monkeypatch: pytest.MonkeyPatch, endpoint: str, **permissions: bool) -> str:
    """Point the SDK at `endpoint` with a SAS token of the container; return the token."""
    from azure.storage.blob import ContainerSasPermissions, generate_container_sas

    token = generate_container_sas(
        ACCOUNT,
        BUCKET,
        account_key=KEY,
        permission=ContainerSasPermissions(**permissions),
        expiry=datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1),
    )
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_SERVICE_ENDPOINT", f"{endpoint}/{ACCOUNT}")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", token)
    return token
