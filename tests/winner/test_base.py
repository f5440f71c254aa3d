"""Merges and answers are of the base that was trained on. `pytest tests/winner/test_base.py`"""

from __future__ import annotations

from pathlib import Path

import pytest

from job.base_model import resolve_base_model
from job.errors import SettingsError
from job.ledger.records import Result
from job.store.local import LocalStore
from job.winner.answers import answer
from job.winner.base import base_of
from job.winner.merge import merge
from tests.ledger.documents import make_result
from tests.servers.gcs import gcs_server
from tests.test_base_model import FILES
from tests.test_weights import weights
from tests.winner.tuned import make_tuned_sweep, result_of, settings_of

SHARD = "model-00001-of-00002.safetensors"
REFUSED = (
    r"the base in {} is not the one that this adapter was trained on \(sha256:\w+ -> sha256:\w+\):"
    " put that one back, or begin a new sweep with this one"
)


def _result(folder: Path, base: str) -> Result:
    revision = resolve_base_model(base, "main", folder / "trial").revision
    return make_result(base_model=base, base_model_revision=revision)


def test_a_folder_is_the_one_that_was_trained_on_or_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, store = tmp_path / "base", LocalStore(tmp_path / "out")
    base.mkdir()
    for name, data in FILES.items():
        (base / name).write_bytes(data)
    result, settings = _result(tmp_path, str(base)), settings_of(tmp_path)
    assert base_of(store, result, settings).revision == result.base_model_revision
    assert "says nothing of" not in caplog.text, "nobody set a revision"
    (base / SHARD).write_bytes(weights(b"z"))
    with pytest.raises(SettingsError, match=REFUSED.format(base)):
        base_of(store, result, settings)


def test_a_folder_in_the_place_of_a_hubs_model_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner/name").mkdir(parents=True)
    for name, data in FILES.items():
        (tmp_path / "owner/name" / name).write_bytes(data)
    monkeypatch.chdir(tmp_path)
    result = make_result(base_model="owner/name", base_model_revision="c" * 40)
    with pytest.raises(SettingsError, match=f"trained on \\({'c' * 40} -> sha256:"):
        base_of(LocalStore(tmp_path / "out"), result, settings_of(tmp_path))


def test_a_buckets_files_that_changed_do_not_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gcs_server("models") as (endpoint, bucket):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
        for name, data in FILES.items():
            bucket.write(f"llama/{name}", data, None)
        result, store = _result(tmp_path, "gs://models/llama"), LocalStore(tmp_path / "out")
        here = settings_of(tmp_path)
        assert base_of(store, result, here).revision == result.base_model_revision
        bucket.write(f"llama/{SHARD}", weights(b"z"), None)
        new = here.model_copy(update={"work_dir": tmp_path / "new"})
        with pytest.raises(SettingsError, match=REFUSED.format("gs://models/llama")):
            base_of(store, result, new)
    assert not [path for path in (tmp_path / "new").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_neither_a_merge_nor_answers_are_of_another_base(tmp_path: Path) -> None:
    ledger, settings = make_tuned_sweep(tmp_path), settings_of(tmp_path)
    shard = next((tmp_path / "base").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    result = result_of(ledger)
    with pytest.raises(SettingsError, match=REFUSED.format(tmp_path / "base")):
        merge(ledger, 0, result, tmp_path / "merged", settings=settings)
    assert not (tmp_path / "merged").exists()
    with pytest.raises(SettingsError, match=REFUSED.format(tmp_path / "base")):
        answer(ledger, {0: result}, settings=settings, num_rows=1, max_new_tokens=1)
