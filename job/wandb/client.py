"""The W&B client: imported only where there is a key, kept quiet, its failures told as ours.

Every call goes through `call`, in a side thread: the client may wait for minutes on a server that
does not answer, and a SIGTERM must be heard meanwhile.
"""

from __future__ import annotations

import atexit
import http.client
import os
import re
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from job.errors import (
    CredentialsError,
    JobError,
    OutageError,
    SettingsError,
    causes,
    work_dir_error,
)
from job.log import log
from job.settings import Settings

DEFAULT_PROJECT = "qlora-sweep"
POLL_SECONDS = 0.1
REQUEST_SECONDS = 20.0  # a question to W&B may take so long, the client's own retries included

T = TypeVar("T")

# Settings that keep the client from telling W&B what nobody asked for. `prepare` sets them, since
# `wandb.agent` reads its settings from the environment only.
QUIET = {
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_ERROR_REPORTING": "false",  # to Sentry
    "WANDB_PROGRAM": "job",  # else the path of the script
}
# Defaults in seconds: how long opening a run and its last upload may take (without the second the
# client waits for ever), and the time between two uploads (15 otherwise, which a kill would lose).
LIMITS = {
    "WANDB_INIT_TIMEOUT": "30",
    "WANDB_FINISH_TIMEOUT": "30",
    "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "5",
}
# Variables that would make every run of this process the same one; `place_of` says which it is.
OTHER_RUNS = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RUN_GROUP", "WANDB_NAME")


def is_wanted(settings: Settings) -> bool:
    """Whether W&B may be called: there is a key, and `WANDB_MODE` is not offline or disabled."""
    return settings.wandb_api_key is not None and settings.wandb_mode == "online"


def check_wanted(settings: Settings) -> None:
    """Raise `SettingsError` unless there is what a W&B sweep or a report to W&B needs."""
    if settings.wandb_api_key is None:
        raise SettingsError("WANDB_API_KEY: not set; needed to talk to W&B: wandb.ai/authorize")
    if settings.wandb_mode != "online":
        raise SettingsError(
            f"WANDB_MODE: is {settings.wandb_mode}, but this cannot be done without W&B: unset it"
        )


def prepare(settings: Settings) -> None:
    """Let the client write below `JOB_WORK_DIR` only, and send nothing but what it is given.

    Raises `SettingsError` or `OutageError` for a work folder that cannot be written.
    """
    folder = settings.work_dir / "wandb"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise work_dir_error(folder, error) from error
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        os.environ[name] = str(folder)
    os.environ.update(QUIET)
    for name, value in LIMITS.items():
        os.environ.setdefault(name, value)
    for name in OTHER_RUNS:
        os.environ.pop(name, None)


def finish_seconds() -> float:
    """How long a run's last upload may take."""
    return float(os.environ.get("WANDB_FINISH_TIMEOUT") or LIMITS["WANDB_FINISH_TIMEOUT"])


def run_settings(
    on_stop: Callable[[], None] | None = None, *, upload_seconds: float | None = None
) -> Any:
    """`wandb.Settings` of a run: system metrics, metadata, code, git and host stay here.

    `on_stop` is called, in a thread of the client's, when a person or `early_terminate` stops the
    run. It is not called while an agent runs: the agent stops its function instead.
    """
    import wandb

    def stopped() -> None:  # a function: wandb copies its settings deeply, and a lock cannot be
        if on_stop is not None:
            on_stop()

    return wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        finish_timeout=upload_seconds or finish_seconds(),
        host="",
        program="job",
        save_code=False,
        silent=True,
        stop_fn=stopped,  # without one a stop would interrupt the main thread
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )


def api(seconds: float = REQUEST_SECONDS) -> Any:
    """`wandb.Api()`, which looks at once whether the key is good."""
    import wandb

    return wandb.Api(timeout=max(1, round(min(seconds, REQUEST_SECONDS))))


def call(
    doing: str,
    action: Callable[[], T],
    *,
    should_stop: Callable[[], None],
    seconds: float = 3 * REQUEST_SECONDS,
) -> T:
    """Run `action` in a side thread; `should_stop` is asked meanwhile and may raise.

    Raises `OutageError` if it takes longer than `seconds`, and as `as_job_error` says.
    """
    done = threading.Event()
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(action())
        except Exception as error:
            errors.append(error)
        done.set()

    threading.Thread(target=run, daemon=True, name="wandb call").start()
    waited = 0.0
    while not done.wait(POLL_SECONDS):
        should_stop()
        waited += POLL_SECONDS
        if waited >= seconds:
            raise OutageError(f"W&B: no answer in {seconds:.0f} s while {doing}")
    if errors:
        raise as_job_error(doing, errors[0]) from errors[0]
    return results[0]


def retried(attempt: Callable[[], T], *, seconds: float, pause: Callable[[float], None]) -> T:
    """Call `attempt` again and again while W&B is down, for `seconds`; then raise the error."""
    deadline, wait = time.monotonic() + seconds, 1.0
    while True:
        try:
            return attempt()
        except OutageError as error:
            left = deadline - time.monotonic()
            if left <= 0:
                raise
            log.warning("%s; trying again", error)
        pause(min(wait, left))
        wait = min(2 * wait, 30.0)


# The client's and the server's own words, where no status says it; of the former some come as
# usage errors. wandb/sdk/lib/wbauth/validation.py, wandb/apis/public/api.py.
_BAD_KEY = re.compile(
    r"\berror 40[13]\b|\bHTTP 40[13]\b|API key (must|may|cannot|is)\b|invalid (api key|credentials)"
    r"|permission denied|not logged in|No (API key|authentication) configured",
    re.IGNORECASE,
)
# GraphQL's own errors, not the page of a proxy on the way.
_NOT_THERE = re.compile(
    r'\berror (400|404|410|422)\b.*("message":|\b(entity|project|sweep|run)\b.* not found)'
)


def as_job_error(doing: str, error: Exception) -> JobError:
    """Translate the client's error: what it or W&B refuses is no outage, and asked once.

    Gives `CredentialsError`, `SettingsError` or `OutageError`.
    """
    if isinstance(error, JobError):
        return error
    chain = list(causes(error))
    text = brief(error)
    is_local = any(isinstance(link, PermissionError) for link in chain)  # "Permission denied", too
    refused = any(_http_status(link) in (401, 403) for link in chain) or _BAD_KEY.search(text)
    if refused and not is_local:
        return CredentialsError(f"WANDB_API_KEY: W&B refused it while {doing}: {text}")
    if any(map(_is_bad_value, chain)):
        return SettingsError(
            f"W&B's client refuses what it is given while {doing}: {text}; check the WANDB_*"
            " variables and the sweep file"
        )
    if _NOT_THERE.search(text):
        return SettingsError(
            f"W&B refuses it while {doing}: {text}; check WANDB_ENTITY and WANDB_PROJECT"
        )
    return OutageError(f"W&B failed while {doing}: {text}")


def _is_bad_value(error: BaseException) -> bool:
    """Whether the client's own check of a setting failed; pydantic also checks servers' answers."""
    name = type(error).__name__
    return name == "UsageError" or (
        name == "ValidationError" and getattr(error, "title", "") == "Settings"
    )


def brief(error: Exception) -> str:
    """The client's words in one line."""
    return " ".join(str(error).split())[:300]


def is_refusal(error: Exception) -> bool:
    """Whether W&B answered and said no, so that asking again would change nothing."""
    refused = re.search(r"\b(error|HTTP) (400|403|404|409)\b", str(error)) is not None
    return refused or any(400 <= _http_status(link) < 429 for link in causes(error))


def _http_status(error: BaseException) -> int:
    response = getattr(error, "response", None)
    return int(getattr(response, "http_status", 0) or 0)


def leave(exit_code: int) -> None:
    """Have the process end with this code and without wandb's exit hook, if wandb was used.

    The hook would wait for the network, and tell W&B that a run which goes on elsewhere has failed.
    Exit hooks run last one first, so this one ends the process before wandb's.
    """

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)

    if "wandb" in sys.modules:
        atexit.register(end)


ANSWER_SECONDS = 8.0  # that any answer may take, the look-up of the server's name included


def check_reachable(should_stop: Callable[[], None] = lambda: None) -> None:
    """Return if W&B's server answers, whatever it says. Raises `OutageError` with the address."""
    url = call("starting its client", _server, should_stop=should_stop)
    try:
        silence = call(
            "knocking", lambda: silence_of(url), should_stop=should_stop, seconds=ANSWER_SECONDS
        )
    except OutageError:
        silence = f"not within {ANSWER_SECONDS:.0f} s"
    if silence is not None:
        raise OutageError(f"W&B: {url} does not answer ({silence})")


def _server() -> str:
    import wandb

    return str(wandb.setup().settings.base_url)  # from the environment, or from W&B's own files


def silence_of(url: str) -> str | None:
    """Why the server gives no answer; None if it gives any."""
    proxy = urllib.request.getproxies().get(urlsplit(url).scheme, "")
    if urlsplit(proxy).scheme not in ("", "http", "https"):  # a SOCKS proxy is left to the client
        return None
    opener = (
        urllib.request.OpenerDirector()
    )  # without the handlers that follow redirections or raise
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
