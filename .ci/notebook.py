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
        kept: list[nbformat.NotebookNode] = []
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("text/html", None)
            if "text" in output:
                output["text"] = _plain(output["text"], folder)
                if kept and kept[-1].get("name") == output.get("name"):  # one stream in pieces
                    kept[-1]["text"] += output["text"]
                    continue
            kept.append(output)
        if "outputs" in cell:
            cell["outputs"] = kept


def _plain(text: str, folder: Path) -> str:
    """A terminal's text without colours, bars and this machine's paths."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.replace("\r\n", "\n"))
    text = re.sub(r"[^\n]*\r| +$", "", text, flags=re.MULTILINE)
    for own, name in ((folder, "/content"), (ROOT, "/job")):
        text = text.replace(str(own), name)
    return re.sub(r"sha256:[0-9a-f]{12}\w*", "sha256:0123456789ab", text)


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
