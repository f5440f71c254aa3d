"""`job best --push`: an adapter or a merged model as a repository on the Hugging Face hub."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

from job.errors import CredentialsError, JobError, OutageError, SettingsError
from job.hub import explained
from job.log import log

_PUSH = "best --push"
_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def check_repository(repository: str) -> None:
    """Refuse what is no `owner/name`. Raises `SettingsError`."""
    if not _ID.fullmatch(repository):
        raise SettingsError(f"{_PUSH}: {repository!r} is no repository; give OWNER/NAME")


def push(folder: Path, repository: str, *, public: bool, message: str) -> str:
    """Upload all files of the folder to `owner/name`; return the address of what stands there.

    The repository is made if there is none, private unless `public`; one that exists keeps its
    visibility, and files that are there already are not sent again. The token is the hub's own:
    `HF_TOKEN`, or what `hf auth login` left. Raises `SettingsError`, `CredentialsError` for a token
    that may not write there, `OutageError` if the hub fails or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    check_repository(repository)
    hub_logging.set_verbosity(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        api = HfApi()
        made = api.create_repo(repository, private=not public, exist_ok=True)
        commit = api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=message)
    except Exception as error:  # the client's HTTP library has errors of its own
        if told := _explained(error, repository):
            raise told from error
        raise
    log.info("pushed to %s at commit %s", made, commit.oid)
    return str(made)


def _explained(error: Exception, repository: str) -> JobError | None:
    """What the error means: as `explained` says, in words for writing."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    told = explained(error, _PUSH, repository)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(told, CredentialsError) or status in (401, 403):
        return CredentialsError(
            f"{_PUSH}: the hub does not let us write to {repository} ({_first_line(error)}); set"
            " HF_TOKEN to a token that may"
        )
    if isinstance(told, OutageError):
        return OutageError(
            f"{_PUSH}: {repository}: the Hugging Face hub cannot be reached or fails"
            f" ({_first_line(error)}); run it again, what has arrived is not sent again"
        )
    if isinstance(error, HfHubHTTPError | HFValidationError | ValueError):
        return SettingsError(f"{_PUSH}: the hub refuses {repository}: {_first_line(error)}")
    return told


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:300]
