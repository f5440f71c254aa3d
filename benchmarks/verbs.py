"""CPU seconds of the verbs that look at a sweep, and seconds to the first line of `job plan`.

`python -m benchmarks.verbs`: a 20-slot sweep with every state in it, in a folder; each verb in a
process of its own, five times, medians. Results: benchmarks/verbs.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import every_state

ROUNDS = 5
# What each verb is given beside the words that name its row.
VERBS = {
    "--help": "", "status": "", "status --json": "", "report --output": "{folder}", "best": "",
    "gc --json --dry-run": "", "exclude --json": "1 --reason why", "redo --json": "1",
    "best --download": "{folder}/adapter-{number}",
}  # fmt: skip
PYTHON = (sys.executable, "-X", "importtime", "-m", "job")  # says on stderr what is imported


def main() -> None:
    """Make the sweep, time the verbs, print a table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        every_state.make_sweep(folder)
        environ = _environ(folder)
        print("| verb | CPU seconds, median of 5 | highest | imports torch |\n|---|---|---|---|")
        for verb, given in VERBS.items():
            runs = []
            for number in range(ROUNDS):
                further = [word.format(folder=name, number=number) for word in given.split()]
                runs.append(_run([*verb.split(), *further], environ))
            print(_row(verb, runs))
        seconds = statistics.median(_first_line(environ) for _ in range(ROUNDS))
        print(f"\n`job plan`: first line after {seconds:.2f} s (median of {ROUNDS})")


def _environ(folder: Path) -> dict[str, str]:
    (folder / "base/config.json").write_text(json.dumps({"model_type": "llama"}))
    return {
        **os.environ,
        "JOB_OUTPUT_URI": str(folder / "out"),
        "JOB_WORK_DIR": str(folder / "work"),
        "JOB_BASE_MODEL": str(folder / "base"),
        "JOB_DATASET_URI": str(folder / "rows.jsonl"),
        "JOB_SWEEP_NAME": "s",
        "JOB_NUM_TRIALS": "20",
    }


def _run(verb: list[str], environ: dict[str, str]) -> tuple[float, bool]:
    """CPU seconds of the process, and whether it imported torch."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*PYTHON, *verb], env=environ, capture_output=True, text=True, timeout=60, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, any(line.endswith("| torch") for line in done.stderr.splitlines())


def _row(verb: str, runs: list[tuple[float, bool]]) -> str:
    seconds = [cpu for cpu, _ in runs]
    torch = "yes" if any(imported for _, imported in runs) else "no"
    return f"| `{verb}` | {statistics.median(seconds):.2f} | {max(seconds):.2f} | {torch} |"


def _first_line(environ: dict[str, str]) -> float:
    """Seconds until `job plan` prints something."""
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "job", "plan"],
        env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        line = process.stdout.readline() if process.stdout else ""
        seconds = time.monotonic() - started
        process.kill()
    if not line.startswith("sweep"):
        raise SystemExit(f"job plan said {line!r}")
    return seconds


if __name__ == "__main__":
    main()
