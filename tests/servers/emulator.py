"""gcp-storage-emulator: other people's reading of GCS. It ignores every condition."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers.processes import free_port, running
from tests.servers.s3 import BUCKET


@contextmanager
def gcs_emulator(folder: Path) -> Iterator[str]:
    """The endpoint of an emulator with an empty bucket `BUCKET`, in memory."""
    port = free_port()
    start = ("start", "--host", "127.0.0.1", "--port", str(port), "--in-memory")
    arguments = (*start, "--default-bucket", BUCKET)
    log_path = folder / "emulator.log"
    with running("gcp_storage_emulator", *arguments, port=port, log_path=log_path):
        endpoint = f"http://127.0.0.1:{port}"
        urllib.request.urlopen(f"{endpoint}/storage/v1/b/{BUCKET}", timeout=5).close()  # noqa: S310
        yield endpoint
