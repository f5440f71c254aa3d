"""Executes docs/notebooks/worker.ipynb on the CPU and keeps what it printed: `make notebook`.

The store is a folder; base, rows and the size of a trial are those of `make demo`.
"""

from __future__ import annotations

import os
import re
import tempfile
from datetime import datetime
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from job.demo.base import NAME, ensure_base
from job.demo.docstrings import write_rows
from job.demo.run import SETTINGS

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs/notebooks/worker.ipynb"
# What a free session would not set. Each worker has a thread of its own.
ON_CPU = {
    **{name: value for name, value in SETTINGS.items() if name != "OMP_NUM_THREADS"},
    "JOB_WORKERS": "2",
    "JOB_NUM_TRIALS": "2",
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


def _seconds(notebook: nbformat.NotebookNode) -> float:
    """The seconds from the start of the first cell to the end of the one that trains."""
    times = [cell.metadata.execution for cell in notebook.cells if cell.cell_type == "code"]
    began, ended = times[0]["iopub.execute_input"], times[3]["shell.execute_reply"]
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds()


def main() -> None:
    base = ensure_base((ROOT / ".demo").absolute())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / NAME).symlink_to(base)
        write_rows(folder / "rows.jsonl")
        notebook = execute(
            {
                "JOB_BASE_MODEL": str(folder / NAME),
                "JOB_DATASET_URI": str(folder / "rows.jsonl"),
                "JOB_OUTPUT_URI": str(folder / "store"),
                "JOB_WORK_DIR": str(folder / "work"),
            },
            folder,
        )
        seconds = _seconds(notebook)
        readable(notebook, folder)
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK.relative_to(ROOT)}: executed, its output is kept;")
    print(f"{seconds:.0f} s from its first cell to two committed trials")


if __name__ == "__main__":
    main()
