"""Compressed files, and UTF-16, as streams: found by their content, bounded against bombs.

pyarrow unpacks: it reads concatenated gzip members and zstd frames, checks their checksums, says
when a stream is cut off (the zstandard package ends without a word) and refuses zstd windows over
128 MB.
"""

from __future__ import annotations

import codecs
import io
import os
from typing import Any

import pyarrow as pa

from job.data.rows import unusable

# Rows of text shrink by 3 to 20; a bomb by 1000 (gzip) or 10,000 and more (zstd).
RATIO_LIMIT = 100
ALWAYS_ALLOWED_BYTES = 2**26  # so that a small file may be as repetitive as it likes
_BLOCK_BYTES = 2**18
_UNPACKED = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"))
_OTHERS = ((b"PK\x03\x04", "zip"), (b"BZh", "bzip2"), (b"\xfd7zXZ\x00", "xz"))
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # of a frame that carries no data; parallel zstd begins with one


def unpacked(file: io.BufferedReader[Any], where: str) -> io.BufferedReader[Any]:
    """`file` from its beginning, unpacked where its content is gzip or zstd.

    Raises `DataError` for another compression or two of them, and, also while the stream is read,
    for damage and for more than 100 times the file's size.
    """
    compression = _compression(head(file), where)
    if compression is None:
        return file
    stream = io.BufferedReader(_UnpackedStream(file, compression, where), _BLOCK_BYTES)
    if _compression(head(stream), where) is not None:
        raise unusable(where, "is compressed twice", "unpack it once")
    if head(stream).startswith(b"PAR1"):
        what = f"is Parquet inside {compression}"
        raise unusable(where, what, "unpack it; Parquet is compressed in itself")
    return stream


def head(stream: io.BufferedReader[Any]) -> bytes:
    """The first bytes, which stay in the stream."""
    return stream.peek(4096)[:4096]


def as_utf8(stream: io.BufferedReader[Any], where: str) -> io.BufferedReader[Any]:
    """`stream` itself, or its text as UTF-8 where it begins with the mark of UTF-16.

    Raises `DataError`, also while it is read, where it is no UTF-16 after that mark.
    """
    if not head(stream).startswith((b"\xff\xfe", b"\xfe\xff")):
        return stream
    return io.BufferedReader(_Utf16Stream(stream, where), _BLOCK_BYTES)


class _Utf16Stream(io.RawIOBase):
    """A UTF-16 text's UTF-8 bytes, for `io.BufferedReader`."""

    def __init__(self, stream: io.BufferedReader[Any], where: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-16")()
        self._where = where
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            data = self._stream.read(_BLOCK_BYTES)
            try:
                self._ready = self._decoder.decode(data, final=not data).encode()
            except UnicodeError as error:
                what = "begins as UTF-16 text and is none"
                raise unusable(self._where, what, "save it as UTF-8") from error
            if not data:
                break
        part, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


def expansion_limit(size_bytes: int) -> int:
    """What a file of `size_bytes` may unpack to, in bytes."""
    return max(ALWAYS_ALLOWED_BYTES, RATIO_LIMIT * size_bytes)


def _compression(start: bytes, where: str) -> str | None:
    for magic, kind in _OTHERS:
        if start.startswith(magic):
            raise unusable(where, f"is compressed ({kind})", "unpack it, or use gzip or zstd")
    if start[1:4] == _ZSTD_SKIPPABLE and start[0] & 0xF0 == 0x50:
        return "zstd"
    return next((kind for magic, kind in _UNPACKED if start.startswith(magic)), None)


class _UnpackedStream(io.RawIOBase):
    """The content of a compressed file, for `io.BufferedReader`."""

    def __init__(self, packed: io.BufferedReader[Any], compression: str, where: str) -> None:
        self._stream = pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), compression)
        self._compression = compression
        self._where = where
        self._limit = expansion_limit(os.fstat(packed.fileno()).st_size)
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            data = self._stream.read(len(buffer))
        except (OSError, pa.ArrowException) as error:
            what = f"is damaged or cut off ({self._compression})"
            raise unusable(self._where, what, "write it again") from error
        self._num_bytes += len(data)
        if self._num_bytes > self._limit:
            what = f"unpacks to over {RATIO_LIMIT} times its size ({self._limit:,} bytes)"
            raise unusable(self._where, what, "unpack it yourself if these are rows")
        buffer[: len(data)] = data
        return len(data)
