"""A hub's data set is one commit or one error. `pytest tests/data/test_hub_dataset.py`"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from job.data.sources import hub_id
from tests.servers.hub import COMMIT, Refusal, hub_server

OTHER_COMMIT = "b" * 40
README = b"""---
configs:
- {config_name: default, data_files: rows.jsonl}
- {config_name: other, data_files: other.jsonl}
- {config_name: untrained, data_files: [{split: test, path: rows.jsonl}]}
---
"""
FILES = {
    "README.md": README,
    "rows.jsonl": b'{"question": "a?", "answer": "b"}\n{"question": "c?", "answer": null}\n',
    "other.jsonl": b'{"question": "x?", "answer": "y"}\n',
}
# For a data set's name, what the hub says; the real client library turns it into its errors.
REFUSALS = {
    "gated": Refusal(403, {"X-Error-Code": "GatedRepo"}),
    "failing": Refusal(500),
}

SCRIPT = """
import json, sys
from pathlib import Path
from job.data.sources import open_source
from job.errors import JobError
outcomes = []
for uri in sys.argv[1:]:
    try:
        source = open_source(uri, Path("unused"), outage_seconds=0.5)
        rows = [row.columns for row in source.rows(lambda: None)]
        outcomes.append([source.versions()[0].version, rows])
    except JobError as error:
        outcomes.append([int(error.exit_code), str(error)])
print(json.dumps(outcomes))
"""


def read(uris: Iterable[str], **environ: str) -> dict[str, tuple[object, object]]:
    """Version and rows, or exit code and message, of each; from a fresh process, since the hub's
    library reads its variables at import."""
    shown = subprocess.run(
        [sys.executable, "-c", SCRIPT, *uris],
        env={**os.environ, **environ},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    outcomes = [(first, second) for first, second in json.loads(shown.stdout)]
    return dict(zip(uris, outcomes, strict=True))


ROWS = [{"question": "a?", "answer": "b"}, {"question": "c?", "answer": None}]
PINNED = f"owner/rows@{COMMIT}"
ABSENT = f"owner/rows@{OTHER_COMMIT}"
READABLE = {
    "owner/rows": ROWS,
    "owner/rows:other": [{"question": "x?", "answer": "y"}],
    PINNED: ROWS,
}
REFUSED = {
    "owner/missing": (64, "is neither a path here nor on the Hugging Face hub"),
    "owner/rows@nowhere": (64, "owner/rows at revision nowhere is neither"),
    "owner/gated": (77, "is gated: accept its licence and set HF_TOKEN"),
    f"owner/gated@{COMMIT}": (77, "is gated"),
    "owner/failing": (74, "hub cannot be reached or read (HfHubHTTPError"),
    "owner/rows:wrong": (65, "Available: ['default', 'other', 'untrained']"),
    "owner/rows:untrained": (65, "with a split 'train'"),
    ABSENT: (74, f"only commit {COMMIT} is on this disk"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def online(home: Path) -> Iterator[dict[str, tuple[object, object]]]:
    with hub_server() as hub:
        hub.repositories["datasets/owner/rows"] = FILES
        hub.refusals |= {f"datasets/owner/{name}": answer for name, answer in REFUSALS.items()}
        uris = [*READABLE, *REFUSED]
        yield read(uris, HF_ENDPOINT=hub.endpoint, HF_HOME=str(home), HF_HUB_OFFLINE="0")


@pytest.mark.parametrize("uri", READABLE)
def test_a_data_set_is_read_at_one_commit(
    online: dict[str, tuple[object, object]], uri: str
) -> None:
    assert online[uri] == (COMMIT, READABLE[uri])


@pytest.mark.parametrize("uri", REFUSED)
def test_a_data_set_that_cannot_be_read_is_one_line_with_its_exit_code(
    online: dict[str, tuple[object, object]], uri: str
) -> None:
    code, words = REFUSED[uri]
    shown_code, message = online[uri]
    assert shown_code == code, message
    assert words in str(message)
    assert "\n" not in str(message)


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_an_outage_unless_the_commit_is_here(
    online: dict[str, tuple[object, object]], home: Path
) -> None:
    other = f"owner/rows:other@{COMMIT}"
    uncached = f"owner/rows:new@{COMMIT}"
    # Without the hub nobody knows which of the two configurations on this disk is the default.
    uris = [other, PINNED, ABSENT, uncached, "owner/rows"]
    offline = read(uris, HF_HOME=str(home), HF_HUB_OFFLINE="1")
    assert offline.pop(other) == online["owner/rows:other"]
    assert len(offline) == 4
    for code, message in offline.values():
        assert code == 74
        assert "hub cannot be reached" in str(message)


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("owner/name", ("owner/name", None, None)),
        ("owner/my.rows-2:fr@refs/pr/1", ("owner/my.rows-2", "fr", "refs/pr/1")),
        ("data/rows.jsonl", None),
        ("data/rows.csv.gz", None),
        ("./data", None),
        ("~/data", None),
        ("/data/rows", None),
        ("a/b/c", None),
        ("rows", None),
        ("data/*", None),
        ("http://owner/name", None),
        ("tests/servers", None),
    ],
)
def test_what_looks_like_a_path_or_is_here_is_no_data_set(
    uri: str, parts: tuple[str | None, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    match = hub_id(uri)
    assert (match.groups() if match else None) == parts
