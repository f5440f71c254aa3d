"""The one logger: a line a stage, as text or JSON, with secrets masked."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO
from urllib.parse import quote, quote_plus

from job.errors import ExitCode

log = logging.getLogger("job")
TERMINATION_LOG = Path("/dev/termination-log")  # shown by `kubectl describe pod`

# Values of variables with such names never reach a log line, a traceback or the last words.
_SECRET_NAME = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|STORAGE_KEY|PRIVATE_KEY|CONNECTION_STRING)$",
    re.IGNORECASE,
)
# apprise's URLs: a token may stand in any part, even in the host's place (slack://TokenA/TokenB).
_URLS_NAME = re.compile(r"NOTIFY_URLS$", re.IGNORECASE)
_MIN_SECRET_LENGTH = 6  # masking "1" or "true" everywhere would only hide our own words


def mask_secrets(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """`text` with the value of every secret-looking environment variable replaced by ***."""
    secrets = {value for name, value in environ.items() if _SECRET_NAME.search(name)}
    for name, value in environ.items():
        if _URLS_NAME.search(name):
            secrets |= {part for part in re.split(r"[\s,/:@?&=#]+", value) if _may_be_secret(part)}
    forms = {form for secret in secrets for form in _forms(secret)}
    for form in sorted(forms, key=len, reverse=True):  # a shorter one may be part of a longer one
        if len(form) >= _MIN_SECRET_LENGTH:
            text = text.replace(form, "***")
    text = re.sub(r"(?<=[?&;]sig=)[^&\s\"';]+", "***", text)  # of Azure, in an address
    return re.sub(r"://[^/\s@:]+:[^/\s@]+@", "://***@", text)


def _may_be_secret(part: str) -> bool:
    """Whether a part of a URL is more than a scheme, a port, or a host with a domain."""
    is_host = "." in part or part == "localhost"
    return len(part) >= _MIN_SECRET_LENGTH and not is_host


def _forms(secret: str) -> Iterator[str]:
    """A secret as libraries quote it: as it is, bare, line by line, escaped, in a URL."""
    bare = secret.strip().strip("\"'").strip()
    for text in {secret, bare, *(line.strip() for line in bare.splitlines())}:
        yield text
        yield repr(text)[1:-1]
        yield json.dumps(text)[1:-1]
        yield json.dumps(text, ensure_ascii=False)[1:-1]
        in_bytes = text.encode(errors="surrogateescape")
        yield from (quote(in_bytes), quote(in_bytes, safe=""), quote_plus(in_bytes))
    # HTTP's basic authentication, as W&B's client sends it
    yield base64.b64encode(b"api:" + bare.encode(errors="surrogateescape")).decode()


class _TextFormatter(logging.Formatter):
    def __init__(self, worker: int | None) -> None:
        super().__init__()
        self.mark = "" if worker is None else f"[{worker}] "

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%H:%M:%S", time.gmtime(record.created))
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        text = f"{stamp} {self.mark}{level}{record.getMessage()}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return mask_secrets(text)


class _JsonFormatter(logging.Formatter):
    def __init__(self, worker: int | None) -> None:
        super().__init__()
        self.mark = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, object] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "severity": record.levelname,  # the key that GKE's and AKS's collectors read
            **self.mark,
            "message": mask_secrets(record.getMessage()),
        }
        if record.exc_info and record.exc_info[1]:
            trace = "".join(traceback.format_exception(record.exc_info[1]))
            entry["traceback"] = mask_secrets(trace)
        return json.dumps(entry, ensure_ascii=False)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at the moment: a progress bar may have replaced it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def set_up_logging(log_format: str, *, worker: int | None = None) -> None:
    """Send our lines to stderr as `text` or `json`, and other libraries' from warnings up.

    `worker` marks the lines of one of several workers that share a terminal.
    """
    handler = _StderrHandler()
    formatter = _JsonFormatter if log_format == "json" else _TextFormatter
    handler.setFormatter(formatter(worker))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    # What libraries tell each other about their next versions does not help who runs a job.
    warnings.filterwarnings("ignore", category=FutureWarning)
    # It warns that an optional package with a faster kernel for CPUs is not installed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Its chain of credentials tells in many lines what our own tells in one.
    logging.getLogger("azure").setLevel(logging.ERROR)
    log.setLevel(logging.INFO)


def is_marked() -> bool:
    """Whether this process is one of several workers, whose lines and bars share a terminal."""
    return any(getattr(h.formatter, "mark", None) for h in logging.getLogger().handlers)


def last_words(code: int, message: str) -> int:
    """Log in one line how the process ends, where Kubernetes shows it too; return the exit code.

    Of several mistakes, a line each, it names all: whoever looks at the last line sees no other.
    """
    said = "; ".join(line.strip() for line in message.splitlines() if line.strip())
    line = mask_secrets(f"exit {int(code)} ({ExitCode(code).name.lower()}): {said}")
    (log.info if code == ExitCode.OK else log.error)("%s", line)
    with contextlib.suppress(OSError):
        if TERMINATION_LOG.exists():
            TERMINATION_LOG.write_text(line[:4096], encoding="utf-8", errors="replace")
    return int(code)
