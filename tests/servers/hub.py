"""A small Hugging Face hub: repositories at one commit, refusals and failures as told.

Its one branch is main; it takes any full commit for its own. What is pushed is kept.

Fidelity. As the real hub answers its client (huggingface_hub 2): information about a repository,
its tree, files by HEAD and GET with `ETag` and `X-Repo-Commit`; refusals by status with
`X-Error-Code` and `X-Error-Message` (`hf_raise_for_status` in the client's utils/_http.py reads
them); rate limits with `Retry-After` or `RateLimit`
(https://huggingface.co/docs/hub/rate-limits). For writers: repositories are made (409 where one
is), cards checked for YAML, files asked about first (with the git oid of what is there) and sent in
the commit or, if they are `*.safetensors`, by Git LFS; commits are kept. Left out: redirects to a
CDN, Xet (set HF_HUB_DISABLE_XET), ranges, uploads in parts; any token but `may-not-write` may.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
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
    private: dict[str, bool] = field(default_factory=dict)  # by `models/owner/name`
    commits: list[str] = field(default_factory=list)  # their titles
    blobs: dict[str, bytes] = field(default_factory=dict)  # LFS objects, by sha256
    endpoint: str = ""

    def asked_about(self, part: str) -> list[str]:
        """The paths with this part that were asked for, without what strangers on this port ask."""
        return [path for path in self.asked if part in path]


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

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.asked.append(path)
        refusal = next((r for n, r in self.hub.refusals.items() if f"/{n}/" in path), None)
        if refusal is not None and refusal.times > 0:
            refusal.times -= 1
            self._answer(refusal.status, refusal.body, refusal.headers)
        elif self.headers.get("Authorization", "").endswith("may-not-write"):
            self._answer(
                403, b'{"error": "no write access"}', {"X-Error-Message": "no write access"}
            )
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            self._lfs(json.loads(body)["objects"])
        else:
            _, _, owner, repository, action, *_ = path.strip("/").split("/")
            files = self.hub.repositories[f"models/{owner}/{repository}"]
            if action == "preupload":
                self._json({"files": [_mode(f["path"], files) for f in json.loads(body)["files"]]})
            else:
                self._commit(files, [json.loads(line) for line in body.splitlines()])

    def do_PUT(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.blobs[hashlib.sha256(data).hexdigest()] = data
        self._json({})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        known = f"models/{name}" in self.hub.repositories
        if not known:
            self.hub.repositories[f"models/{name}"] = {}
            self.hub.private[f"models/{name}"] = asked["visibility"] == "private"
        body = {
            "url": f"{self.hub.endpoint}/{name}",
            "error": "You already created this model repo",
        }
        self._answer(409 if known else 200, json.dumps(body).encode(), {})

    def _lfs(self, objects: list[dict[str, Any]]) -> None:
        answers = []
        for wanted in objects:
            href = {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}
            has = wanted["oid"] in self.hub.blobs
            answers.append({**wanted, **({} if has else {"actions": {"upload": href}})})
        self._json({"transfer": "basic", "objects": answers})

    def _commit(self, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile", line
                files[value["path"]] = self.hub.blobs[value["oid"]]
        self._json({
            "commitUrl": f"{self.hub.endpoint}/owner/name/commit/{COMMIT}", "commitOid": COMMIT,
            "success": True,
        })  # fmt: skip

    def _json(self, content: object) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

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


def _mode(path: str, files: dict[str, bytes]) -> dict[str, Any]:
    """How a file is to be sent, and the git oid of the one that is there."""
    is_lfs, data = path.endswith(".safetensors"), files.get(path)
    oid = None
    if data is not None:
        sha256 = hashlib.sha256(data).hexdigest()
        header = b"blob %d\0" % len(data)
        oid = sha256 if is_lfs else hashlib.sha1(header + data, usedforsecurity=False).hexdigest()
    mode = "lfs" if is_lfs else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}


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
