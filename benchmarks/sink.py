"""Our upload of 500 MB against `aws s3 cp`, to a server that keeps nothing: the clients' own time.

`python -m benchmarks.sink --aws PATH`. With moto's server (benchmarks/store.py) both sides wait for
the server most of the time. Prints a table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from benchmarks.store import LARGE_BYTES, aws_command, children_seconds, our_command, use

LIMIT_SECONDS = 120


class _Sink(BaseHTTPRequestHandler):
    """S3's multipart upload: every part is read and forgotten, every answer says yes."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self._read()
        kind = "Complete" if "uploadId" in self.path else "Initiate"
        ids = "<Bucket>b</Bucket><Key>k</Key><UploadId>u</UploadId><ETag>e</ETag>"
        name = f"{kind}MultipartUploadResult"
        self._answer(f"<{name}>{ids}</{name}>".encode())

    def do_PUT(self) -> None:
        self._read()
        self._answer(b"")

    def _read(self) -> None:
        left, piece = int(self.headers.get("Content-Length") or 0), bytearray(2**20)
        while left:
            num_bytes = self.rfile.readinto(memoryview(piece)[: min(left, len(piece))])
            if not num_bytes:
                raise ConnectionError("the client went away")
            left -= num_bytes

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("ETag", '"e"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--aws", default="aws", help="the AWS CLI's executable")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        ThreadingHTTPServer(("127.0.0.1", arguments.serve), _Sink).serve_forever()
    from tests.servers.processes import free_port, running

    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        log_path, folder = Path(name) / "log", Path(name) / "files"
        folder.mkdir()
        (folder / "object.bin").write_bytes(os.urandom(LARGE_BYTES))
        with running("benchmarks.sink", "--serve", str(port), port=port, log_path=log_path):
            use(f"http://127.0.0.1:{port}")
            _measure(folder, arguments.aws, arguments.rounds)


def _measure(folder: Path, aws: str, rounds: int) -> None:
    sides = [("ours", our_command), ("aws s3 cp", aws_command(aws))]
    walls: dict[str, list[float]] = {side: [] for side, _ in sides}
    cpus: dict[str, list[float]] = {side: [] for side, _ in sides}
    for _ in range(rounds):
        sides.reverse()
        for side, command in sides:
            started, cpu_started = time.monotonic(), children_seconds()
            uri = "s3://trials/sink"
            subprocess.run(command("up", uri, folder), check=True, timeout=LIMIT_SECONDS)
            walls[side].append(time.monotonic() - started)
            cpus[side].append(children_seconds() - cpu_started)
    ours, theirs = (statistics.median(walls[side]) for side in ("ours", "aws s3 cp"))
    print(f"{time.strftime('%Y-%m-%d', time.gmtime())}, {os.cpu_count()} cores, {rounds} rounds,")
    print(f"load average {os.getloadavg()[0]:.1f}, Python {sys.version.split()[0]}\n")
    print("| 500 MB up, to nowhere | median s | least | most | CPU s |\n|---|---|---|---|---|")
    for side, seconds in walls.items():
        cpu = statistics.median(cpus[side])
        middle = statistics.median(seconds)
        print(f"| {side} | {middle:.2f} | {min(seconds):.2f} | {max(seconds):.2f} | {cpu:.2f} |")
    print(f"\nratio of the medians, theirs ÷ ours: {theirs / ours:.2f}")


if __name__ == "__main__":
    main()
