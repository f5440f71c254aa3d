"""Executes docs/notebooks/worker.ipynb on the CPU and keeps what it printed: `make notebook`.

The store is a folder, the base and rows are those that `make demo` generated.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs/notebooks/worker.ipynb"
# What a free session would not set: the size of a trial for a CPU.
ON_CPU = {
    "JOB_DEVICE": "cpu",
    "JOB_WORKERS": "2",
    "JOB_NUM_TRIALS": "2",
    "JOB_MAX_SEQ_LENGTH": "256",
    "JOB_SUBSAMPLE_FRACTION": "0.35",
    "JOB_MAX_STEPS": "60",
    "JOB_EVALS_PER_TRIAL": "3",
    "JOB_EVAL_ROWS": "96",
    "PYTHONPATH": str(ROOT),
}


def execute(environ: dict[str, str], folder: Path) -> nbformat.NotebookNode:
    """Run every cell in `folder` with these variables; the first that fails raises."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute(env=dict(os.environ) | ON_CPU | environ)
    return notebook


def readable(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Leave out what differs from run to run for no reader's good; the report's page is large."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if "text" in output:
                text = re.sub(r"\x1b\[[0-9;]*m|.*\r", "", output["text"])
                output["text"] = text.replace(str(folder), "/content").replace(str(ROOT), "/job")
            output.get("data", {}).pop("text/html", None)


def main() -> None:
    demo = (ROOT / ".demo").absolute()
    base = next(iter(sorted(demo.glob("base*"))), None)
    if base is None or not (demo / "rows.jsonl").exists():
        sys.exit("no base model in .demo: run `make demo` first")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "base").symlink_to(base)
        (folder / "rows.jsonl").symlink_to(demo / "rows.jsonl")
        notebook = execute(
            {
                "JOB_BASE_MODEL": str(folder / "base"),
                "JOB_DATASET_URI": str(folder / "rows.jsonl"),
                "JOB_OUTPUT_URI": str(folder / "store"),
                "JOB_WORK_DIR": str(folder / "work"),
                "JOB_SWEEP_FILE": str(ROOT / "job/demo/sweep.yaml"),
            },
            folder,
        )
        readable(notebook, folder)
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK.relative_to(ROOT)}: executed, its output is kept")


if __name__ == "__main__":
    main()
