"""A server that sends a byte now and then holds nobody. `pytest tests/store/test_pace.py`"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import ipaddress
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from job.errors import StoreError
from job.store import open_store
from job.store.base import Store, file_sha256
from job.store.pace import MinimumPace, PacedSocket, SlowTransferError, slowness
from job.store.transport import PacedAdapter
from tests.servers import s3
from tests.servers.behind_proxy import LARGE_BYTES, RETRYING_LIMITS, SHORT_LIMITS
from tests.servers.proxy import Fault, FaultProxy

# A dripped answer never falls silent for read_seconds, on however busy a machine: only the pace can
# end it. 1 MB in half a second is far over what the proxy drips, and far under what it passes on.
PACED = dataclasses.replace(
    RETRYING_LIMITS,
    read_seconds=5,
    pace=MinimumPace(num_bytes=2**20, seconds=0.5),
    sdk_seconds=0.4,
    pause_seconds=0.01,
)
ENDING = dataclasses.replace(PACED, outage_seconds=1)


def _transfers(store: Store, folder: Path) -> dict[str, Callable[[], object]]:
    return {
        "read": lambda: store.get("doc.json"),
        "write": lambda: store.put_if_absent(f"new-{time.monotonic_ns()}", b"1"),
        "upload": lambda: store.upload("large", folder / "large"),
        "download": lambda: store.download("large", folder / "back"),
        "list": lambda: list(store.list("")),
        "delete": lambda: store.delete("gone"),
    }


DRIPS = [  # operation, fault, how often
    ("read", "drip answer", 1),
    ("read", "drip body", 1),
    ("write", "drip answer", 1),
    ("upload", "drip request", 1),
    ("upload", "drip answer", 1),
    ("download", "drip answer", 1),
    ("download", "drip body", 2),  # the first answer is not read (S3), or is metadata (GCS)
    ("list", "drip body", 1),
    ("delete", "drip answer", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize("drip", DRIPS, ids=lambda drip: f"{drip[0]}, {drip[1]}")
def test_a_dripping_server_is_left_and_asked_again(
    drip: tuple[str, str, int],
    proxied: tuple[Store, FaultProxy],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store, proxy = proxied
    operation, kind, times = drip
    # Azure's blocks have random names: all of them are large.
    (tmp_path / "large").write_bytes(os.urandom(2**24 if "az" in store.uri[:2] else LARGE_BYTES))
    store.put_if_absent("doc.json", b"x" * 4000)
    if operation == "download":
        store.upload("large", tmp_path / "large")
    threads = set(threading.enumerate())
    store = open_store(store.uri, limits=PACED)
    # Of the upload's requests the one with a body of 8 MB.
    body = {"s3": "partNumber=1", "gs": "PUT ", "az": "comp=block&"}[store.uri[:2]]
    proxy.faults = [Fault(kind, times=times, match=body if kind == "drip request" else "")]
    started = time.monotonic()
    _transfers(store, tmp_path)[operation]()
    assert proxy.injected == [kind] * times
    assert "the service is too slow" in caplog.text, "it was no read timeout"
    assert time.monotonic() - started < 8
    if operation == "download":
        assert file_sha256(tmp_path / "back") == file_sha256(tmp_path / "large")
    left = {thread.name for thread in set(threading.enumerate()) - threads}
    assert not {name for name in left if "ThreadPoolExecutor" in name}, "s3transfer's still run"


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["read", "write", "upload", "download"])
def test_a_server_that_drips_for_ever_is_an_outage(
    operation: str, proxied: tuple[Store, FaultProxy], tmp_path: Path
) -> None:
    store, proxy = proxied
    (tmp_path / "large").write_bytes(os.urandom(LARGE_BYTES))
    if operation == "download":
        store.upload("large", tmp_path / "large")
    store = open_store(store.uri, limits=ENDING)
    proxy.faults = [Fault("drip answer")]
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"still failing.*too slow \(\d+ bytes moved in"):
        _transfers(store, tmp_path)[operation]()
    assert time.monotonic() - started < 8
    assert not (tmp_path / "back").exists()


@pytest.mark.slow
def test_many_small_requests_in_one_connection_are_no_drip(
    proxied: tuple[Store, FaultProxy],
) -> None:
    store, proxy = proxied
    # Each waits 0.2 s in the proxy; a pace over all of them would end the third.
    store = open_store(store.uri, limits=PACED)
    proxy.faults = [Fault("slow")]
    for _ in range(4):
        assert store.get("absent.json") is None
    assert proxy.num_requests == 4


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_only_waiting_counts_and_each_window_anew() -> None:
    clock = Clock()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        paced = PacedSocket(ours, MinimumPace(num_bytes=100, seconds=10), clock=clock)
        clock.now += 1000  # what the caller does between two calls is not the server's
        paced.sendall(b"x" * 50)
        assert theirs.recv(100) == b"x" * 50
        paced.moved(49, clock() - 9)
        paced.moved(1, clock() - 1)  # 100 bytes in 10 s: a new window
        paced.moved(99, clock() - 9)
        with pytest.raises(SlowTransferError, match="99 bytes moved in 10 s, needed: 100"):
            paced.moved(0, clock() - 1)


def test_an_sdks_own_error_still_tells_the_slowness() -> None:
    error = RuntimeError("SDK")
    assert slowness(error) == ""
    error.__context__ = SlowTransferError("3 bytes")  # as botocore raises it
    assert slowness(error) == "3 bytes"


def test_an_encrypted_connection_keeps_the_pace_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = _certificate(tmp_path / "server.pem")
    with _dripping_server(certificate) as address:
        s3.use(monkeypatch, f"https://{address}")
        with pytest.raises(StoreError, match="no whole answer .SSLError."):
            open_store("s3://trials", limits=SHORT_LIMITS).get("doc.json")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        with pytest.raises(StoreError, match=r"too slow \(\d+ bytes moved in"):
            open_store("s3://trials", limits=ENDING).get("doc.json")


def test_a_connection_through_a_proxy_keeps_the_pace_too() -> None:
    adapter = PacedAdapter(PACED.pace, num_connections=1)
    request = requests.Request("GET", "http://storage.example/").prepare()
    with _dripping_server() as address, pytest.raises(SlowTransferError):
        adapter.send(request, timeout=5, proxies={"http": f"http://{address}"})
    adapter.close()


@contextlib.contextmanager
def _dripping_server(certificate: Path | None = None) -> Iterator[str]:
    """The address of a server that answers every request by a byte now and then, for ever."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if certificate:
        context.load_cert_chain(certificate)
    ended = threading.Event()

    def drip(peer: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),
            context.wrap_socket(peer, server_side=True) if certificate else peer as client,
        ):
            client.recv(65536)
            while not ended.wait(0.02):
                client.sendall(b"H")

    def accept(listener: socket.socket) -> None:
        with ThreadPoolExecutor() as threads, contextlib.suppress(OSError):
            while True:
                threads.submit(drip, listener.accept()[0])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=accept, args=(listener,))
        server.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        server.join(timeout=10)


def _certificate(path: Path) -> Path:
    """A key and a certificate for 127.0.0.1, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(key.private_bytes(pem, *private) + certificate.public_bytes(pem))
    return path
