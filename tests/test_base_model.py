"""A base model in a bucket is a folder once it is here. `pytest tests/test_base_model.py`"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from job.base_model import FP16_UNSAFE_MODEL_TYPES, resolve_base_model
from job.errors import SettingsError
from job.process.workspace import filling
from tests.servers.gcs import Bucket, gcs_server
from tests.test_weights import weights

CONFIG = json.dumps({"model_type": "llama"}).encode()
FILES = {
    "config.json": CONFIG,
    "model-00001-of-00002.safetensors": weights(b"x"),
    "model-00002-of-00002.safetensors": weights(b"y"),
    "tokenizer.json": b"{}",
    "tokenizer.model": b"sp",
    "chat_template.jinja": b"{{ }}",
}
LEFT_OUT = ["pytorch_model.bin", "modeling.py", "onnx/config.json", "README.md", ".gitattributes"]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Bucket]]:
    with gcs_server("models") as server:
        yield server


@pytest.fixture
def bucket(server: tuple[str, Bucket], monkeypatch: pytest.MonkeyPatch) -> Bucket:
    endpoint, bucket = server
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
    bucket.blobs.clear()
    for name, data in {**FILES, **dict.fromkeys(LEFT_OUT, b"no")}.items():
        bucket.write(f"llama/{name}", data, None)
    bucket.write("llama-big/config.json", b"another", None)
    return bucket


def test_a_buckets_model_comes_to_this_disk_once(bucket: Bucket, tmp_path: Path) -> None:
    model = resolve_base_model("gs://models/llama", "main", tmp_path)
    folder = Path(model.location)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert model.name == "gs://models/llama"
    assert model.config == {"model_type": "llama"}
    assert model.hub_revision is None
    inodes = {path.name: path.stat().st_ino for path in folder.iterdir()}
    (folder / "tokenizer.json").write_bytes(b"cut")  # another size: fetched again
    del inodes["tokenizer.json"]
    assert resolve_base_model("gs://models/llama", "main", tmp_path) == model
    assert (folder / "tokenizer.json").read_bytes() == FILES["tokenizer.json"]
    assert all((folder / name).stat().st_ino == inode for name, inode in inodes.items())


def test_a_buckets_model_is_fetched_by_one_worker_on_a_disk(bucket: Bucket, tmp_path: Path) -> None:
    folder = Path(resolve_base_model("gs://models/llama", "main", tmp_path).location)
    weights_path = folder / "model-00001-of-00002.safetensors"
    inode, waits = weights_path.stat().st_ino, threading.Event()
    weights_path.rename(tmp_path / "kept")
    with ThreadPoolExecutor() as pool, filling(folder, limit_seconds=1):
        found = pool.submit(
            resolve_base_model, "gs://models/llama", "main", tmp_path, should_stop=waits.set
        )
        assert waits.wait(30)
        (tmp_path / "kept").rename(weights_path)  # by us, which the other one waits for
    assert found.result(30).location == str(folder)
    assert weights_path.stat().st_ino == inode


def test_a_work_folder_that_is_none_of_ours_is_a_setting(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"^JOB_WORK_DIR: .*\(Not a directory\); give"):
        resolve_base_model("gs://models/llama", "main", tmp_path / "file")


def test_the_revision_changes_with_a_file_and_not_with_the_place(
    bucket: Bucket, tmp_path: Path
) -> None:
    first = resolve_base_model("gs://models/llama", "main", tmp_path / "a")
    assert first.revision == resolve_base_model("GS://models/llama/", "x", tmp_path / "b").revision
    bucket.write("llama/model-00001-of-00002.safetensors", weights(b"z"), None)
    second = resolve_base_model("gs://models/llama", "main", tmp_path / "a")
    assert second.revision != first.revision
    shard = Path(second.location, "model-00001-of-00002.safetensors")
    assert shard.read_bytes() == weights(b"z")


@pytest.mark.parametrize(
    ("removed", "words"),
    [
        (r"safetensors", "holds no .*safetensors file; pickled weights are refused"),
        (r"config.json", "is not a model folder: it has no config.json"),
        (r"llama/", "holds no .*safetensors file and no other weights; fetch the whole model"),
    ],
)
def test_a_prefix_that_is_no_model_names_the_setting_and_moves_nothing(
    bucket: Bucket, tmp_path: Path, removed: str, words: str
) -> None:
    for key in [key for key in bucket.blobs if removed in key]:
        del bucket.blobs[key]
    with pytest.raises(SettingsError, match=f"JOB_BASE_MODEL: gs://models/llama/ {words}"):
        resolve_base_model("gs://models/llama", "main", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_bucket_names_the_setting(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="JOB_BASE_MODEL"):
        resolve_base_model("gs://missing/llama", "main", tmp_path)


def test_a_folder_needs_no_place_to_download_to(tmp_path: Path) -> None:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    model = resolve_base_model(str(tmp_path), "main")
    assert model.location == str(tmp_path)
    assert model.revision.startswith("sha256:")


@pytest.mark.parametrize("place", ["folder", "uri", "bucket"])
def test_a_revision_of_what_has_none_is_told(
    place: str, bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    names = {"folder": str(tmp_path), "uri": tmp_path.as_uri(), "bucket": "gs://models/llama"}
    resolve_base_model(names[place], "main", tmp_path / "work")
    # Nor is what a sweep has recorded of these files a setting of anybody's.
    resolve_base_model(names[place], f"sha256:{'0' * 64}", tmp_path / "work")
    assert "REVISION" not in caplog.text
    resolve_base_model(names[place], "v1.1", tmp_path / "work")
    assert f"JOB_BASE_MODEL_REVISION=v1.1 says nothing of {names[place]}, which is" in caplog.text


@pytest.mark.parametrize("family", sorted(FP16_UNSAFE_MODEL_TYPES))
def test_a_family_that_overflows_fp16_is_refused_with_the_reason(
    tmp_path: Path, family: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    (tmp_path / "model.safetensors").mkdir()  # reading it would fail: the refusal comes first
    with pytest.raises(SettingsError, match=f"family {family}, which overflows in fp16"):
        resolve_base_model(str(tmp_path), "main")


@pytest.mark.slow
def test_every_numbered_gemma_that_transformers_knows_is_refused() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if re.match(r"gemma\d", name)]
    drafters = {name for name in known if name.endswith("_assistant")}  # which nobody tunes alone
    assert "gemma4_unified_text" in known
    assert set(known) - drafters <= set(FP16_UNSAFE_MODEL_TYPES)


def test_an_unsafe_familys_weights_are_not_downloaded(bucket: Bucket, tmp_path: Path) -> None:
    bucket.write("llama/config.json", b'{"model_type": "gemma3"}', None)
    with pytest.raises(SettingsError, match="transformers issue 36822"):
        resolve_base_model("gs://models/llama", "main", tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["config.json"]


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_a_weight_file_that_is_cut_off_is_named_with_what_helps(
    bucket: Bucket, tmp_path: Path, place: str
) -> None:
    name = "model-00002-of-00002.safetensors"
    whole = dict(FILES) | {name: weights(b"y")[:-300]}
    for file, data in whole.items():
        bucket.write(f"llama/{file}", data, None)
        (tmp_path / file).write_bytes(data)
    model = str(tmp_path) if place == "folder" else "gs://models/llama"
    with pytest.raises(SettingsError, match=rf"JOB_BASE_MODEL: .*/{name} is cut off") as caught:
        resolve_base_model(model, "main", tmp_path / "cache")
    again = "; fetch it again and copy it to gs://models/llama/ again"
    assert str(caught.value).endswith("; fetch it again" if place == "folder" else again)


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("key", "quantised", "method"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization_config", {"quant_method": "awq", "bits": 4}, "awq"),
        ("quantization_config", {"quant_method": "fp8"}, "fp8"),
        ("quantization_config", {"load_in_8bit": True}, "bitsandbytes' int8"),
        ("quantization_config", NF4 | {"bnb_4bit_quant_type": "fp4"}, "bitsandbytes' fp4"),
        ("quantization_config", {"load_in_4bit": True}, "bitsandbytes' fp4"),
        ("compression_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_quantised_in_another_way_is_refused_before_its_weights(
    tmp_path: Path, key: str, quantised: dict[str, object], method: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", key: quantised}))
    (tmp_path / "model.safetensors").mkdir()  # reading it would fail
    with pytest.raises(SettingsError, match=rf"quantised already, by {method}, .*\(-bnb-4bit\)"):
        resolve_base_model(str(tmp_path), "main")


def test_a_checkpoint_in_nf4_is_taken(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": NF4}
    for name, data in (FILES | {"config.json": json.dumps(config).encode()}).items():
        (tmp_path / name).write_bytes(data)
    assert resolve_base_model(str(tmp_path), "main").config == config


@pytest.mark.parametrize("place", ["folder", "bucket"])
@pytest.mark.parametrize("beside", [{}, FILES], ids=["alone", "beside a model"])
def test_an_adapter_is_no_base(
    bucket: Bucket, tmp_path: Path, place: str, beside: dict[str, bytes]
) -> None:
    adapter = {"adapter_config.json": b'{"base_model_name_or_path": "owner/base"}'}
    bucket.blobs.clear()
    for file, data in (beside | adapter).items():
        bucket.write(f"llama/{file}", data, None)
        (tmp_path / file).write_bytes(data)
    model = str(tmp_path) if place == "folder" else "gs://models/llama"
    with pytest.raises(
        SettingsError, match="is an adapter .* give the model that it belongs to"
    ) as e:
        resolve_base_model(model, "main", tmp_path / "cache")
    assert str(e.value).endswith(", owner/base") == (place == "folder")


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_the_config_is_checked_before_any_weight_is_fetched_or_read(
    bucket: Bucket, tmp_path: Path, place: str
) -> None:
    def refuse(name: str, config: Mapping[str, Any]) -> None:
        raise SettingsError(f"{name}: {config['model_type']} cannot be trained")

    for file, data in FILES.items():
        (tmp_path / file).write_bytes(data)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"cut")  # seen if it were read
    model = str(tmp_path) if place == "folder" else "gs://models/llama"
    with pytest.raises(SettingsError, match=f"{model}: llama cannot be trained"):
        resolve_base_model(model, "main", tmp_path / "cache", check=refuse)
    fetched = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert fetched == (["config.json"] if place == "bucket" else [])


def test_a_folders_weights_are_read_once_and_again_only_if_they_changed(tmp_path: Path) -> None:
    """A digest that is kept is believed: a false one shows that the file was not read again."""
    folder, work, known = tmp_path / "base", tmp_path / "work", tmp_path / "work/digests.json"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)

    def revision(work_dir: Path) -> str:
        return resolve_base_model(str(folder), "main", work_dir).revision

    true = revision(work)
    assert revision(work) == true
    shard = folder / "model-00001-of-00002.safetensors"
    kept = json.loads(known.read_text())
    assert {Path(name).name for name in kept} == {*list(FILES)[:3]}, "config and weights"
    kept[str(shard)][-1] = "0" * 64
    known.write_text(json.dumps(kept))
    assert revision(work) != true, "it was not read again"
    before = shard.stat()
    shard.write_bytes(FILES[shard.name])
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp -p` would
    assert revision(work) == true, "its inode changed, so it was"
    known.write_text('["damaged"')
    assert revision(work) == true
    (tmp_path / "file").touch()
    assert revision(tmp_path / "file") == true, "a work folder that cannot be written"
