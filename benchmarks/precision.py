"""What holding the base in 4 bits costs a real model, by the job's own command line.

`python -m benchmarks.precision ROWS BASE`: for each precision a sweep of one trial (`job queue`),
then its adapter merged into the base's 16-bit weights (`job best --merge`). Prints a Markdown row
each: the untuned base, the tuned one, and the same adapter on the base in 16 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODES = ("nf4", "mixed:down_proj", "mixed:q_proj,k_proj,v_proj,o_proj", "none")
SWEEP = """\
name: precision
method: grid
metric: {name: eval/loss, goal: minimize}
parameters: {learning_rate: {value: 2.0e-4}}
"""
SETTINGS = {
    "JOB_DEVICE": "cpu",
    "JOB_MAX_STEPS": "10",  # of 8 rows
    "JOB_EVALS_PER_TRIAL": "1",
    "JOB_EVAL_ROWS": "24",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", help="JOB_DATASET_URI")
    parser.add_argument("base", help="JOB_BASE_MODEL")
    parser.add_argument("--modes", nargs="+", default=MODES, help="of JOB_QUANTIZATION")
    options = parser.parse_args()
    print("| base while training | untuned | tuned, on that base | the adapter on 16 bits |")
    print("|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="precision-") as name:
        for number, mode in enumerate(options.modes):
            row = measure(mode, options.rows, options.base, Path(name) / str(number))
            losses = (row["untuned"], row["tuned"], row["on_16_bits"])
            print(f"| `{mode}` | " + " | ".join(f"{loss:.4f}" for loss in losses) + " |")
            for line in row["told"]:
                print(f"\n{line}\n", file=sys.stderr)
            sys.stdout.flush()


def measure(
    mode: str,
    rows: str,
    base: str,
    folder: Path,
    *,
    sweep: str = SWEEP,
    settings: Mapping[str, str] = SETTINGS,
) -> dict[str, Any]:
    """Run the sweep in a new folder; its three losses, and what `status` tells of the price."""
    folder.mkdir(parents=True)
    (folder / "sweep.yaml").write_text(sweep)
    environ = {
        **os.environ,
        **settings,
        "JOB_NUM_TRIALS": "1",
        "JOB_SWEEP_FILE": str(folder / "sweep.yaml"),
        "JOB_DATASET_URI": rows,
        "JOB_BASE_MODEL": base,
        "JOB_OUTPUT_URI": str(folder / "store"),
        "JOB_WORK_DIR": str(folder / "work"),
        "JOB_QUANTIZATION": mode,
    }

    def job(*words: str) -> str:
        command = [sys.executable, "-m", "job", *words]
        return subprocess.check_output(command, env=environ, text=True)

    job("queue")
    merge = json.loads(job("best", "--json", "--merge", str(folder / "merged"), "--onto", "16bit"))
    status = json.loads(job("status", "--json"))
    (slot,) = status["slots"]
    return {
        "untuned": dict(slot["curve"])[0],
        "tuned": slot["eval_loss"],
        "on_16_bits": merge["merge"]["merged_16bit"],
        "untuned_16bit": status["untuned"]["eval_loss"]["none"],
        "told": status["untuned"]["price_of_4_bits"],
    }


if __name__ == "__main__":
    main()
