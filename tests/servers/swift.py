"""A whole OpenStack Swift with its s3api in one process: `python -m tests.servers.swift PORT DIR`.

Objects live in memory, accounts and containers in SQLite files under DIR. S3 signatures and
checksums are checked as on a real cluster. What it lacks: If-Match on writes (501).
"""

from __future__ import annotations

import sys
from array import array
from pathlib import Path

import eventlet
import eventlet.patcher
import eventlet.wsgi

_SWIFT_CONF = "[swift-hash]\nswift_hash_path_suffix = tests\n"
_USERS = {"user_test_tester": "testing .admin"}  # access key test:tester, secret testing


def main(port: int, folder: Path) -> None:
    """Serve until killed."""
    eventlet.patcher.monkey_patch(thread=False)
    from swift.common import utils

    conf_path = folder / "swift.conf"
    conf_path.write_text(_SWIFT_CONF)
    utils.SWIFT_CONF_FILE = str(conf_path)  # read when the next ones are imported
    from swift.account.server import AccountController
    from swift.container.server import ContainerController
    from swift.obj.mem_server import ObjectController

    conf = {
        "devices": str(folder),
        "swift_dir": str(folder),
        "mount_check": "false",
        "disable_fallocate": "true",
    }
    (folder / "sda1").mkdir()
    for name, application in {
        "account": AccountController,
        "container": ContainerController,
        "object": ObjectController,
    }.items():
        listener = eventlet.listen(("127.0.0.1", 0))
        _write_ring(folder / f"{name}.ring.gz", listener.getsockname()[1])
        eventlet.spawn(_serve, listener, application(conf))
    application = _proxy(conf)
    _serve(eventlet.listen(("127.0.0.1", port)), application)


def _proxy(conf: dict[str, str]) -> object:
    """The proxy server behind the middlewares that S3 needs, innermost first."""
    from swift.common.middleware import catch_errors, gatekeeper, listing_formats, slo, tempauth
    from swift.common.middleware.s3api import s3api
    from swift.proxy.server import Application

    application = Application(
        {**conf, "allow_account_management": "true", "account_autocreate": "true"}
    )
    for middleware, options in (
        (slo, {}),
        (tempauth, _USERS),
        (s3api, {"location": "us-east-1", "auth_pipeline_check": "false"}),
        (listing_formats, {}),
        (gatekeeper, {}),
        (catch_errors, {}),
    ):
        application = middleware.filter_factory(conf, **options)(application)
    return application


def _write_ring(path: Path, port: int) -> None:
    from swift.common.ring import RingData

    device = {
        "id": 0, "region": 1, "zone": 1, "weight": 1.0, "device": "sda1", "ip": "127.0.0.1",
        "port": port, "replication_ip": "127.0.0.1", "replication_port": port,
    }  # fmt: skip
    RingData([array("H", [0, 0])], [device], 31).save(str(path))


def _serve(listener: object, application: object) -> None:
    from swift.common.http_protocol import SwiftHttpProtocol

    eventlet.wsgi.server(listener, application, protocol=SwiftHttpProtocol, log_output=False)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
