"""What W&B's client or server refuses is 64 or 77 at once. `pytest tests/wandb/test_refusals.py`

The errors are raised by the real client (0.31) where it refuses by itself; a server's answers are
in the words that the client gives them, from the issues beside the rows (those without one are
in the form of the others). tests/wandb/test_agent.py
plays the same with the whole client and a small server.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import wandb
from wandb.errors import AuthenticationError, CommError, UsageError
from wandb.sdk.lib.wbauth.validation import check_api_key

from job.errors import CredentialsError, JobError, OutageError, SettingsError
from job.wandb.client import as_job_error
from tests.runbook import check_row


def _raised(action: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # whatever the client raises
        action()
    return caught.value


def _key(key: str) -> Exception:
    return AuthenticationError(check_api_key(key) or "accepted")


REFUSED = [
    (_key("k" * 39), CredentialsError, "API key must have 40+ characters"),
    (_key("k" * 20 + " " + "k" * 20), CredentialsError, "API key may only contain"),
    (_key(""), CredentialsError, "API key is empty"),
    (
        _raised(lambda: wandb.Settings(api_key="k" * 40 + "\n")), CredentialsError,
        "API key cannot start or end with whitespace",
    ),
    (UsageError("No authentication configured. Use `wandb login` to log in."), CredentialsError,
     "No authentication configured"),
    (CommError("returned error 401: user is not logged in"), CredentialsError,
     "user is not logged in"),
    # https://github.com/wandb/wandb/issues/8609
    (CommError('failed to upsert bucket: returned error 403 Forbidden: {"errors":[{"message":'
               '"permission denied","path":["upsertBucket"]}],"data":{"upsertBucket":null}}'),
     CredentialsError, "permission denied"),
    (AuthenticationError("Failed to verify credentials with https://x: invalid credentials"),
     CredentialsError, "invalid credentials"),
    # https://github.com/MarkFzp/act-plus-plus/issues/14, in the form of the row above
    (CommError('returned error 404 Not Found: {"errors":[{"message":"project not found"}]}'),
     SettingsError, "project not found"),
    (CommError("returned error 404: entity team not found during upsertBucket"), SettingsError,
     "not found during upsertBucket"),
    (_raised(lambda: wandb.Settings(project="team/project")), SettingsError,
     "Invalid project name"),
    (_raised(lambda: wandb.Settings(base_url="wandb.example")), SettingsError, "validation error"),
    (_raised(lambda: wandb.Settings(init_timeout="30s")), SettingsError, "validation error"),
    (_raised(lambda: wandb.Settings(mode="sometimes")), SettingsError, "validation error"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "kind", "words"), REFUSED, ids=[row[2] for row in REFUSED])
def test_a_refusal_is_no_outage(error: Exception, kind: type[JobError], words: str) -> None:
    told = as_job_error("reading", error)
    assert type(told) is kind, told
    assert words in str(told)
    assert "\n" not in str(told)
    check_row(words, told.exit_code)


@pytest.mark.parametrize(
    "error",
    [
        CommError("returned error 502: Bad Gateway"),
        CommError("returned error 429: rate limit exceeded"),
        CommError(
            "returned error 404: <html>default backend - 404</html>"
        ),  # an ingress in between
        AuthenticationError("Failed to verify credentials with https://x: connection refused"),
        ValueError("Expecting value: line 1 column 1 (char 0)"),  # not JSON: a proxy's page
        TimeoutError("timed out"),
        PermissionError(13, "Permission denied", "/work/wandb"),
    ],
    ids=str,
)
def test_what_may_pass_is_an_outage(error: Exception) -> None:
    assert type(as_job_error("reading", error)) is OutageError
