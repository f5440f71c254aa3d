"""The transport adapter of the `requests` library whose connections keep a minimum pace.

All SDKs send through it by public means. Google's and Azure's send by a `requests` session, in
which adapters are mounted. botocore documents the event `before-send`: an answer that its handler
returns is taken as the service's, and `Sender` is such a handler.
"""

from __future__ import annotations

import os
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool

from job.store.pace import MinimumPace, keep_pace
from job.store.retries import Limits

_BLOCK_BYTES = 2**17  # of a file that is sent; botocore's number, measured on objects over 100 MB


class PacedAdapter(HTTPAdapter):  # type: ignore[misc]
    """Sends requests over connections that keep the pace, through an HTTP proxy as well.

    `http` and `https` are the classes of urllib3's pools to begin with.
    """

    def __init__(
        self,
        pace: MinimumPace,
        *,
        num_connections: int,
        http: Any = HTTPConnectionPool,
        https: Any = HTTPSConnectionPool,
    ) -> None:
        self._pools = {"http": keep_pace(http, pace), "https": keep_pace(https, pace)}
        super().__init__(pool_maxsize=num_connections)

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        """Make the connections; `HTTPAdapter` calls this."""
        super().init_poolmanager(*arguments, blocksize=_BLOCK_BYTES, **options)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        """Make the connections through a proxy; those of a SOCKS proxy keep no pace."""
        manager = super().proxy_manager_for(proxy, blocksize=_BLOCK_BYTES, **options)
        if not proxy.lower().startswith("socks"):
            manager.pool_classes_by_scheme = self._pools
        return manager


def mount(session: requests.Session, limits: Limits, *, num_connections: int) -> None:
    """Let all connections of a session keep the pace."""
    for scheme in ("http://", "https://"):
        session.mount(scheme, PacedAdapter(limits.pace, num_connections=num_connections))


class Sender:
    """A handler of botocore's event `before-send`: it sends the request and returns the answer.

    `ca_bundle` is a file or folder of certificates; without it those of the package certifi count.
    Proxies are taken from the environment, as botocore does.
    """

    def __init__(self, limits: Limits, *, num_connections: int, ca_bundle: str | None) -> None:
        from botocore.awsrequest import AWSHTTPConnectionPool, AWSHTTPSConnectionPool

        self._timeout = (limits.connect_seconds, limits.read_seconds)
        self._verify = ca_bundle or os.environ.get("REQUESTS_CA_BUNDLE") or True
        self._adapter = PacedAdapter(
            limits.pace,
            num_connections=num_connections,
            http=AWSHTTPConnectionPool,  # these wait for "100 Continue" before they send a body
            https=AWSHTTPSConnectionPool,
        )

    def __call__(self, request: Any, **_: object) -> Any:
        """The answer to an `AWSPreparedRequest`, as an `AWSResponse`.

        Raises `HTTPClientError`, which botocore tries again, for whatever went wrong on the way.
        """
        from botocore.awsrequest import AWSResponse
        from botocore.exceptions import HTTPClientError

        try:
            raw = self._send(request).raw
            answer = AWSResponse(request.url, raw.status, raw.headers, raw)
            if not request.stream_output:
                answer.content  # noqa: B018  # read here, where an error means another try
        except Exception as error:
            raise HTTPClientError(error=error) from error
        return answer

    def _send(self, request: Any) -> requests.Response:
        from botocore.utils import get_environ_proxies

        prepared = requests.PreparedRequest()  # taken over as it is: a signature covers it
        prepared.method, prepared.url = request.method, request.url
        prepared.headers, prepared.body = request.headers, request.body
        proxies = get_environ_proxies(request.url)
        proxies.pop("all", None)  # of no meaning to botocore
        return self._adapter.send(
            prepared, stream=True, timeout=self._timeout, verify=self._verify, proxies=proxies
        )
