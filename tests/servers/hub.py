"""A small Hugging Face hub: repositories at one commit, refusals and failures as told.

Its one branch is main; it takes any full commit for its own.

Fidelity. As the real hub answers its client (huggingface_hub 2): information about a repository,
its tree, files by HEAD and GET with `ETag` and `X-Repo-Commit`; refusals by status with
`X-Error-Code` and `X-Error-Message` (`hf_raise_for_status` in the client's utils/_http.py reads
them); rate limits with `Retry-After` or `RateLimit`
(https://huggingface.co/docs/hub/rate-limits). Left out: redirects to a CDN, Xet, ranges, tokens.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "a" * 40


@dataclass
class Refusal:
    """The answer to the next `times` requests about a repository."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1_000_000
    body: bytes = b"{}"


@dataclass
class Hub:
    """What the server holds, by `models/owner/name` or `datasets/owner/name`."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refusals: dict[str, Refusal] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    endpoint: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        parts = path.removeprefix("/api").strip("/").split("/")
        if parts[0] not in ("models", "datasets"):  # a model's files lie at the top
            parts.insert(0, "models")
        name, rest = "/".join(parts[:3]), parts[3:]
        self.hub.asked.append(path)
        refusal = self.hub.refusals.get(name)
        files = self.hub.repositories.get(name)
        if refusal is not None and refusal.times > 0:
            refusal.times -= 1
            self._answer(refusal.status, refusal.body, refusal.headers)
        elif files is None:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": path, "size": len(data), "oid": "0"}
                for path, data in files.items()
            ]
            self._answer(200, json.dumps(tree).encode(), {})
        elif rest[:1] == ["revision"] and rest[1] != "main" and len(rest[1]) != len(COMMIT):
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif rest[:1] == ["resolve"]:
            self._file(files.get("/".join(rest[2:])))
        else:
            siblings = [_sibling(path, data) for path, data in files.items()]
            info = {"id": "/".join(parts[1:3]), "sha": COMMIT, "siblings": siblings}
            self._answer(200, json.dumps(info).encode(), {})

    do_HEAD = do_GET  # noqa: N815

    def _file(self, data: bytes | None) -> None:
        headers = {"X-Repo-Commit": COMMIT}
        if data is None:
            self._answer(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
            return
        tag = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        self._answer(200, data, {**headers, "ETag": f'"{tag}"'})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def _sibling(path: str, data: bytes) -> dict[str, object]:
    """A file as the hub tells it when asked for metadata: large ones are kept as LFS objects."""
    told: dict[str, object] = {"rfilename": path, "size": len(data)}
    if path.endswith(".safetensors"):
        sha256 = hashlib.sha256(data).hexdigest()
        told["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
    return told


@contextmanager
def hub_server() -> Iterator[Hub]:
    """An empty hub that answers at its `endpoint` until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
