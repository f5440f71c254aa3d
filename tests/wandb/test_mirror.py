"""W&B is shown a trial as it went, and no failure of W&B costs the trial anything.

The real client against a local server. `pytest tests/wandb/test_mirror.py`
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.servers.wandb import Fault, WandbServer, wandb_server
from tests.wandb.workers import LONG, Workers, eventually

pytestmark = pytest.mark.slow

AT_ONCE = 4
STEPS = list(range(1, 17))


@dataclass
class Case:
    """A fault that meets a trial of the built-in engine; the slot is committed in any case."""

    name: str
    prepare: Callable[[WandbServer], None]
    is_mirrored: bool  # already by the first attempt
    warns: str = ""


def _faults(*faults: Fault) -> Callable[[WandbServer], None]:
    return lambda server: server.faults.extend(faults)


def _refuse_after_start(server: WandbServer) -> None:
    """Nothing is answered any more once the run is open."""

    def look(request: str) -> None:
        if request == "file_stream":
            server.faults[:] = [Fault("reset")]

    server.on_request = look


def _other_key(server: WandbServer) -> None:
    server.state.api_keys = ["f" * 40]


CASES = [
    Case("none", lambda server: None, True),
    Case("500 twice", _faults(Fault("status", times=2)), True),
    Case("rows: 500 twice", _faults(Fault("status", "file_stream", 2)), True),
    Case("rows: 429 twice", _faults(Fault("status", "file_stream", 2, status=429)), True),
    Case("rows: reset twice", _faults(Fault("reset", "file_stream", 2)), True),
    Case("rows: answer lost", _faults(Fault("drop", "file_stream", 2)), True),
    Case("rows: 500", _faults(Fault("status", "file_stream")), False),
    Case("rows: 404", _faults(Fault("status", "file_stream", status=404)), False),
    Case("rows: stall", _faults(Fault("stall", "file_stream")), False),
    Case("artifact: 500 for ever", _faults(Fault("status", "CreateArtifact")), False),
    Case("everything: 500", _faults(Fault("status")), False),
    Case("everything: stall", _faults(Fault("stall")), False),
    Case("everything: reset once open", _refuse_after_start, False),
    Case("refused", WandbServer.refuse, False, "does not answer (Connection refused); the result"),
    Case("bad key", _other_key, False, "invalid API key"),
    Case("no such entity", lambda server: server.state.entities.clear(), False),
]


@dataclass
class Played:
    """The observations of a case."""

    code: int
    log: str
    server: WandbServer
    seconds: float
    mirrored: bool
    later: int  # exit code of the pod that comes after W&B was mended
    mirrored_later: bool


def _play(case: Case, workers: Workers) -> Played:
    with wandb_server() as server:
        case.prepare(server)
        environ = {"WANDB_BASE_URL": server.url}
        limit = "20" if case.is_mirrored else "4"
        limits = {"WANDB_INIT_TIMEOUT": limit, "WANDB_FINISH_TIMEOUT": limit}
        started = time.monotonic()
        attempt = workers.start(case.name, environ=environ | limits, num_trials=1)
        code = attempt.wait(120)
        seconds = time.monotonic() - started
        mirrored = workers.document(case.name, "slots/0000/mirror.json") is not None
        if mirrored:
            return Played(code, attempt.log, server, seconds, True, 0, True)
        _mend(server)
        later = workers.start(case.name, environ=environ, num_trials=1).wait(90)
        found = workers.document(case.name, "slots/0000/mirror.json") is not None
        return Played(code, attempt.log, server, seconds, False, later, found)


def _mend(server: WandbServer) -> None:
    server.faults.clear()
    server.on_request = lambda request: None
    server.state.api_keys.clear()
    server.state.entities[:] = ["team"]
    server.listen_again()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    with wandb_server() as server:
        yield Workers(server, tmp_path_factory.mktemp("mirror"))


@pytest.fixture(scope="module")
def played(workers: Workers) -> dict[str, Played]:
    """Play every case, `AT_ONCE` at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {case.name: pool.submit(_play, case, workers) for case in CASES}
        return {name: future.result() for name, future in futures.items()}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_failing_w_and_b_costs_no_trial_and_is_made_up_for_later(
    played: dict[str, Played], workers: Workers, case: Case
) -> None:
    seen = played[case.name]
    assert seen.code == 0, seen.log
    result = workers.document(case.name, "slots/0000/result.json")
    assert result is not None
    assert result["status"] == "completed"
    assert seen.mirrored == case.is_mirrored, seen.log
    assert case.warns in seen.log
    assert (seen.later, seen.mirrored_later) == (0, True)
    (run,) = seen.server.state.runs.values()
    assert run.name == result["wandb_run_id"]
    assert run.steps == STEPS, "no hole, no step twice"
    assert (run.state, run.summary["eval/loss"]) == ("finished", result["eval_loss"])
    (artifact,) = seen.server.state.artifacts
    assert artifact["state"] == "COMMITTED"


def test_the_table_of_cases(played: dict[str, Played], capsys: pytest.CaptureFixture[str]) -> None:
    titles = ("W&B's fault", "exit", "seconds", "faults", "mirrored", "by the next pod")
    rows = ["  {:28} {:4} {:>7} {:>6} {:8} {}".format(*titles)]
    for name, seen in played.items():
        now, later = "yes" if seen.mirrored else "no", "yes" if seen.mirrored_later else "no"
        injected = len(seen.server.injected)
        rows.append(f"  {name:28} {seen.code:4} {seen.seconds:7.1f} {injected:6} {now:8} {later}")
    with capsys.disabled():
        print("\n" + "\n".join(rows))


def test_what_a_run_shows(played: dict[str, Played], workers: Workers) -> None:
    (run,) = played["none"].server.state.runs.values()
    spec = workers.document("none", "slots/0000/spec.json")
    result = workers.document("none", "slots/0000/result.json")
    assert spec is not None
    assert result is not None
    assert run.params["learning_rate"] == spec["params"]["learning_rate"]
    assert (run.params["slot"], run.params["lora_r"]) == (0, 8)
    assert (run.group, run.sweep, run.display_name) == ("s", None, "s-0000")
    assert set(run.rows[0]) >= {"train/loss", "learning_rate", "tokens_per_second"}
    curve = [[row["_step"], row["eval/loss"]] for row in run.rows if "eval/loss" in row]
    assert curve == result["curve"]
    assert (run.summary["status"], run.summary["best_step"]) == ("completed", result["best_step"])


def test_a_refused_run_id_gives_another_run_of_the_group(workers: Workers) -> None:
    """W&B never gives the id of a deleted run again."""
    with wandb_server() as server:
        server.state.deleted.append("*")
        attempt = workers.start("deleted", environ={"WANDB_BASE_URL": server.url}, num_trials=1)
        assert attempt.wait() == 0
        (run,) = server.state.runs.values()
        result = workers.document("deleted", "slots/0000/result.json")
        assert result is not None
        assert run.tags == [f"resumed_from:{result['wandb_run_id']}"]
        assert (run.group, run.steps, run.state) == ("s", STEPS, "finished")


def test_a_run_that_could_not_be_opened_is_opened_again(workers: Workers) -> None:
    """wandb's service would say "run ID is in use" of a run whose opening it gave up."""
    with wandb_server() as server:
        server.faults.append(Fault("stall", times=1))
        environ = {"WANDB_BASE_URL": server.url, "WANDB_INIT_TIMEOUT": "3"}
        attempt = workers.start(  # trains for over a second, in which the run is tried to be opened
            "stalled once", environ=environ, num_trials=1, max_steps=400, num_epochs=100,
            checkpoint_minutes=5,
        )  # fmt: skip
        assert attempt.wait() == 0, attempt.log
        assert workers.document("stalled once", "slots/0000/mirror.json"), attempt.log
        (run,) = server.state.runs.values()
        assert (run.steps, run.state) == (list(range(1, 401)), "finished")


def test_a_stalled_w_and_b_does_not_hold_up_a_sigterm(workers: Workers) -> None:
    with wandb_server() as server:
        server.faults.append(Fault("stall"))
        attempt = workers.start(
            "stalled", environ={"WANDB_BASE_URL": server.url}, max_steps=LONG, num_trials=1
        )
        eventually(lambda: "checkpoint at" in attempt.log)
        started = time.monotonic()
        attempt.send(signal.SIGTERM)
        assert attempt.wait() == 75, attempt.log
        assert time.monotonic() - started < 4


def test_without_a_key_nothing_is_imported_and_nobody_called(workers: Workers) -> None:
    with wandb_server() as server:
        environ = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "", "FORBID_WANDB": "1"}
        attempt = workers.start("no key", environ=environ, num_trials=1)
        assert attempt.wait() == 0, attempt.log
        assert server.requests == []


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_w_and_b_offline_or_disabled_calls_nobody(workers: Workers, mode: str) -> None:
    with wandb_server() as server:
        environ = {"WANDB_BASE_URL": server.url, "WANDB_MODE": mode, "FORBID_WANDB": "1"}
        attempt = workers.start(mode, environ=environ, num_trials=1)
        assert attempt.wait() == 0, attempt.log
        assert server.requests == []


SECRETS = {
    "HF_TOKEN": "hf_plantedplantedplanted",
    "AWS_SECRET_ACCESS_KEY": "plantedAwsSecretKey",
    "AWS_ENDPOINT_URL_S3": "http://someone:plantedPassword@storage.example.org",
    "HF_ENDPOINT": "https://hub.example.org/?X-Amz-Signature=plantedSignature",
    "HTTP_PROXY_HINT": "http://me:plantedProxyPassword@proxy.example.org",
}


def test_no_secret_reaches_the_server(workers: Workers, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    url = "https://me:plantedGitPassword@git.example.org/a.git"
    for command in (["git", "init", "-q"], ["git", "remote", "add", "origin", url]):
        subprocess.run(command, cwd=repository, check=True)
    (repository / "code.py").write_text("SECRET = 'plantedCode'\n")
    with wandb_server() as server:
        environ = {"WANDB_BASE_URL": server.url, "CHANGE_FOLDER": str(repository), **SECRETS}
        attempt = workers.start("secrets", environ=environ, num_trials=1, wandb_artifact="upload")
        assert attempt.wait() == 0, attempt.log
        planted = [secret.encode() for secret in (*SECRETS.values(), "0123456789abcdef" * 2)]
        assert len(server.requests) > 10
        for request in server.requests:
            headers = {k: v for k, v in request.headers.items() if k != "Authorization"}
            sent = b"\n".join([request.body, request.path.encode(), str(headers).encode()])
            assert b"planted" not in sent, (request.name, sent[:500])
            assert not any(secret in sent for secret in planted)
            if request.name == "UpsertBucket":
                variables = json.loads(request.body)["variables"]
                assert not any(variables.get(name) for name in ("host", "commit", "repo"))
                assert variables.get("program") in (None, "", "job")
        assert any(path.endswith("adapter_model.safetensors") for path in server.state.uploads)
