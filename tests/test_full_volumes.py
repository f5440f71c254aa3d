"""A full volume is blamed on the folder that is full. `pytest tests/test_full_volumes.py`

The kernel's own `/dev/full` takes the place of the file that is being written.
"""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from job.errors import OutageError, StoreError
from job.ledger.folders import seal_folder, upload_folder
from job.store.local import LocalStore
from job.winner.adapter import download
from tests.ledger.documents import make_result


class Full(LocalStore):
    """A store beside which every volume is full, and itself too."""

    @staticmethod
    def _temporary(target: Path) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        link = target.with_name(f".tmp-{uuid.uuid4().hex}")
        link.symlink_to("/dev/full")
        return link


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "work/checkpoint/state.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * 100_000)
    return path


def test_a_full_store_is_the_outputs_and_not_the_sources(tmp_path: Path, source: Path) -> None:
    with pytest.raises(StoreError) as uploaded:
        Full(tmp_path / "out").upload("sweeps/s/state.json", source)
    with pytest.raises(StoreError) as created:
        Full(tmp_path / "out").put_if_absent("sweeps/s/sweep.json", b"{}")
    for caught in (uploaded, created):
        assert str(caught.value).startswith(f"JOB_OUTPUT_URI: {tmp_path}/out: No space left")
        assert "free space there, or enlarge the volume" in str(caught.value)
    assert not [*tmp_path.rglob(".tmp-*")], "nothing half-written stays"


def test_a_full_target_of_a_download_is_not_the_stores(tmp_path: Path, source: Path) -> None:
    LocalStore(tmp_path / "out").upload("sweeps/s/x", source)
    with pytest.raises(StoreError, match=f"^{tmp_path}/there: no space left for x of .*out"):
        Full(tmp_path / "out").download("sweeps/s/x", tmp_path / "there/x")


def test_a_full_volume_for_the_best_adapter_names_the_option(tmp_path: Path, source: Path) -> None:
    sealed = seal_folder("sweeps/s/slots/0000/adapter", source.parent)
    upload_folder(LocalStore(tmp_path / "out"), sealed, source.parent)
    result = make_result(adapter_key=sealed.key, adapter_sha256=sealed.sha256)
    with pytest.raises(OutageError, match=f"^best --download: {tmp_path}/best: no space left; "):
        download(Full(tmp_path / "out"), 0, result, tmp_path / "best")
    assert not [*tmp_path.glob("*best*")], "nothing half-fetched stays"
