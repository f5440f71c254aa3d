"""The Hugging Face hub's answers, with its real client. `pytest tests/test_hub.py`

The hub is tests/servers/hub.py, which says how far it is like the real one. Each question is asked
in a process of its own, because the client reads its variables at import.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.errors import PreemptedError
from job.hub import HubOutageError, waited_out
from tests import forked
from tests.runbook import check_row
from tests.servers.hub import COMMIT, Hub, Refusal, hub_server

ROOT = Path(__file__).parent.parent
ASK = """
import json, sys
from pathlib import Path
from job.base_model import resolve_base_model
from job.data.sources import open_source
from job.errors import JobError
from job.hub import cached_snapshot, waited_out
from job.log import set_up_logging
set_up_logging("text")
kind, name, revision, seconds = sys.argv[1:]
seconds = float(seconds)

def ask():
    if kind == "model":
        return resolve_base_model(name, revision, outage_seconds=seconds).revision
    if kind == "snapshot":
        return str(cached_snapshot(name, revision))
    if kind == "tokenizer":
        from job.data.tokens import load_tokenizer
        return waited_out(lambda: len(load_tokenizer(name, revision)), seconds)
    if kind == "weights":
        import torch
        from job.training.model import load_base
        load = lambda: load_base(name, revision, torch.device("cpu"))
        return waited_out(load, seconds).config.model_type
    source = open_source(name, Path("unused"), outage_seconds=seconds)
    return [row.columns for row in source.rows(lambda: None)]

try:
    print(json.dumps([0, ask()]))
except JobError as error:
    print(json.dumps([int(error.exit_code), str(error)]))
"""
ADAPTER = b'{"base_model_name_or_path": "owner/base"}'
CONFIG = json.dumps({"model_type": "llama"}).encode()
ROWS = b'{"question": "a?", "answer": "b"}\n'


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as hub:
        hub.repositories["models/owner/model"] = {"config.json": CONFIG}
        hub.repositories["models/owner/both"] = {
            "config.json": CONFIG,
            "adapter_config.json": ADAPTER,
        }
        hub.repositories["models/owner/other"] = {"README.md": b"no model"}
        hub.repositories["datasets/owner/rows"] = {"rows.jsonl": ROWS}
        yield hub


def ask(
    kind: str,
    name: str,
    home: Path,
    *,
    revision: str = "main",
    seconds: float = 0.5,
    user: int | None = None,
    **environ: str,
) -> tuple[int, object]:
    """0 and the answer, or the exit code and the line."""
    done = forked.run(
        [sys.executable, "-c", ASK, kind, name, revision, str(seconds)],
        env={
            "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(home),
            "HF_HOME": str(home), "OMP_NUM_THREADS": "1", **environ,
        },
        cwd="/", timeout=120, user=user,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    code, answer = json.loads(done.stdout.splitlines()[-1])
    assert "\n" not in str(answer)
    return code, answer


# (status, headers), what the line says besides HF_TOKEN or HF_ENDPOINT, code
INVALID = {"X-Error-Message": "Invalid credentials in Authorization header"}
# https://huggingface.co/docs/hub/models-gated
GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model owner/x is restricted"}
# https://huggingface.co/docs/hub/security-tokens: a fine-grained token without this repository
# (the page names the case; this sentence is our wording, not one that was seen)
FINE = {"X-Error-Message": "Forbidden: you must have read access to this repository"}
DISABLED = {"X-Error-Message": "Access to this resource is disabled."}
REFUSALS = {
    "private, no token": (Refusal(401, {}), "HTTP 401", 77),
    "wrong token": (Refusal(401, INVALID), INVALID["X-Error-Message"], 77),
    "gated": (Refusal(403, GATED), "is gated: accept its licence and set HF_TOKEN", 77),
    "token without this repository": (Refusal(403, FINE), FINE["X-Error-Message"], 77),
    "disabled": (Refusal(403, DISABLED), "the hub has disabled it", 64),
    "failing": (Refusal(503, {}), "HTTP 503", 74),
    "too many": (Refusal(429, {"Retry-After": "3000"}), "HTTP 429", 74),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_refusal_has_its_code_and_names_the_repository(
    hub: Hub, tmp_path: Path, name: str, kind: str
) -> None:
    refusal, words, code = REFUSALS[name]
    hub.refusals[f"{kind}s/owner/x"] = refusal
    started = time.monotonic()
    got, line = ask(kind, "owner/x", tmp_path, HF_ENDPOINT=hub.endpoint, HF_TOKEN="hf_secret")
    assert got == code, line
    assert "owner/x" in str(line)
    assert words in str(line)
    assert "hf_secret" not in str(line)
    assert time.monotonic() - started < 60, "a pause that is longer than what is left is not begun"
    said = refusal.headers.get("X-Error-Message", f"HTTP {refusal.status}")
    check_row(said, code)


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("owner/missing", 64, "neither a path here nor on the Hugging Face hub"),
        ("owner/other", 64, "is no model: it has no config.json"),
        ("owner/both", 64, "is an adapter (adapter_config.json), not a base model"),
        ("a..b/c", 64, "neither a path here"),  # no name that the hub knows: HFValidationError
    ],
)
def test_what_is_no_model_of_the_hub_is_a_setting(
    hub: Hub, tmp_path: Path, name: str, code: int, words: str
) -> None:
    got, line = ask("model", name, tmp_path, HF_ENDPOINT=hub.endpoint)
    assert (got, words in str(line)) == (code, True), line


ENDPOINTS = {
    "connection refused": "http://127.0.0.1:9",
    "no such host": "http://hub.invalid",  # RFC 2606: never resolves
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, name) for kind in ("model", "dataset") for name in ENDPOINTS),
        # One alone: transformers tries for 20 s.
        pytest.param("weights", "connection refused", marks=pytest.mark.slow),
    ],
)
def test_no_network_at_all_is_an_outage(tmp_path: Path, kind: str, name: str) -> None:
    if kind == "weights":
        forked.with_torch()
    code, line = ask(kind, "owner/x", tmp_path, HF_ENDPOINT=ENDPOINTS[name])
    assert code == 74, line
    assert "the Hugging Face hub cannot be reached" in str(line)
    check_row(str(line), 74)


def test_a_portals_page_is_no_hub(hub: Hub, tmp_path: Path) -> None:
    hub.refusals["models/owner/x"] = Refusal(200, {"Content-Type": "text/html"}, body=b"<html>")
    code, line = ask("model", "owner/x", tmp_path, revision=COMMIT, HF_ENDPOINT=hub.endpoint)
    assert code == 74, line
    assert "HF_ENDPOINT" in str(line)


@pytest.mark.slow
@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(429, {"Retry-After": "2"}, times=2),
        Refusal(429, {"RateLimit": '"api";r=0;t=1'}, times=2),
        Refusal(503, {}, times=2),
        Refusal(500, {"Retry-After": "0"}, times=2),
    ],
    ids=lambda refusal: f"{refusal.status} {list(refusal.headers)}",
)
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_what_passes_is_waited_for(hub: Hub, tmp_path: Path, kind: str, refusal: Refusal) -> None:
    name = {"model": "owner/model", "dataset": "owner/rows"}[kind]
    hub.refusals[f"{kind}s/{name}"] = Refusal(refusal.status, refusal.headers, refusal.times)
    started = time.monotonic()
    code, answer = ask(kind, name, tmp_path, seconds=30, HF_ENDPOINT=hub.endpoint)
    assert code == 0, answer
    if refusal.headers:
        asked = 4 if refusal.headers.get("Retry-After") == "2" else 0
        assert time.monotonic() - started >= asked, "Retry-After is kept"


def test_who_is_told_to_end_waits_for_no_hub() -> None:
    """Within a pause that the hub asks for, long before it is over."""

    def busy() -> None:
        error = HubOutageError("HTTP 429")
        error.pause_seconds = 4
        raise error

    asked = 0

    def should_stop() -> None:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise PreemptedError("told to end")

    with pytest.raises(PreemptedError, match="told to end"):
        waited_out(busy, 5, should_stop)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name", "revision"),
    [
        ("model", "owner/model", "main"),
        ("model", "owner/model", COMMIT),
        ("dataset", "owner/rows", "main"),
        ("dataset", f"owner/rows@{COMMIT}", "main"),
    ],
)
def test_what_is_in_the_cache_works_offline(
    hub: Hub, tmp_path: Path, kind: str, name: str, revision: str
) -> None:
    online = ask(kind, name.partition("@")[0], tmp_path, HF_ENDPOINT=hub.endpoint)
    assert online[0] == 0, online
    hub.asked.clear()
    environ = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "1"}
    assert ask(kind, name, tmp_path, revision=revision, **environ) == online
    assert hub.asked_about("owner/") == []


def test_a_model_at_a_commit_in_the_cache_asks_the_hub_nothing(hub: Hub, tmp_path: Path) -> None:
    """All trials but the first: the commit is in sweep.json."""
    assert ask("model", "owner/model", tmp_path, HF_ENDPOINT=hub.endpoint)[0] == 0
    closed = ENDPOINTS["connection refused"]
    answer = ask("model", "owner/model", tmp_path, revision=COMMIT, HF_ENDPOINT=closed)
    assert answer == (0, COMMIT)
    _, folder = ask("snapshot", "owner/model", tmp_path, revision=COMMIT, HF_ENDPOINT=closed)
    assert (Path(str(folder)) / "config.json").read_bytes() == CONFIG
    assert ask("snapshot", "owner/model", tmp_path, revision="f" * 40) == (0, "None")


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_what_is_not_in_the_cache_is_told_at_once_offline(tmp_path: Path, kind: str) -> None:
    started = time.monotonic()
    code, line = ask(kind, "owner/x", tmp_path, seconds=600, HF_HUB_OFFLINE="1")
    assert code == 74, line
    assert "because HF_HUB_OFFLINE is set" in str(line)
    assert time.monotonic() - started < 60
    check_row(str(line), 74)


@pytest.mark.slow
def test_a_whole_model_in_the_cache_loads_offline(hub: Hub, tmp_path: Path) -> None:
    from tests.tiny_model import make_base
    from tests.tiny_tokenizer import byte_level_tokenizer

    forked.with_torch()
    folder = make_base(tmp_path / "base")
    byte_level_tokenizer().save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    hub.repositories["models/owner/model"] = files
    for kind in ("model", "tokenizer", "weights"):
        revision = "main" if kind == "model" else COMMIT
        online = ask(kind, "owner/model", tmp_path, revision=revision, HF_ENDPOINT=hub.endpoint)
        assert online[0] == 0, online
        environ = {"HF_ENDPOINT": ENDPOINTS["connection refused"], "HF_HUB_OFFLINE": "1"}
        assert ask(kind, "owner/model", tmp_path, revision=revision, **environ) == online


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer", "weights"])
def test_weights_and_tokenizer_wait_and_refuse_as_the_config_does(
    hub: Hub, tmp_path: Path, kind: str
) -> None:
    forked.with_torch()
    hub.refusals["models/owner/x"] = Refusal(403, FINE)
    code, line = ask(kind, "owner/x", tmp_path, HF_ENDPOINT=hub.endpoint)
    assert (code, "HF_TOKEN" in str(line)) == (77, True), line
    if kind == "weights":
        hub.refusals["models/owner/x"] = Refusal(503)
        code, line = ask(kind, "owner/x", tmp_path, HF_ENDPOINT=hub.endpoint)
        assert (code, "HTTP 503" in str(line)) == (74, True), line


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_home_that_cannot_be_written_is_a_setting(hub: Hub, tmp_path: Path, kind: str) -> None:
    name = {"model": "owner/model", "dataset": "owner/rows"}[kind]
    file = tmp_path / "file"
    file.touch()
    environ = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(file), "HOME": str(tmp_path)}
    code, line = ask(kind, name, tmp_path, **environ)
    assert code == 64, line
    assert str(line).startswith(f"HF_HOME: {file}")
    check_row(str(line), 64)
