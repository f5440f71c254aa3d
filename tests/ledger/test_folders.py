"""Published folders: named by content, verified before use.

`pytest tests/ledger/test_folders.py`
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from job.errors import StoreError
from job.ledger.folders import PublishedFolder, fetch_folder, seal_folder, upload_folder
from job.store.local import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "bucket")


def publish(store: LocalStore, folder: Path) -> PublishedFolder:
    sealed = seal_folder("sweeps/card/slots/0000/adapter", folder)
    upload_folder(store, sealed, folder)
    return sealed


@pytest.fixture
def published(store: LocalStore, tmp_path: Path) -> PublishedFolder:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)))
    (folder / "adapter_config.json").write_text('{"r": 8}')
    return publish(store, folder)


def test_a_folder_comes_back_as_it_was(
    store: LocalStore, published: PublishedFolder, tmp_path: Path
) -> None:
    fetch_folder(store, published.key, published.sha256, tmp_path / "out")
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == bytes(range(256))
    assert published.key == f"sweeps/card/slots/0000/adapter-{published.sha256}"
    assert published.size_bytes == 256 + 8


def test_equal_content_has_an_equal_name(
    store: LocalStore, published: PublishedFolder, tmp_path: Path
) -> None:
    again = publish(store, tmp_path / "adapter")
    assert again == published
    (tmp_path / "adapter/adapter_config.json").write_text('{"r": 9}')
    changed = publish(store, tmp_path / "adapter")
    assert changed.key != published.key


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_named_and_not_left(
    store: LocalStore, published: PublishedFolder, tmp_path: Path, name: str, damage: str
) -> None:
    path = Path(store.uri) / published.key / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[3] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with pytest.raises(StoreError, match=name):
        fetch_folder(store, published.key, published.sha256, tmp_path / "out")
    assert not (tmp_path / "out" / name).exists()


def test_a_manifest_cannot_name_a_file_elsewhere(
    store: LocalStore, published: PublishedFolder, tmp_path: Path
) -> None:
    path = Path(store.uri) / published.key / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../escaped"] = {"bytes": 1, "sha256": "0"}
    path.write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="is not the manifest that was written"):
        fetch_folder(store, published.key, published.sha256, tmp_path / "out")
    import hashlib

    forged = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(StoreError, match=r"names a file '\.\./escaped'"):
        fetch_folder(store, published.key, forged, tmp_path / "out")
    assert not (tmp_path / "escaped").exists()
