"""A thin Google Cloud Storage server that enforces generations.

Fidelity. As the service documents: `ifGenerationMatch` on uploads (0: only if absent) under one
lock, so linearizable; 412 on a failed condition; a new generation for every write; reads, ranges
and metadata of one `generation`, 404 once it is gone; crc32c checked on upload and sent on
download; multipart and resumable uploads (308, `Range`), listing by prefix in pages, deletes; the
words of 404 for a missing bucket and a missing object. Left out: credentials, ACLs, rate limits
(the real service takes about one write a second of one object and answers 429), versioned buckets,
every other condition, XML, batches, gRPC. Objects live in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

PAGE = 100  # objects of a listing


class Blob(NamedTuple):
    data: bytes
    generation: int
    hashes: dict[str, str]


class Bucket:
    """The objects, and what the tests look at."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lock = threading.Lock()
        self.blobs: dict[str, Blob] = {}
        self.sessions: dict[str, tuple[dict[str, str], str, bytearray]] = {}
        self.last_generation = 1_700_000_000_000_000

    def write(self, key: str, data: bytes, condition: str | None) -> Blob | None:
        """Write an object; return it, or None if the condition fails."""
        hashes = {"crc32c": crc32c(data), "md5Hash": _md5(data)}
        with self.lock:
            standing = self.blobs[key].generation if key in self.blobs else 0
            if condition is not None and int(condition) != standing:
                return None
            self.last_generation += 1
            self.blobs[key] = Blob(data, self.last_generation, hashes)
            return self.blobs[key]


def crc32c(data: bytes) -> str:
    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: 40 ms apart with it
    bucket: Bucket

    def do_GET(self) -> None:
        if asked := re.fullmatch(r"/storage/v1/b/([^/]+)", urlsplit(self.path).path):
            if asked[1] == self.bucket.name:
                self._json(200, {"kind": "storage#bucket", "name": self.bucket.name})
            else:
                self._error(404, "The specified bucket does not exist.")
            return
        key, query = self._parse()
        if key is None:
            return
        if not key:
            self._list(query)
            return
        blob = self.bucket.blobs.get(key)
        if blob is None or query.get("generation", str(blob.generation)) != str(blob.generation):
            self._error(404, f"No such object: {self.bucket.name}/{key}")
        elif query.get("alt") == "media":
            self._media(blob)
        else:
            self._json(200, self._resource(key, blob))

    def do_POST(self) -> None:
        key, query = self._parse()
        if key is None:
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if query["uploadType"] == "resumable":
            session = uuid.uuid4().hex
            name = query.get("name") or json.loads(body)["name"]
            self.bucket.sessions[session] = (query, name, bytearray())
            location = f"http://{self.headers['Host']}{self.path}&upload_id={session}"
            self._json(200, {}, {"Location": location})
            return
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
        assert boundary
        _, head, media, _ = body.split(b"--" + boundary[1].encode())
        metadata = json.loads(head.split(b"\r\n\r\n", 1)[1])
        self._store(metadata, media.split(b"\r\n\r\n", 1)[1][:-2], query)

    def do_PUT(self) -> None:
        query = {k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        first_query, name, received = self.bucket.sessions[query["upload_id"]]
        span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers["Content-Range"])
        assert span
        if span[1] is not None:
            del received[int(span[1]) :]
            received += body
        if span[2] != "*" and len(received) == int(span[2]):
            self._store({"name": name}, bytes(received), first_query)
        else:
            headers = {"Range": f"bytes=0-{len(received) - 1}"} if received else {}
            self._json(308, {}, headers)

    def do_DELETE(self) -> None:
        key, _ = self._parse()
        if key is None:
            return
        if self.bucket.blobs.pop(key, None) is None:
            self._error(404, f"No such object: {self.bucket.name}/{key}")
        else:
            self._json(204, None)

    def _parse(self) -> tuple[str | None, dict[str, str]]:
        """The object's key ("" for the bucket's listing or an upload) and the query."""
        url = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(url.query).items()}
        place = re.fullmatch(r"(?:/upload|/download)?/storage/v1/b/([^/]+)/o/?(.*)", url.path)
        assert place, self.path
        if unquote(place[1]) != self.bucket.name:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._error(404, "The specified bucket does not exist.")
            return None, query
        return unquote(place[2]), query

    def _store(self, metadata: dict[str, Any], data: bytes, query: dict[str, str]) -> None:
        if metadata.get("crc32c", crc32c(data)) != crc32c(data):
            self._error(400, "Provided CRC32C does not match the one calculated")
            return
        blob = self.bucket.write(metadata["name"], data, query.get("ifGenerationMatch"))
        if blob is None:
            self._error(412, "At least one of the pre-conditions you specified did not hold.")
        else:
            self._json(200, self._resource(metadata["name"], blob))

    def _list(self, query: dict[str, str]) -> None:
        keys = sorted(k for k in self.bucket.blobs if k.startswith(query.get("prefix", "")))
        keys = [key for key in keys if key > query.get("pageToken", "")]
        items = [self._resource(key, self.bucket.blobs[key]) for key in keys[:PAGE]]
        token = {"nextPageToken": keys[PAGE - 1]} if len(keys) > PAGE else {}
        self._json(200, {"kind": "storage#objects", "items": items, **token})

    def _resource(self, key: str, blob: Blob) -> dict[str, str]:
        where = {"kind": "storage#object", "bucket": self.bucket.name, "name": key}
        size = {"size": str(len(blob.data)), "generation": str(blob.generation)}
        return {**where, **size, **blob.hashes}

    def _media(self, blob: Blob) -> None:
        data, status, headers = blob.data, 200, {}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            last = min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {wanted[1]}-{last}/{len(data)}"
            data, status = data[int(wanted[1]) : last + 1], 206
        hashes = blob.hashes
        headers["X-Goog-Hash"] = f"crc32c={hashes['crc32c']},md5={hashes['md5Hash']}"
        headers["X-Goog-Generation"] = str(blob.generation)
        self._answer(status, data, headers)

    def _error(self, status: int, message: str) -> None:
        self._json(status, {"error": {"code": status, "message": message}})

    def _json(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = b"" if content is None else json.dumps(content).encode()
        self._answer(status, body, {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # twelve clients connect at once
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that hung up is no news
            super().handle_error(request, client_address)


@contextmanager
def gcs_server(name: str) -> Iterator[tuple[str, Bucket]]:
    """The endpoint of a server with one bucket, and the bucket."""
    bucket = Bucket(name)
    handler = type("Handler", (_Handler,), {"bucket": bucket})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", bucket
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
