"""A tokenizer is loaded once per disk and files. `pytest tests/data/test_tokenisation.py`"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.data import tokenisation
from job.data.prepared import prepare
from job.data.tokenisation import Facts, Tokenisation, find_tokenisation, tokenisation_of
from job.errors import OutageError
from job.store.local import LocalStore
from tests.data.test_build import ROWS, settings_for, tokenizer, write_lines
from tests.tiny_tokenizer import CHATML, byte_level_tokenizer

PLAIN = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"


class Disk:
    """A base's folder and a work folder; `loads` counts how often its tokenizer was loaded."""

    def __init__(self, folder: Path) -> None:
        self.base, self.work, self.loads = folder / "base", folder / "work", 0
        self.there = True
        tokenizer().save_pretrained(self.base)
        (self.base / "config.json").write_text('{"model_type": "llama"}')

    def load(self) -> Any:
        self.loads += 1
        self.there = True
        return tokenizer()

    def find(self, chat_template: str | None = None, *, load: Any = None) -> Tokenisation:
        return find_tokenisation(
            chat_template,
            folder=lambda: self.base if self.there else None,
            load=load or self.load,
            work_dir=self.work,
        )

    def kept(self) -> list[Path]:
        return sorted(self.work.rglob("*"))[1:] if self.work.exists() else []


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


def test_the_second_trial_on_a_disk_knows_all_of_it_and_loads_nothing(disk: Disk) -> None:
    first = disk.find()
    assert first.facts == tokenisation_of(tokenizer(), None).facts
    assert disk.find().facts == first.facts
    assert disk.loads == 1
    other = disk.find(PLAIN)
    assert other.facts == tokenisation_of(tokenizer(), PLAIN).facts
    assert disk.find(PLAIN).facts == other.facts
    assert disk.loads == 2


def _replace(name: str, text: str) -> Callable[[Disk], None]:
    def change(disk: Disk) -> None:
        path = disk.base / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    return change


def _grow(disk: Disk) -> None:
    byte_level_tokenizer(bos=True).save_pretrained(disk.base)


def _shorten(disk: Disk) -> None:
    (path,) = disk.kept()
    path.write_bytes(path.read_bytes()[:-9])


def _no_digest(disk: Disk) -> None:
    (path,) = disk.kept()
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"fingerprint": "x"}))


@pytest.mark.parametrize(
    "change",
    [
        _grow,
        _replace("chat_template.jinja", PLAIN),
        _replace("additional_chat_templates/rag.jinja", PLAIN),
        _replace("config.json", '{"model_type": "qwen2"}'),
        _replace("vocab.txt", "a"),
        _shorten,
        _no_digest,
    ],
)
def test_files_that_changed_are_loaded_again(disk: Disk, change: Callable[[Disk], None]) -> None:
    disk.find()
    change(disk)
    disk.find()
    assert disk.loads == 2
    disk.find()
    assert disk.loads == 2


def test_a_template_in_a_file_is_known_by_its_content(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(PLAIN)
    disk.find(str(path))
    path.write_text(CHATML)
    assert disk.find(str(path)).facts.template == CHATML
    assert disk.loads == 2


def test_other_versions_of_the_libraries_are_asked_anew(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.find()
    monkeypatch.setattr(tokenisation, "version", lambda _package: "99")
    disk.find()
    assert disk.loads == 2


def test_weights_that_come_later_change_nothing(disk: Disk) -> None:
    disk.find()
    for name in ("model.safetensors", "model.safetensors.index.json", "generation_config.json"):
        (disk.base / name).write_bytes(b"{}")
    disk.find()
    assert disk.loads == 1


def test_a_hubs_files_are_known_once_they_are_fetched(disk: Disk) -> None:
    disk.there = False
    disk.find()
    assert disk.there
    disk.find()
    assert disk.loads == 1


def test_files_that_are_replaced_meanwhile_are_not_kept(disk: Disk) -> None:
    def load() -> Any:
        loaded = disk.load()
        _grow(disk)
        return loaded

    disk.find(load=load)
    assert disk.kept() == []


def test_a_work_folder_that_cannot_be_written_costs_time_only(disk: Disk) -> None:
    disk.work.write_text("no folder")
    disk.find()
    assert disk.find().facts == tokenisation_of(tokenizer(), None).facts
    assert disk.loads == 2


def _prepare(disk: Disk, rows: Path, store: str) -> None:
    settings = settings_for(rows)
    prepare(
        settings,
        tokenisation=disk.find(),
        store=LocalStore(disk.base.parent / store),
        cache_dir=disk.work,
        should_stop=lambda: None,
    )


def test_rows_that_have_to_be_built_load_it_and_no_others(disk: Disk, tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", ROWS)
    _prepare(disk, rows, "out")
    assert disk.loads == 1
    _prepare(disk, rows, "out")
    _prepare(disk, rows, "other")  # published from this disk
    assert disk.loads == 1
    write_lines(rows, ROWS[1:])
    _prepare(disk, rows, "out")
    assert disk.loads == 2


def test_rows_are_never_published_under_what_is_kept_wrongly(disk: Disk, tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", ROWS)
    disk.find()
    (path,) = disk.kept()
    wrong = Facts("0" * 64, "0" * 64, PLAIN)
    path.write_text(json.dumps(vars(wrong)))
    with pytest.raises(OutageError, match="run again"):
        _prepare(disk, rows, "out")
    assert not list(LocalStore(tmp_path / "out").list(""))
    _prepare(disk, rows, "out")
