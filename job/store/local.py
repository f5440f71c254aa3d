"""`LocalStore`: a folder on any file system with hard links (a disk, NFS; not FAT, not gcsfuse).

A document's first version is the file `<key>`, the next ones are `<key>.v2`, `<key>.v3`, …, each
published by `os.link`, which fails if the name exists: that is the compare-and-swap, without any
lock to be left behind by a killed process. Old versions stay, or a late writer could reuse a name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from job.errors import VOLUME_FULL, DamagedError, SettingsError, StoreError
from job.store.base import DOCUMENT_LIMIT_BYTES, Stored, check_key

_VERSION_SUFFIX = re.compile(r"\.v([1-9][0-9]*)$")
_TEMPORARY = ".tmp-"
_NO_LINKS = "no hard links here, or the disk fails (Input/output error)"
# A folder's names cannot be synced on every file system (CIFS, FUSE, 9p): they are safe by then.
_NO_SYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
# Errors of a folder that can never serve, and of one that fails now; any other is a bug of ours.
_UNUSABLE = {
    errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
    errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EEXIST,
}  # fmt: skip
_FAILING = VOLUME_FULL | {errno.EIO, errno.ESTALE, errno.EMLINK}
# Errors of a wrong setting, where the folder holds nothing of ours yet: a read-only mount, /proc.
# Where it has served, this node is at fault: ext4 turns read-only after an I/O error, and the next
# node mounts it anew.
_WRONG_OR_FAILING = {errno.EROFS, errno.ENOENT}
_SERVED = ("bases", "prepared", "sweeps")  # folders that a trial, or `job stage`, leaves


class LocalStore:
    """The `Store` protocol on a folder."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    @property
    def uri(self) -> str:
        return str(self._root)

    def get(self, key: str) -> Stored | None:
        with self._translated():
            path = self._path(key)
            version = self._newest_version(path)
            if version == 0:
                return None
            file = _versioned(path, version)
            _check_file(file)
            if file.stat().st_size > DOCUMENT_LIMIT_BYTES:
                raise DamagedError(f"{file}: over the limit of {DOCUMENT_LIMIT_BYTES} bytes")
            return Stored(file.read_bytes(), str(version))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self._translated():
            return self._link(data, self._path(key))

    def put_if_version(self, key: str, data: bytes, version: str) -> bool:
        with self._translated():
            path = self._path(key)
            if self._newest_version(path) != int(version):
                return False
            return self._link(data, _versioned(path, int(version) + 1))

    def upload(self, key: str, path: Path) -> None:
        with self._translated():
            target = self._path(key)
            temporary = self._temporary(target)
            try:
                shutil.copyfile(path, temporary)
                _sync(temporary)
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)

    def download(self, key: str, path: Path) -> None:
        with self._translated():
            temporary, source = self._temporary(path), self._path(key)
            if not source.exists():
                raise _AbsentError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))
            _check_file(source)
            try:
                shutil.copyfile(source, temporary)
                temporary.replace(path)
            except OSError as error:
                if error.errno not in VOLUME_FULL:
                    raise
                what = f"no space left for {source.name} of {source.parent}"
                raise StoreError(f"{path.parent}: {what}; free space there") from error
            finally:
                temporary.unlink(missing_ok=True)

    def list(self, prefix: str) -> Iterator[str]:
        with self._translated():
            top = self._root / prefix.rpartition("/")[0]
            files = (file for file in top.rglob("*") if file.is_file())
            keys = {
                _VERSION_SUFFIX.sub("", file.relative_to(self._root).as_posix())
                for file in files
                if not file.name.startswith(_TEMPORARY)
            }
            return iter(sorted(key for key in keys if key.startswith(prefix)))

    def delete(self, key: str) -> None:
        with self._translated():
            path = self._path(key)
            for version in range(self._newest_version(path), 0, -1):
                _versioned(path, version).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        check_key(key)
        if _VERSION_SUFFIX.search(key):
            raise ValueError(f"a key must not end like a version: {key!r}")
        path = self._root / key
        # A link planted inside the folder must not lead a write outside it.
        if not path.resolve().is_relative_to(self._root.resolve()):
            raise DamagedError(f"{path}: leads outside {self._root}")
        return path

    @staticmethod
    def _newest_version(path: Path) -> int:
        """The highest version of the document, 0 if there is none."""
        if not path.exists():
            return 0
        prefix = path.name + ".v"
        names = (entry.name for entry in os.scandir(path.parent) if entry.name.startswith(prefix))
        matches = (_VERSION_SUFFIX.search(name) for name in names)
        return max((int(match[1]) for match in matches if match), default=1)

    def _link(self, data: bytes, target: Path) -> bool:
        temporary = self._temporary(target)
        try:
            temporary.write_bytes(data)
            _sync(temporary)
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno == errno.EIO:
                    raise _NoLinksError(errno.EIO, _NO_LINKS, str(target)) from error
                raise
            _sync(target.parent)
            return True
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def _temporary(target: Path) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn the system's errors into the one line that a person needs."""
        try:
            yield
        except _AbsentError:
            raise
        except OSError as error:
            where = error.filename or self._root
            unclear = self._is_ours(Path(where)) and (
                error.errno in _WRONG_OR_FAILING or isinstance(error, _NoLinksError)
            )
            served = unclear and self._has_served()
            if error.errno in _UNUSABLE or (unclear and not served):
                raise SettingsError(
                    f"JOB_OUTPUT_URI: {where}: {error.strerror}; needed: a folder that this user"
                    " may write, on a file system with hard links"
                ) from error
            if error.errno in _FAILING or unclear:
                # A copy that finds no room names the file it reads, which is in the work folder.
                place = where if Path(where).is_relative_to(self._root) else self._root
                full = error.errno in VOLUME_FULL
                way_out = "free space there, or enlarge the volume" if full else "repair it"
                raise StoreError(
                    f"JOB_OUTPUT_URI: {self._root if full else place}: {error.strerror}; {way_out}"
                ) from error
            raise

    def _has_served(self) -> bool:
        return any((self._root / name).exists() for name in _SERVED)

    def _is_ours(self, path: Path) -> bool:
        """Whether the path is the store's; that a file to be uploaded is missing is our bug."""
        return path.is_relative_to(self._root) or self._root.is_relative_to(path)


class _NoLinksError(OSError):
    """`link` failed by EIO, as FUSE and SMB mounts say that they have no hard links."""


class _AbsentError(FileNotFoundError):
    """No object was uploaded under the key; a caller may expect that."""


def open_local_store(root: Path, setting: str = "JOB_OUTPUT_URI") -> LocalStore:
    """The store in `root`, which may not exist yet; touches nothing. Errors name `setting`.

    Raises `SettingsError` where no folder can be: else a file would read as an empty sweep.
    """
    there = next(path for path in (root, *root.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        what = "a link to nothing" if there.is_symlink() and not there.exists() else "not a folder"
        where = root if there == root else f"{root}: {there}"
        raise SettingsError(f"{setting}: {where} is {what}; give a folder, which may be a new one")
    return LocalStore(root)


def _versioned(path: Path, version: int) -> Path:
    return path if version == 1 else path.with_name(f"{path.name}.v{version}")


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise DamagedError(f"{path}: damaged, not a file")


def _sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
