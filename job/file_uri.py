"""`file://` URIs as paths (RFC 8089): percent-decoded, and of this machine only."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from urllib.parse import unquote

_PREFIX = "file://"


def path_of(uri: str) -> Path | None:
    """The path that a `file://` URI names; None for anything else, such as a plain path.

    Raises `ValueError`, in words for a person, for a URI of another machine or of nothing.
    """
    if uri[: len(_PREFIX)].lower() != _PREFIX:
        return None
    host, slash, rest = uri[len(_PREFIX) :].partition("/")
    if host.lower() not in ("", "localhost"):
        raise ValueError(
            f"names the machine {host!r}, and only files of this one can be opened;"
            " give file:///folder (three slashes) or a path"
        )
    path = unquote(slash + rest)
    if not path.strip("/"):
        raise ValueError("names nothing after file://; give file:///folder or a path")
    if "\0" in path:
        raise ValueError("holds %00, which no path can")
    return Path(path)


def absolute(uri: str) -> str:
    """The same place in one spelling: a folder of this machine by its absolute path, without links.

    URIs of buckets stay as they are, and so does what names nothing.
    """
    with contextlib.suppress(ValueError):
        path = path_of(uri)
        if path is not None or "://" not in uri:
            return os.path.realpath(path or uri)
    return uri
