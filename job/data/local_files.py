"""Files of rows on this machine: one, a glob, or a folder of shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from job.data.file_names import is_glob
from job.data.folders import CARD, CARD_LIMIT_BYTES, folder_files
from job.data.readers import read_file
from job.data.rows import SUPPORTED, Row, SourceVersion, explained, unusable
from job.data.unusable import listing
from job.store.base import file_sha256


@dataclass(frozen=True)
class LocalFiles:
    """The `Source` protocol on a folder's files."""

    folder: Path
    names: tuple[str, ...]  # relative to it, sorted

    def versions(self) -> list[SourceVersion]:
        versions = []
        for name in self.names:
            path = self.folder / name
            with explained(path):
                versions.append(SourceVersion(name, path.stat().st_size, file_sha256(path)))
        return versions

    def rows(self, should_stop: Callable[[], None]) -> Iterator[Row]:
        for name in self.names:
            should_stop()
            path = self.folder / name
            with explained(path), path.open("rb") as file:
                yield from read_file(name, file, str(path))


def list_files(path: Path) -> LocalFiles:
    """The files that a path names. Raises `DataError` for none, and if all of them are empty."""
    with explained(path):
        if path.is_dir():
            files = LocalFiles(path, tuple(sorted(folder_files(_walk(path), path, _card(path)))))
        elif path.is_file():
            files = LocalFiles(path.parent, (path.name,))
        elif is_glob(str(path)):
            files = _glob(path)
        elif path.exists():
            raise unusable(path, "is neither a file nor a folder", f"give {SUPPORTED}")
        else:
            raise unusable(path, f"does not exist ({_around(path)})", f"give {SUPPORTED}")
        if not any((files.folder / name).stat().st_size for name in files.names):
            raise unusable(path, "is empty", "give a file with one row a line")
    return files


def _around(path: Path) -> str:
    """What is there instead of a file: a volume is empty until somebody copies the rows to it."""
    place = next((parent for parent in path.parents if parent.is_dir()), Path())
    names = sorted(path.name for path in place.iterdir())
    names = [name for name in names if not name.startswith((".", "lost+found"))]
    if not names:
        return f"{place} is empty: copy the rows there first"
    return f"in {place}: {listing(names)}"


def _card(folder: Path) -> str | None:
    """The text of the data set's card in a folder, if there is one."""
    path = folder / CARD
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return file.read(CARD_LIMIT_BYTES).decode(errors="replace")


def _walk(folder: Path) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise error  # os.walk would leave out an unreadable sub-folder without a word

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        yield from (Path(parent, name).relative_to(folder).as_posix() for name in names)


def _glob(pattern: Path) -> LocalFiles:
    root = next(parent for parent in pattern.parents if not is_glob(str(parent)))
    paths = (path for path in root.glob(str(pattern.relative_to(root))) if path.is_file())
    names = sorted({path.relative_to(root).as_posix() for path in paths})
    if not names:
        raise unusable(pattern, f"matches no file ({_around(pattern)})", f"give {SUPPORTED}")
    return LocalFiles(root, tuple(names))
