"""`make demo`: the whole job on a laptop, without GPU, account or bucket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from rich.console import Console

from job.demo.answers import generate_answers, pick_questions
from job.demo.docstrings import write_rows
from job.demo.generated_base import BaseInfo, ensure_base
from job.demo.pretraining import PretrainingPlan
from job.errors import SettingsError
from job.ledger.ledger import Ledger
from job.progress import StepProgress
from job.store.local import LocalStore

DEMO_DIR = Path(".demo")
SWEEP_FILE = Path(__file__).parent / "sweep.yaml"
NUM_TRIALS = 3
NUM_SAMPLES = 2

# The card's settings, scaled to a model of 2 M parameters and to seconds.
SETTINGS = {
    "JOB_DEVICE": "cpu",
    "JOB_SUBSAMPLE_FRACTION": "0.35",
    "JOB_MAX_SEQ_LENGTH": "256",
    "JOB_MAX_STEPS": "90",
    "JOB_EVALS_PER_TRIAL": "3",
    "JOB_EVAL_ROWS": "96",
    # On two cores that something else uses too, two threads take up to ten times longer.
    "OMP_NUM_THREADS": "1",
    "JOB_NUM_TRIALS": str(NUM_TRIALS),
}


def run_demo(plan: PretrainingPlan | None = None) -> int:
    """Generate rows and base, run the sweep, show what came of it; the exit code of the queue.

    Everything lies in `.demo`; the base is pre-trained once, by `plan` if given, and found there
    afterwards. Settings in the environment win over the demo's own (`JOB_NUM_TRIALS=6 make demo`).
    """
    started = time.monotonic()
    num_trials = _num_trials()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    demo_dir = DEMO_DIR.absolute()
    console.print("[bold]1/5[/] rows from the docstrings of Python's own standard library")
    rows = write_rows(demo_dir / "rows.jsonl")
    console.print(f"    {rows.num_rows} questions and answers in {demo_dir / 'rows.jsonl'}")

    console.print("[bold]2/5[/] a base model of 2 M parameters, pre-trained on plain text")
    base = _base(demo_dir, plan)
    console.print(
        f"    held-out loss {base.held_out_loss_before:.2f} before, {base.held_out_loss_after:.2f}"
        f" after {base.steps} steps ({'cached' if base.was_cached else f'{base.seconds:.0f} s'})"
    )

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

    console.print("[bold]5/5[/] what came of it: job status, job report")
    _run_verb(environ, "status")
    _run_verb(environ, "report", "--output", str(demo_dir))
    _show(console, Ledger(LocalStore(demo_dir / "store"), sweep), num_trials, base, demo_dir)
    console.print(f"\n{time.monotonic() - started:.0f} s in all")
    return 0


def _num_trials() -> int:
    """The number of trials by `JOB_NUM_TRIALS`, checked before minutes are spent."""
    text = os.environ.get("JOB_NUM_TRIALS") or str(NUM_TRIALS)
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise SettingsError(f"JOB_NUM_TRIALS: is {text!r}; allowed: 1 to 100 in the demo")
    return int(text)


def _environ(demo_dir: Path, base: BaseInfo, sweep: str, num_trials: int) -> dict[str, str]:
    return SETTINGS | dict(os.environ) | {
        "JOB_BASE_MODEL": str(base.model_dir),
        "JOB_DATASET_URI": str(demo_dir / "rows.jsonl"),
        "JOB_OUTPUT_URI": str(demo_dir / "store"),
        "JOB_WORK_DIR": str(demo_dir / "work"),
        "JOB_SWEEP_FILE": str(SWEEP_FILE),
        "JOB_SWEEP_NAME": sweep,
        "JOB_NUM_TRIALS": str(num_trials),
    }  # fmt: skip


def _run_verb(environ: dict[str, str], *words: str) -> int:
    """Run the job; Ctrl-C reaches a queue as well, which saves its state while we wait."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        command = [sys.executable, "-m", "job", *words]
        return subprocess.run(command, env=environ, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)


def _base(demo_dir: Path, plan: PretrainingPlan | None) -> BaseInfo:
    with StepProgress("    pre-training", 0) as progress:

        def on_progress(step: int, total: int, loss: float) -> None:
            progress.update(step, f"loss {loss:.2f}", total=total)

        return ensure_base(demo_dir, on_progress=on_progress, plan=plan)


def _show(
    console: Console, ledger: Ledger, num_trials: int, base: BaseInfo, demo_dir: Path
) -> None:
    """Print the untuned loss, the best adapter, and a few answers before and after."""
    results = [result for _, _, result in ledger.committed(num_trials)]
    judged = [(r.eval_loss, r.adapter_key) for r in results if r.eval_loss and r.adapter_key]
    untuned = [loss for r in results for step, loss in r.finite_curve[:1] if step == 0]
    if not judged or not untuned:
        console.print("no trial has an adapter: see the lines above")
        return
    best, adapter_key = min(judged)
    change = 1 - best / untuned[0]
    adapter_dir = Path(ledger.store.uri) / adapter_key
    console.print(f"eval/loss untuned {untuned[0]:.4f}, best {best:.4f} (-{change:.0%})")
    console.print(f"adapter: {adapter_dir}\n", soft_wrap=True)
    questions = pick_questions(demo_dir / "rows.jsonl", NUM_SAMPLES, seed=17)
    before = generate_answers(base.model_dir, None, questions)
    after = generate_answers(base.model_dir, adapter_dir, questions)
    for question, plain, tuned in zip(questions, before, after, strict=True):
        console.print(f"[bold]{question}[/]", soft_wrap=True)
        console.print(f"  [dim]before:[/] {plain!r}", soft_wrap=True, markup=True)
        console.print(f"  [dim]after:[/]  {tuned!r}", soft_wrap=True, markup=True)
    console.print("What is learned is the form of the answers, not knowledge.")
