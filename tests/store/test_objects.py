"""Other people's objects, whatever their names. `pytest tests/store/test_objects.py`"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from job.errors import SettingsError, StoreError
from job.store.objects import ObjectInfo, download_object, list_objects
from tests.servers import azurite, gcs, s3
from tests.servers.proxy import Fault, proxy_to
from tests.tiers import slow

NAMES = ["rows/a b+c.jsonl", "rows/ä/..jsonl", "rows/x=1/%41.parquet", "rows/z?#.csv"]
LARGE_BYTES = 9_000_000


class Service:
    """A bucket with somebody's rows in it."""

    def __init__(self, scheme: str, google: gcs.Bucket | None) -> None:
        self.uri = f"{scheme}://{s3.BUCKET}"
        self._google = google

    def write(self, key: str, data: bytes) -> None:
        if self._google:
            self._google.write(key, data, None)
        elif self.uri.startswith("az"):
            from azure.storage.blob import ContainerClient

            name = "AZURE_STORAGE_CONNECTION_STRING"
            with ContainerClient.from_connection_string(os.environ[name], s3.BUCKET) as container:
                container.upload_blob(key, data, overwrite=True)
        else:
            boto3.session.Session().client("s3").put_object(Bucket=s3.BUCKET, Key=key, Body=data)


@pytest.fixture(scope="module", params=["s3", "gs", *slow("az")])
def service(request: pytest.FixtureRequest, moto: str) -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "s3":
            s3.use(patch, moto)
            yield Service("s3", None)
        elif request.param == "az":
            azurite.use(patch, request.getfixturevalue("azurite_blobs"))
            yield Service("az", None)
        else:
            with gcs.gcs_server(s3.BUCKET) as (endpoint, bucket):
                patch.setenv("STORAGE_EMULATOR_HOST", endpoint)
                yield Service("gs", bucket)


def test_objects_of_any_name_are_listed_by_key_and_come_back(
    service: Service, tmp_path: Path
) -> None:
    for number, key in enumerate([*NAMES, "rows/", "rows-of-others/x"]):
        service.write(key, bytes(number))
    listed = list_objects(f"{service.uri}/rows/")
    assert [(info.key, info.size_bytes) for info in listed] == sorted(
        zip(NAMES, range(4), strict=True)
    )
    for info in listed:
        download_object(service.uri, info, tmp_path / "row", print)
        assert (tmp_path / "row").read_bytes() == bytes(info.size_bytes)
    assert len(list_objects(f"{service.uri}/rows")) == 5, "a prefix is not a folder"
    assert list_objects(f"{service.uri}/nothing/") == []


@pytest.mark.parametrize("size_bytes", [100, *slow(LARGE_BYTES)])
def test_an_object_that_changed_since_it_was_listed_is_refused(
    service: Service, tmp_path: Path, size_bytes: int
) -> None:
    service.write("changing/x", os.urandom(size_bytes))
    (info,) = list_objects(f"{service.uri}/changing/x")
    service.write("changing/x", os.urandom(size_bytes))
    with pytest.raises(StoreError, match="changing/x: was changed or removed"):
        download_object(service.uri, info, tmp_path / "row", print)
    assert not list(tmp_path.iterdir())


def test_a_size_that_differs_from_the_list_is_refused(service: Service, tmp_path: Path) -> None:
    service.write("size/x", b"12345")
    (info,) = list_objects(f"{service.uri}/size/x")
    with pytest.raises(StoreError, match="5 bytes came, 6 were listed"):
        download_object(service.uri, ObjectInfo(info.key, 6, info.version), tmp_path / "row", print)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("size_bytes", [100_000, LARGE_BYTES])
def test_progress_adds_up_to_the_size_even_when_a_try_breaks_off(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size_bytes: int
) -> None:
    data = os.urandom(size_bytes)
    service.write("progress/x", data)
    (info,) = list_objects(f"{service.uri}/progress/x")
    variable = {
        "s3": "AWS_ENDPOINT_URL_S3",
        "gs": "STORAGE_EMULATOR_HOST",
        "az": "AZURE_STORAGE_CONNECTION_STRING",
    }[service.uri[:2]]
    before = os.environ[variable]
    (endpoint,) = re.findall(r"http://[\w.:]+", before)
    with proxy_to(endpoint) as proxy:
        monkeypatch.setenv(variable, before.replace(endpoint, proxy.endpoint))
        proxy.faults = [Fault("reset in body", times=1, match="GET")]
        arrived: list[int] = []
        download_object(service.uri, info, tmp_path / "row", arrived.append)
    assert proxy.injected
    assert sum(arrived) == size_bytes
    assert (tmp_path / "row").read_bytes() == data


def test_a_missing_bucket_names_the_data_set_setting(service: Service) -> None:
    scheme = service.uri.partition("://")[0]
    with pytest.raises(SettingsError, match=rf"^JOB_DATASET_URI: {scheme}://absent.*no bucket"):
        list_objects(f"{scheme}://absent/rows/")
    with pytest.raises(SettingsError, match=r"^JOB_BASE_MODEL: allowed: s3://bucket"):
        list_objects("ftp://absent/rows/", setting="JOB_BASE_MODEL")
