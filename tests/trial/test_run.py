"""Whole trials as a user runs them, in real processes. `pytest tests/trial/test_run.py`"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.ledger.records import RowLosses
from tests import forked
from tests.tiny_model import make_base
from tests.tiny_tokenizer import byte_level_tokenizer

pytestmark = pytest.mark.slow

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_base(tmp_path_factory.mktemp("base"), vocab_size=600)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    sums = [{"question": f"What is {a} plus {b}?", "answer": f"It is {a + b}."}
            for a in range(15) for b in range(15)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in sums))
    return path


@pytest.fixture
def job(tmp_path: Path, base: Path, rows: Path) -> Run:
    """Run `python -m job VERB` with small settings; keyword arguments override them."""
    forked.with_torch()

    def run(*verb: str, **settings: str | Path) -> subprocess.CompletedProcess[str]:
        environ = {
            "PATH": os.environ["PATH"],
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "JOB_BASE_MODEL": base,
            "JOB_DATASET_URI": rows,
            "JOB_OUTPUT_URI": tmp_path / "out",
            "JOB_WORK_DIR": tmp_path / "work",
            "JOB_DEVICE": "cpu",
            "JOB_USE_FULL_DATASET": "1",
            "JOB_MAX_STEPS": "4",
            "JOB_EVALS_PER_TRIAL": "2",
            "JOB_EVAL_ROWS": "16",
            "JOB_NUM_TRIALS": "2",
        } | settings
        return forked.run(
            [sys.executable, "-m", "job", *verb],
            env={name: str(value) for name, value in environ.items()},
            timeout=300,
            cwd=Path(__file__).parents[2],
        )

    return run


def _read(folder: Path, name: str) -> dict[str, Any]:
    (path,) = folder.glob(f"sweeps/*/slots/{name}")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_trial_commits_once_and_says_so(job: Run, tmp_path: Path) -> None:
    first = job()
    assert first.returncode == 0, first.stderr
    assert "exit 0 (ok): slot 0 committed: completed" in first.stderr
    result = _read(tmp_path / "out", "0000/result.json")
    assert result["status"] == "completed"
    assert result["steps"] == 4
    assert [step for step, _ in result["curve"]] == [0, 2, 4]
    assert result["eval_loss"] == min(loss for step, loss in result["curve"] if step)
    rows = (tmp_path / "out" / result["rows_key"]).read_bytes()
    assert result["rows_key"].endswith(f"/rows-{hashlib.sha256(rows).hexdigest()}.json")
    by_row = RowLosses.model_validate_json(rows)
    assert by_row.step == result["best_step"]
    assert by_row.loss == pytest.approx(result["eval_loss"], rel=1e-12)
    adapter = tmp_path / "out" / result["adapter_key"]
    assert {p.name for p in adapter.iterdir()} >= {
        "adapter_model.safetensors", "adapter_config.json", "manifest.json",
    }  # fmt: skip
    assert not list((tmp_path / "work").glob("attempt-*")), "the work folder is left clean"
    in_4, in_16 = result["curve"][0][1], result["untuned_16bit"]
    assert result["phase_seconds"]["untuned_16bit"] > 0
    price = (
        f"4 bits cost the untuned base {round(in_4 - in_16, 3) + 0.0:.3f} nats"
        " on these 16 rows"
        f" ({in_4:.3f} against {in_16:.3f})"
    )
    assert price in (adapter / "README.md").read_text()

    before = _files(tmp_path / "out")
    again = job(JOB_COMPLETION_INDEX="0")
    assert again.returncode == 0
    assert "slot 0: committed before, nothing to do" in again.stderr
    assert _files(tmp_path / "out") == before, "the second run changes nothing"

    assert job().returncode == 0  # the first open slot: 1
    second = _read(tmp_path / "out", "0001/result.json")
    assert second["curve"][0][0] == 2, "the untuned model is measured once a sweep"
    assert second["untuned_16bit"] is None
    assert price in (tmp_path / "out" / second["adapter_key"] / "README.md").read_text()
    done = job()
    assert done.returncode == 0
    assert "all 2 slots: committed before, nothing to do" in done.stderr
    status = job("status")
    assert status.returncode == 0, status.stderr
    assert status.stdout.count("completed") == 2
    assert price in status.stdout
    assert f"best: slot {int(second['eval_loss'] < result['eval_loss'])}" in status.stdout


def test_a_sweep_may_search_the_bases_precision(job: Run, tmp_path: Path) -> None:
    """Each is loaded when it is drawn, and the untrained base is measured in each."""
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        "method: grid\nname: s\nmetric: {name: eval/loss, goal: minimize}\n"
        "parameters: {quantization: {values: [none, mixed, nf4]}}\n"
    )
    done = job("queue", JOB_SWEEP_FILE=sweep, JOB_NUM_TRIALS="3")
    assert done.returncode == 0, done.stderr
    chosen = "mixed:v_proj,k_proj,o_proj,q_proj,down_proj"
    out, expected = tmp_path / "out", ["none", chosen, "nf4"]
    results = [_read(out, f"{number:04d}/result.json") for number in range(3)]
    specs = [_read(out, f"{number:04d}/spec.json") for number in range(3)]
    assert [spec["recipe"]["quantization"] for spec in specs] == expected
    assert [result["quantization"] for result in results] == expected
    assert specs[1]["params"] == {"quantization": "mixed"}
    identity = json.loads((out / "sweeps/s/sweep.json").read_text())
    assert identity["_mixed"] == chosen
    untrained = [dict(result["curve"])[0] for result in results]
    assert len(set(untrained)) == 3, "each precision has a price of its own"
    assert not any(result["untuned_16bit"] for result in results), "slot 0 has measured it anyway"
    assert "in 16 bits loaded" in done.stderr
    card = (out / results[0]["adapter_key"] / "README.md").read_text()
    assert "the\nbase in 16 bits." in card
    assert "qlora\n" not in card.partition("---\n#")[0]
    merged = job("best", "--merge", str(tmp_path / "merged"), JOB_SWEEP_FILE=sweep)
    assert merged.returncode == 0, merged.stderr


def test_another_machine_picks_the_same_rows_parameters_and_losses(
    job: Run, tmp_path: Path, rows: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(rows, elsewhere / "rows.jsonl")
    assert job().returncode == 0
    other = job(
        JOB_DATASET_URI=elsewhere / "rows.jsonl",
        JOB_OUTPUT_URI=elsewhere / "out",
        JOB_WORK_DIR=elsewhere / "work",
    )
    assert other.returncode == 0, other.stderr
    mine, theirs = (
        [_read(out, f"0000/{name}.json") for name in ("spec", "result")]
        for out in (tmp_path / "out", elsewhere / "out")
    )
    for key in ("params", "recipe", "data_digest"):
        assert mine[0][key] == theirs[0][key]
    assert mine[1]["curve"] == theirs[1]["curve"]
    assert mine[1]["adapter_sha256"] == theirs[1]["adapter_sha256"]


def test_a_spec_left_by_a_dead_attempt_is_kept(job: Run, tmp_path: Path) -> None:
    killed = job(JOB_MAX_ADAPTER_MB="200", JOB_BASE_MODEL=tmp_path / "absent")
    assert killed.returncode == 64
    assert job().returncode == 0
    spec = _read(tmp_path / "out", "0000/spec.json")
    next((tmp_path / "out").glob("sweeps/*/slots/0000/result.json")).unlink()
    assert job().returncode == 0
    assert _read(tmp_path / "out", "0000/spec.json") == spec


def test_other_settings_in_a_running_sweep_are_named_old_to_new(job: Run, tmp_path: Path) -> None:
    assert job().returncode == 0
    before = _files(tmp_path / "out")
    changed = job(JOB_MAX_STEPS="5", JOB_SEED="1", JOB_NUM_TRIALS="7")
    assert changed.returncode == 64
    last = changed.stderr.splitlines()[-1]
    assert "exit 64 (settings): sweep card was started with other settings" in last
    assert "JOB_MAX_STEPS: 4 -> 5" in last
    assert "JOB_SEED: 17 -> 1" in last
    assert "JOB_NUM_TRIALS" not in changed.stderr, "more trials are free to ask for"
    assert "loaded in" not in changed.stderr, "no base is loaded for it"
    after = {k: v for k, v in _files(tmp_path / "out").items() if not k.startswith("prepared/")}
    assert after == {k: v for k, v in before.items() if not k.startswith("prepared/")}


def test_an_infeasible_trial_commits_without_training(job: Run, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        "method: grid\nname: s\nmetric: {name: eval/loss, goal: minimize}\n"
        "parameters: {lora_r: {values: [64, 1]}}\n"
    )
    done = job(JOB_SWEEP_FILE=sweep, JOB_MAX_ADAPTER_MB="0.1")
    assert done.returncode == 0, done.stderr
    result = _read(tmp_path / "out", "0000/result.json")
    assert (result["status"], result["eval_loss"], result["adapter_key"]) == (
        "infeasible", None, None,
    )  # fmt: skip
    assert "lower lora_r or raise JOB_MAX_ADAPTER_MB" in done.stderr


def test_a_rank_that_no_trial_could_upload_is_refused_before_the_base_is_loaded(
    job: Run, tmp_path: Path
) -> None:
    done = job(JOB_LORA_R="64", JOB_MAX_ADAPTER_MB="0.1")
    assert done.returncode == 64, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "exit 64 (settings): JOB_MAX_ADAPTER_MB: the adapter of JOB_LORA_R (64) would be" in last
    assert "loaded in" not in done.stderr
    assert not (tmp_path / "out/sweeps").exists(), "no slot is taken and nothing is frozen"


HALF = "".join(
    json.dumps({"question": f"Say {i}", "answer": "" if i % 2 else "Yes."}) + "\n"
    for i in range(200)
)
SWEEP = "name: s\nmethod: random\nmetric: {name: eval/loss, goal: minimize}\nparameters:\n"
BAD_INPUT: list[tuple[str, str, str | bytes | None, int, str]] = [
    ("absent rows", "JOB_DATASET_URI", None, 65, "JOB_DATASET_URI"),
    ("empty rows", "JOB_DATASET_URI", "", 65, "empty"),
    ("half without an answer", "JOB_DATASET_URI", HALF, 65, "empty answer"),
    ("binary junk", "JOB_DATASET_URI", bytes(range(256)) * 40, 65, "JOB_DATASET_URI"),
    ("misspelt key", "JOB_SWEEP_FILE", SWEEP + "  learning_rte: {value: 1}\n", 64, "learning_rate"),
    ("min above max", "JOB_SWEEP_FILE", SWEEP + "  learning_rate: {min: 0.1, max: 0.01}\n", 64,
     "learning_rate"),
    ("string for a number", "JOB_SWEEP_FILE",
     SWEEP + "  learning_rate: {min: 5e-6, max: 2e-4}\n", 64, "5.0e-6"),
    ("absent sweep file", "JOB_SWEEP_FILE", None, 64, "JOB_SWEEP_FILE"),
    ("output through a file", "JOB_OUTPUT_URI", "x", 64, "JOB_OUTPUT_URI"),
    ("work folder through a file", "JOB_WORK_DIR", "x", 64, "JOB_WORK_DIR"),
    ("model that is a file", "JOB_BASE_MODEL", "x", 64, "JOB_BASE_MODEL"),
    ("absent model", "JOB_BASE_MODEL", None, 64, "JOB_BASE_MODEL"),
    ("bucket without a name", "JOB_OUTPUT_URI", "s3://", 64, "JOB_OUTPUT_URI"),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT, ids=[case[0] for case in BAD_INPUT])
def test_bad_input_ends_in_one_clear_line_and_leaves_nothing(
    job: Run, tmp_path: Path, case: tuple[str, str, str | bytes | None, int, str]
) -> None:
    _, variable, content, code, says = case
    path = tmp_path / ("bad.jsonl" if variable == "JOB_DATASET_URI" else "bad")
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    if content == "s3://":  # as from s3://$BUCKET with an empty variable
        done = job(**{variable: content})
        assert done.returncode == code
        assert says in done.stderr
        return
    done = job(**{variable: path})
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    last_words = done.stderr[done.stderr.index("exit ") :]
    assert f"exit {code} (" in done.stderr
    assert says in last_words
    assert path.name in last_words, "the line says where"
    assert not list((tmp_path / "out").glob("sweeps/**/*.json")), "no slot is opened"
    assert not list(tmp_path.rglob(".tmp-*")), "nothing is left half-written"


def test_a_base_cut_off_in_mid_download_leaves_the_sweep_unmarked(
    job: Run, tmp_path: Path, base: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    os.truncate(broken / "model.safetensors", 100_000)
    done = job(JOB_BASE_MODEL=broken)
    assert done.returncode == 64
    assert "JOB_BASE_MODEL" in done.stderr
    assert not list((tmp_path / "out").glob("sweeps/**/*.json")), "nothing is frozen"


def test_rows_changed_in_mid_sweep_are_refused(job: Run, tmp_path: Path, rows: Path) -> None:
    changed = tmp_path / "rows.jsonl"
    shutil.copy(rows, changed)
    assert job(JOB_DATASET_URI=changed).returncode == 0
    changed.write_text(changed.read_text() + '{"question": "One more?", "answer": "Yes."}\n')
    done = job(JOB_DATASET_URI=changed)
    assert done.returncode == 64
    assert "JOB_DATASET_URI.prepared:" in done.stderr


def test_status_shows_a_damaged_slot_beside_the_others(job: Run, tmp_path: Path) -> None:
    assert job(JOB_COMPLETION_INDEX="0").returncode == 0
    (tmp_path / "out/sweeps/card/slots/0001").mkdir()
    (tmp_path / "out/sweeps/card/slots/0001/result.json").write_text('{"status": "completed"}')
    done = job("status")
    assert done.returncode == 0, done.stderr
    assert "damaged" in done.stdout
    assert "best: slot 0" in done.stdout
    assert job(JOB_COMPLETION_INDEX="1").returncode == 69


def test_an_adapter_without_its_spec_is_never_trained_over(job: Run, tmp_path: Path) -> None:
    assert job(JOB_COMPLETION_INDEX="0").returncode == 0
    slots = tmp_path / "out/sweeps/card/slots"
    adapter = tmp_path / "out" / _read(tmp_path / "out", "0000/result.json")["adapter_key"]
    shutil.copytree(adapter, slots / "0001" / adapter.name)
    for _ in range(2):
        done = job(JOB_COMPLETION_INDEX="1")
        assert done.returncode == 69
        assert f"slot 1 is damaged: it has {adapter.name}" in done.stderr
    assert not (slots / "0001/spec.json").exists()
    assert job("redo", "1").returncode == 0
    assert job(JOB_COMPLETION_INDEX="1").returncode == 0
    assert (slots / "0001/redo-1/result.json").exists()
