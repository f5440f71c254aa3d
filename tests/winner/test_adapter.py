"""The best adapter comes whole, or its slot is named. `pytest tests/winner/test_adapter.py`"""

from __future__ import annotations

from pathlib import Path

import pytest

from job.errors import SettingsError, SlotError, StoreError
from job.ledger.folders import seal_folder, upload_folder
from job.ledger.records import Result
from job.store.local import LocalStore
from job.winner.adapter import download
from tests.ledger.documents import make_result

SLOT = 7


@pytest.fixture
def result(tmp_path: Path) -> Result:
    """A committed trial's adapter, in the store under `out`."""
    folder = tmp_path / "sent"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)))
    sealed = seal_folder("sweeps/s/slots/0007/adapter", folder)
    upload_folder(LocalStore(tmp_path / "out"), sealed, folder)
    return make_result(adapter_key=sealed.key, adapter_sha256=sealed.sha256)


@pytest.mark.parametrize("damage", ["flipped", "deleted", "all deleted", "a folder"])
def test_a_damaged_adapter_names_its_slot_and_what_helps(
    tmp_path: Path, result: Result, damage: str
) -> None:
    path = tmp_path / "out" / str(result.adapter_key) / "adapter_model.safetensors"
    if damage == "flipped":
        path.write_bytes(b"\x01" + path.read_bytes()[1:])
    else:
        path.unlink()
    if damage == "all deleted":
        (path.parent / "manifest.json").unlink()
    if damage == "a folder":
        path.mkdir()
    with pytest.raises(SlotError) as caught:
        download(LocalStore(tmp_path / "out"), SLOT, result, tmp_path / "best")
    message = str(caught.value)
    assert message.startswith(f"slot {SLOT}'s adapter is damaged: {tmp_path}/out/sweeps/s/slots/")
    assert f"`job redo {SLOT}` begins it again" in message
    assert f"`job exclude {SLOT} --reason TEXT` leaves it out" in message
    assert not [*tmp_path.glob("*best*")], "nothing half-fetched stays"


@pytest.mark.parametrize("below", ["", "/deeper/still"])
def test_a_link_to_nothing_is_no_file(tmp_path: Path, result: Result, below: str) -> None:
    link = tmp_path / "dangling"
    link.symlink_to("gone")
    with pytest.raises(SettingsError) as caught:
        download(LocalStore(tmp_path / "out"), SLOT, result, Path(f"{link}{below}"))
    told = f"best --download: {link}{below}: {f'{link} ' if below else ''}is a link to gone, which"
    assert str(caught.value).startswith(told)
    link.unlink()
    link.touch()
    with pytest.raises(SettingsError, match=r"is a file|Not a directory"):
        download(LocalStore(tmp_path / "out"), SLOT, result, Path(f"{link}{below}"))


def test_a_store_that_fails_is_not_the_slots_damage(tmp_path: Path, result: Result) -> None:
    class Failing(LocalStore):
        def download(self, key: str, path: Path) -> None:
            raise StoreError(f"{self.uri}/{key}: still failing after 20 minutes")

    with pytest.raises(StoreError, match="still failing"):
        download(Failing(tmp_path / "out"), SLOT, result, tmp_path / "best")
