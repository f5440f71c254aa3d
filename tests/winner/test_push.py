"""What a push leaves on the hub, by its real client. `pytest tests/winner/test_push.py`"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.ledger.ledger import Ledger
from tests import forked
from tests.servers.hub import Hub, Refusal, hub_server
from tests.winner.tuned import make_tuned_sweep

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NAME = "models/me/mine"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def ledger(folder: Path) -> Ledger:
    return make_tuned_sweep(folder, num_slots=2)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as hub:
        yield hub


def _best(
    folder: Path,
    hub: Hub,
    *words: str,
    token: str = "hf_mine",  # noqa: S107
) -> subprocess.CompletedProcess[str]:
    return forked.run(
        [sys.executable, "-m", "job", "best", *words],
        env={
            "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HOME": f"{folder}/hf",
            "JOB_OUTPUT_URI": f"{folder}/out", "JOB_SWEEP_NAME": "s", "JOB_NUM_TRIALS": "2",
            "JOB_WORK_DIR": f"{folder}/work", "JOB_DEVICE": "cpu", "OMP_NUM_THREADS": "1",
        },
        timeout=240,
    )  # fmt: skip


def test_a_push_leaves_what_download_gives_and_a_second_one_changes_nothing(
    folder: Path, ledger: Ledger, hub: Hub
) -> None:
    pushed = _best(folder, hub, "--push", "me/mine")
    assert pushed.returncode == 0, pushed.stderr
    assert f'"pushed": "{hub.endpoint}/me/mine"' in pushed.stdout
    assert _best(folder, hub, "--download", str(folder / "adapter")).returncode == 0
    here = {path.name: path.read_bytes() for path in (folder / "adapter").iterdir()}
    assert hub.repositories[NAME] == here
    assert "adapter_model.safetensors" in here
    assert hub.private[NAME], "unless it is asked for, nobody else sees it"
    assert hub.commits == ["slot 0 of sweep s"]
    again = _best(folder, hub, "--push", "me/mine")
    assert again.returncode == 0, again.stderr
    assert hub.commits == ["slot 0 of sweep s"]
    assert hub.repositories[NAME] == here
    assert "hf_mine" not in pushed.stderr + pushed.stdout


def test_the_merged_model_of_another_slot_in_public(folder: Path, ledger: Ledger, hub: Hub) -> None:
    words = ("--slot", "1", "--push", "me/mine", "--merged", "--public", "--onto", "16bit")
    pushed = _best(folder, hub, *words)
    assert pushed.returncode == 0, pushed.stderr
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(
        hub.repositories[NAME]
    )
    assert not hub.private[NAME]
    assert _best(folder, hub, *words).returncode == 0
    assert hub.commits == ["slot 1 of sweep s"], "equal merges are equal bytes"


def test_a_token_that_may_not_write_is_77(folder: Path, ledger: Ledger, hub: Hub) -> None:
    done = _best(folder, hub, "--push", "me/mine", token="may-not-write")
    assert done.returncode == 77, done.stderr
    assert "the hub does not let us write to me/mine" in done.stderr.splitlines()[-1]
    assert hub.commits == []


@pytest.mark.parametrize("name", ["mine", "me/mine/too", "me/mi ne", ""])
def test_a_name_that_is_none_is_64(folder: Path, ledger: Ledger, hub: Hub, name: str) -> None:
    done = _best(folder, hub, "--push", name)
    assert done.returncode == 64
    assert hub.asked_about("/api/") == []


def test_a_hub_that_fails_or_is_not_there_is_74(folder: Path, ledger: Ledger, hub: Hub) -> None:
    gone = Hub(endpoint="http://127.0.0.1:9")
    done = _best(folder, gone, "--push", "me/mine")
    assert done.returncode == 74, done.stderr
    hub.repositories[NAME] = {}
    hub.refusals[NAME] = Refusal(503)
    done = _best(folder, hub, "--push", "me/mine")
    assert done.returncode == 74, done.stderr
    assert "run it again" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "words",
    [("--merged",), ("--public",), ("--onto", "4bit"), ("--base", "a/b"),
     ("--push", "me/mine", "--base", "a/b")],
)  # fmt: skip
def test_options_without_what_they_belong_to_are_64(
    folder: Path, ledger: Ledger, hub: Hub, words: tuple[str, ...]
) -> None:
    done = _best(folder, hub, *words)
    assert done.returncode == 64
    assert "belong to" in done.stderr
    assert hub.asked_about("/api/") == []
