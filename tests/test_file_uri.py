"""`file://` URIs as paths. `pytest tests/test_file_uri.py`"""

from __future__ import annotations

from pathlib import Path

import pytest

from job.base_model import resolve_base_model
from job.data.sources import open_source
from job.errors import SettingsError
from job.file_uri import absolute, path_of
from job.store import open_store


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:///a%20b/c", "/a b/c"),
        ("file:///a%2520b", "/a%20b"),  # decoded once
        ("file:///100%/x", "/100%/x"),
        ("file:///%C3%A9t%C3%A9", "/été"),
        ("file://localhost/a", "/a"),
        ("FILE:///a", "/a"),
        ("/a%20b", None),
        ("s3://bucket/a%20b", None),
        ("owner/name", None),
    ],
)
def test_only_a_uri_is_decoded(uri: str, path: str | None) -> None:
    assert path_of(uri) == (None if path is None else Path(path))


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("file://host/a", "the machine 'host'"),
        ("file://a%20b/c", "the machine 'a%20b'"),
        ("file://", "names nothing"),
        ("file:///", "names nothing"),
        ("file:///a%00b", "%00"),
    ],
)
def test_what_no_path_can_be_is_refused_in_words(uri: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        path_of(uri)


def test_a_folder_has_one_spelling_and_a_buckets_uri_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "link").symlink_to("a b")
    monkeypatch.chdir(tmp_path / "a b")
    for uri in ("x", "./x", "../link/x", f"{tmp_path}/link/x", f"file://{tmp_path}/a%20b/x"):
        assert absolute(uri) == f"{tmp_path}/a b/x"
    for uri in ("s3://bucket/./x", "az://c/x", "file://host/a", "a\0b"):
        assert absolute(uri) == uri


def test_rows_base_and_output_are_found_where_a_uri_says(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"text": "x"}\n')
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    uri = f"file://{tmp_path}/a%20b"
    assert open_store(uri).uri == str(folder)
    assert [v.name for v in open_source(f"{uri}/rows.jsonl", tmp_path).versions()] == ["rows.jsonl"]
    assert resolve_base_model(uri, "main").location == str(folder)
    literal = tmp_path / "a%20b"
    assert open_store(str(literal)).uri == str(literal)


def test_another_machine_is_refused_under_the_settings_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="JOB_OUTPUT_URI: .* machine 'host'"):
        open_store("file://host/out")
    with pytest.raises(SettingsError, match="JOB_DATASET_URI: .* machine 'host'"):
        open_source("file://host/rows.jsonl", tmp_path)
    with pytest.raises(SettingsError, match="JOB_BASE_MODEL: .* machine 'host'"):
        resolve_base_model("file://host/base", "main")
