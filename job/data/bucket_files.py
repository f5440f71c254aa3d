"""Files of rows in a bucket: listed for the digest, and downloaded one by one to be read."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.data.file_names import glob_folder, glob_matches, is_glob
from job.data.folders import CARD, CARD_LIMIT_BYTES, folder_files
from job.data.readers import read_file
from job.data.rows import SUPPORTED, Row, SourceVersion, unusable
from job.errors import work_dir_error
from job.log import log
from job.progress import CountProgress, size
from job.store.objects import ObjectInfo, download_object, list_objects

_SETTING = "JOB_DATASET_URI"
_FIRST = " (nothing is there: copy the rows there first)"


@dataclass(frozen=True)
class BucketFiles:
    """The `Source` protocol on a bucket's objects."""

    bucket: str  # s3://name, gs://name or az://name
    cache_dir: Path
    objects: tuple[tuple[str, ObjectInfo], ...]  # by their names below the folder, sorted
    outage_seconds: float = 1200

    def versions(self) -> list[SourceVersion]:
        service = self.bucket.partition("://")[0]
        return [
            SourceVersion(name, info.size_bytes, f"{service}:{info.version}")
            for name, info in self.objects
        ]

    def rows(self, should_stop: Callable[[], None]) -> Iterator[Row]:
        for name, info in self.objects:
            should_stop()
            with self.downloaded(info) as file:
                yield from read_file(name, file, f"{self.bucket}/{info.key}")

    @contextmanager
    def downloaded(self, info: ObjectInfo) -> Iterator[io.BufferedReader[Any]]:
        """The open object, downloaded first where this disk lacks it.

        Its file is removed once it is read, so that the disk never has to hold the whole data set.
        A killed process leaves a file behind, which the next one uses.
        """
        identity = f"{self.bucket}\n{info.key}\n{info.version}"
        path = self.cache_dir / "objects" / hashlib.sha256(identity.encode()).hexdigest()
        while (file := _open_whole(path, info.size_bytes)) is None:  # another process may remove it
            self._download(info, path)
        with closing(file):
            yield file
        path.unlink(missing_ok=True)

    def _download(self, info: ObjectInfo, path: Path) -> None:
        log.info("data: downloading %s, %s", info.key, size(info.size_bytes))
        title = f"data: downloading {info.key}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with CountProgress(title, "bytes", total=info.size_bytes) as progress:
                download_object(
                    self.bucket,
                    info,
                    path,
                    progress.advance,
                    setting=_SETTING,
                    outage_seconds=self.outage_seconds,
                )
        except OSError as error:
            raise work_dir_error(path, error) from error


def list_bucket(uri: str, cache_dir: Path, outage_seconds: float = 1200) -> BucketFiles:
    """The objects that a URI names: one, those of a glob, or those of a folder.

    A folder's data set card (README.md) is downloaded, because it may name the splits.

    Raises `DataError` if there is none or all are empty, and what the bucket raises.
    """
    scheme, _, rest = uri.partition("://")
    name, _, key = rest.partition("/")
    bucket, wanted = f"{scheme.lower()}://{name}", key.strip("/")
    prefix = _literal_prefix(wanted)
    top = f"{bucket}/{prefix}" if prefix else bucket
    infos = list_objects(top, setting=_SETTING, outage_seconds=outage_seconds)
    listed = {info.key: info for info in infos}
    if wanted in listed:
        folder, keys = wanted[: wanted.rfind("/") + 1], [wanted]
    elif is_glob(wanted):
        folder = glob_folder(wanted)
        keys = [key for key in listed if glob_matches(wanted, key)]
        if not keys:
            raise unusable(uri, f"matches no object{_FIRST}", f"give {SUPPORTED}")
    else:
        folder = f"{wanted}/" if wanted else ""
        names = [key[len(folder) :] for key in listed if key.startswith(folder)]
        if not names:
            raise unusable(uri, f"does not exist{_FIRST}", f"give {SUPPORTED}")
        card = _card(BucketFiles(bucket, cache_dir, (), outage_seconds), listed.get(folder + CARD))
        keys = [folder + name for name in folder_files(names, uri, card)]
    if not any(listed[key].size_bytes for key in keys):
        raise unusable(uri, "is empty", "give a file with one row a line")
    objects = tuple((key[len(folder) :], listed[key]) for key in sorted(keys))
    return BucketFiles(bucket, cache_dir, objects, outage_seconds)


def _card(files: BucketFiles, info: ObjectInfo | None) -> str | None:
    """The text of the data set's card in a folder, if there is one."""
    if info is None or info.size_bytes > CARD_LIMIT_BYTES:
        return None
    with files.downloaded(info) as file:
        return file.read().decode(errors="replace")


def _literal_prefix(wanted: str) -> str:
    """What all wanted keys begin with: the text before the first wildcard."""
    return wanted[: min((wanted.index(c) for c in "*?[" if c in wanted), default=len(wanted))]


def _open_whole(path: Path, size_bytes: int) -> io.BufferedReader[Any] | None:
    """Open the file if it is whole: even if another process removes it, it stays readable here."""
    with suppress(FileNotFoundError):
        file = path.open("rb")
        if file.seek(0, io.SEEK_END) == size_bytes:
            file.seek(0)
            return file
        file.close()
    return None
