"""Other tools' variables: mended, or refused at once. `pytest tests/test_environment.py`"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from job.environment import mend

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("value", "meant", "says"),
    [
        ("abc\n", "abc", "white space around the value removed"),
        ("abc\r\n", "abc", "white space around the value removed"),
        ("  abc", "abc", "white space around the value removed"),
        ('"abc"', "abc", "quotes around the value removed"),
        ("'abc'\n", "abc", "white space and quotes around the value removed"),
        ("", None, "is empty and counts as unset"),
        (" \n", None, "is empty and counts as unset"),
        ('""', None, "is empty and counts as unset"),
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        *("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "WANDB_MODE", "HF_TOKEN", "HF_HOME"),
        *("GOOGLE_CLOUD_PROJECT", "AZURE_CLIENT_SECRET", "AWS_PROFILE", "WANDB_ENTITY"),
        "HUGGING_FACE_HUB_TOKEN",  # HF_TOKEN's older name
    ],
)
def test_what_stands_around_a_value_is_removed_and_told_without_it(
    name: str, value: str, meant: str | None, says: str
) -> None:
    environ = {name: value}
    warnings, errors = mend(environ)
    assert environ.get(name) == meant
    assert warnings == [f"{name}: {says}"]
    assert errors == []
    assert mend(environ) == ([], []), "a child process has nothing to tell any more"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ENDPOINT_URL", "minio:9000"),
        ("AWS_ENDPOINT_URL_S3", "minio.example"),
        ("AWS_ENDPOINT_URL_STS", "//sts.example"),
        ("WANDB_BASE_URL", "wandb.example"),
        ("HF_ENDPOINT", "hf-mirror.example"),
        ("STORAGE_EMULATOR_HOST", "localhost:9023"),
        ("AWS_REGION", "eu west 1"),
        ("AWS_DEFAULT_REGION", "eu-west-1,us-east-1"),
        ("WANDB_PROJECT", "team/project"),
        ("WANDB_PROJECT", "p" * 129),
        ("WANDB_ENTITY", "team/project"),
        ("WANDB_INIT_TIMEOUT", "90s"),
        ("WANDB_FINISH_TIMEOUT", "1m"),
        ("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "5 s"),
        ("HF_HUB_ETAG_TIMEOUT", "10s"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "1.5"),  # the hub's client reads whole numbers
        ("AWS_MAX_ATTEMPTS", "ten"),
        ("AWS_METADATA_SERVICE_TIMEOUT", "1s"),
        ("AWS_REQUEST_CHECKSUM_CALCULATION", "when_needed"),
        ("AWS_RETRY_MODE", "aggressive"),
        ("AWS_SECRET_ACCESS_KEY", "secret-one\nsecret-two"),
        ("HF_TOKEN", "secret token"),
        ("WANDB_API_KEY", "schlüssel"),
        ("AZURE_STORAGE_ACCOUNT", "https://tester.blob.core.windows.net"),
        ("AZURE_STORAGE_SAS_TOKEN", "secret"),
        ("AZURE_STORAGE_KEY", "secret key"),
        ("AZURE_STORAGE_CONNECTION_STRING", "secret"),
        ("AZURE_STORAGE_SERVICE_ENDPOINT", "tester.blob.core.windows.net"),
        ("GOOGLE_APPLICATION_CREDENTIALS", '{"type": "service_account", "private_key": "secret"}'),
    ],
)
def test_a_value_that_cannot_be_is_refused_without_being_shown(name: str, value: str) -> None:
    _, (line,) = mend({name: value})
    assert line.startswith(f"{name}: its value (not shown) cannot be; needed: ")
    assert value not in line
    assert "secret" not in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9000"),
        ("AWS_ENDPOINT_URL", "HTTPS://account.r2.cloudflarestorage.com/"),
        ("AWS_REGION", "auto"),  # R2
        ("AWS_DEFAULT_REGION", "garage"),
        ("WANDB_PROJECT", "Über uns 2"),
        ("WANDB_INIT_TIMEOUT", "1e2"),
        ("WANDB_SWEEP_ID", "team/project/abc123"),
        ("WANDB_NOTES", 'he said "no"'),
        ("WANDB_API_KEY", "local-" + "k" * 40),
        ("AWS_ACCESS_KEY_ID", "test:tester"),
        ("AWS_SECRET_ACCESS_KEY", "wJalr/XUt+nFEMI=="),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/var/secrets/with blank/key.json"),
        # Kubernetes' service links, for services that are called aws, wandb and hf-endpoint
        ("AWS_PORT", "tcp://10.0.0.1:80"),
        ("WANDB_SERVICE_HOST", "10.0.0.1"),
        ("HF_ENDPOINT_PORT", "tcp://10.0.0.1:80"),
        # not ours to judge
        ("CUDA_VISIBLE_DEVICES", ""),
        ("PS1", ""),
        ("JOB_SEED", " 17"),
    ],
)
def test_what_works_is_left_alone(name: str, value: str) -> None:
    environ = {name: value}
    assert mend(environ) == ([], [])
    assert environ == {name: value}


def _job(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "job", *words],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environ},
        cwd="/", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "words", [(), ("queue",), ("status",), ("plan",), ("gc",), ("sweep", "create"), ("demo",)]
)
def test_every_verb_refuses_it_before_anything_is_opened(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    done = _job(
        *words,
        JOB_DATASET_URI=str(tmp_path / "rows.jsonl"),
        JOB_OUTPUT_URI=str(tmp_path / "out"),
        JOB_WORK_DIR=str(tmp_path / "work"),
        HF_HUB_ETAG_TIMEOUT="10s",
    )
    assert done.returncode == 64, done.stderr
    assert "exit 64 (settings): HF_HUB_ETAG_TIMEOUT: its value (not shown)" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_mistakes_of_all_kinds_come_at_once_and_a_newline_is_told_once(tmp_path: Path) -> None:
    wrong = _job("status", JOB_OUTPUT_URI='"/x"', WANDB_PROJECT="a/b", JOB_SEDE="1")
    assert wrong.returncode == 64
    for name in ("JOB_OUTPUT_URI", "WANDB_PROJECT", "JOB_SEDE"):
        assert f"{name}: " in wrong.stderr
    # A trial that ends soon: there are no rows. Its parent has told and mended the variable.
    given = {"JOB_DATASET_URI": str(tmp_path / "none.jsonl"), "JOB_OUTPUT_URI": str(tmp_path / "o")}
    environ = {
        **given,
        "JOB_WORK_DIR": str(tmp_path),
        "JOB_DEVICE": "cpu",
        "JOB_ID": "7",
        "HF_TOKEN": "hf_secret\n",
    }
    done = _job(**environ, HF_HUB_OFFLINE="1", JOB_BASE_MODEL=str(tmp_path))
    assert done.returncode in (64, 65), done.stderr
    assert done.stderr.count("HF_TOKEN") == done.stderr.count("JOB_ID") == 1
    assert "hf_secret" not in done.stderr
