"""Whether W&B answers at all, asked before its client is, which would try for half a minute."""

from __future__ import annotations

import http.client
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from urllib.parse import urlsplit

from job.errors import OutageError
from job.wandb_client import call

ANSWER_SECONDS = 8.0  # that any answer may take, the look-up of the server's name included


def check_reachable(check: Callable[[], None] = lambda: None) -> None:
    """Return if W&B's server answers, whatever it says. Raises `OutageError`: what was tried."""
    url = call("starting its client", _server, check=check)
    try:
        silence = call("knocking", lambda: silence_of(url), check=check, seconds=ANSWER_SECONDS)
    except OutageError:
        silence = f"not within {ANSWER_SECONDS:.0f} s"
    if silence is not None:
        raise OutageError(f"W&B: {url} does not answer ({silence})")


def _server() -> str:
    import wandb

    return str(wandb.setup().settings.base_url)  # of the environment, or of W&B's own files


def silence_of(url: str) -> str | None:
    """Why the server gives no answer; None if it gives any."""
    proxy = urllib.request.getproxies().get(urlsplit(url).scheme, "")
    if urlsplit(proxy).scheme not in ("", "http", "https"):  # SOCKS: the client's business
        return None
    opener = urllib.request.OpenerDirector()  # without those who follow redirections or raise
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(url, method="HEAD")  # noqa: S310
    try:
        opener.open(request, timeout=ANSWER_SECONDS)
    except urllib.error.URLError as error:
        reason = error.reason
        if isinstance(reason, ssl.SSLError):  # the client may know other certificates
            return None
        return (reason.strerror if isinstance(reason, OSError) else None) or str(reason)
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    return None
