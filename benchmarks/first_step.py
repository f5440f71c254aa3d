"""The seconds from a trial's process to its first optimizer step, by phases, on a warm work folder.

`python -m benchmarks.first_step`: a random model in the shape of a 1B with a vocabulary of 128,000
tokens, trained on the Python sources of this machine. The first trial fills the work folder; the
table has the medians of the ones after it. Each is told to end at its first step: before it on a
CPU, where quantising 1B and a step of it say nothing of a GPU and 16 bits are loaded; after it with
`--device cuda`. Then what a bucket's answers add: the same with a folder that waits before each of
them, and training that is faked. Prints tables; asserts nothing.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.shapes import SHAPES, write_model
from job.demo.docstrings import write_rows
from job.ledger.uploads import Uploads
from job.process.stop import Stop
from job.process.watchdog import Watchdog
from job.settings import Settings
from job.store.base import Stored
from job.store.local import LocalStore
from job.trial.attempt import Attempt
from job.trial.run import run_trial_on
from tests.fake_training import FAKE_TRAINING
from tests.tiny_tokenizer import LLAMA3
from tests.workers import make_inputs

SOURCE_CHARACTERS = 60_000_000  # that the tokenizer is trained on
SPECIALS = ["<|begin|>", "<|end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
NUM_SPECIALS = 256  # as Llama 3 has
NUM_TRIALS = 12
ANSWER_SECONDS = 0.03
# A phase ends with the log's line that holds these words.
LINES = {
    "start: two processes, the sweep, torch": "device: ",
    "store probed, base, rows": "prepared in ",
    "libraries: transformers, PEFT, bitsandbytes": "libraries for training",
    "weights": " loaded in ",
    "slot, adapter": "memory: ",
}
FIRST_STEP = re.compile(r"step 1/\d+: loss")
LIMIT_SECONDS = 600
WITH_STEP = "warm-up, first step"
Phases = dict[str, tuple[float, float]]  # seconds of the clock and of CPU, in order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--rounds", type=int, default=5, help="on the warm folder")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--base", type=Path, help="a model's folder instead of a random model")
    parser.add_argument("--dir", help="where 2.5 GB are written")
    parser.add_argument("--store-alone", action="store_true", help="only what the store adds")
    arguments = parser.parse_args()
    console = Console(width=100, highlight=False)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        folder = Path(name)
        if not arguments.store_alone:
            write_rows(folder / "rows.jsonl")
            base = arguments.base or _write_base(folder / "base", arguments.shape)
            first, *later = [
                _run_trial(folder, base, arguments.device, slot)
                for slot in range(arguments.rounds + 1)
            ]
            console.print(_table(first, later))
        console.print(_of_the_store(folder / "slow"))
    gpu = f", {torch.cuda.get_device_name()}" if arguments.device == "cuda" else ""
    console.print(
        f"{time.strftime('%F')}, {platform.machine()}, {os.cpu_count()} cores, load"
        f" {os.getloadavg()[0]:.1f}{gpu}, Python {platform.python_version()}, torch"
        f" {torch.__version__}"
    )


def _write_base(folder: Path, shape: str) -> Path:
    """A random model, and a byte-level vocabulary like Llama 3's, trained on what lies around."""
    write_model(folder, shape)
    vocabulary = SHAPES[shape]["vocab_size"]
    num_specials = min(NUM_SPECIALS, vocabulary // 4)
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - num_specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokens.train_from_iterator(_sources(), trainer)
    extra = [*SPECIALS, *(f"<|{n}|>" for n in range(num_specials - len(SPECIALS)))]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        bos_token=extra[0],
        eos_token=extra[4],
        extra_special_tokens=extra[2:],
    )
    tokenizer.chat_template = LLAMA3
    tokenizer.save_pretrained(folder)
    return folder


def _sources() -> Iterator[str]:
    roots = [Path(sysconfig.get_path(name)) for name in ("purelib", "stdlib")]
    num_characters = 0
    for path in itertools.chain(*(sorted(root.rglob("*.py")) for root in roots)):
        text = path.read_text(encoding="utf-8", errors="ignore")
        yield text
        num_characters += len(text)
        if num_characters > SOURCE_CHARACTERS:
            return


def _run_trial(folder: Path, base: Path, device: str, slot: int) -> Phases:
    """Run a trial to its first step."""
    environ = {
        **os.environ,
        "JOB_DEVICE": device,
        "JOB_QUANTIZATION": "none" if device == "cpu" else "nf4",
        "JOB_BASE_MODEL": str(base),
        "JOB_DATASET_URI": str(folder / "rows.jsonl"),
        "JOB_OUTPUT_URI": str(folder / "store"),
        "JOB_WORK_DIR": str(folder / "work"),
        "JOB_COMPLETION_INDEX": str(slot),
        "JOB_NUM_TRIALS": str(max(NUM_TRIALS, slot + 1)),
        "JOB_SUBSAMPLE_FRACTION": "0.5",
    }
    last, last_cpu = time.monotonic(), 0.0
    trial = subprocess.Popen(
        [sys.executable, "-m", "job"], env=environ, stderr=subprocess.PIPE, text=True
    )
    phases: Phases = {}
    lines: list[str] = []
    for line in trial.stderr or ():
        lines.append(line)
        name = next((name for name, words in LINES.items() if words in line), None)
        if name is None and FIRST_STEP.search(line):
            name = WITH_STEP
        if name is not None and name not in phases:
            now, cpu = time.monotonic(), _cpu_seconds(trial.pid)
            phases[name] = (now - last, cpu - last_cpu)
            last, last_cpu = now, cpu
        if name == ("slot, adapter" if device == "cpu" else WITH_STEP):
            trial.send_signal(signal.SIGTERM)
    if trial.wait(LIMIT_SECONDS) != 75:
        raise SystemExit("".join(lines))
    return phases


def _cpu_seconds(pid: int) -> float:
    """The CPU seconds that a process and its children have used so far, by /proc."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ticks = 0
    for each in (str(pid), *children):
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _table(first: Phases, later: list[Phases]) -> Table:
    title = "From the process to the first optimizer step, seconds (CPU: of all threads)"
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    table.add_column("phase")
    for column in (
        "first",
        "CPU",
        f"next {len(later)}, median",
        "lowest",
        "highest",
        "CPU, median",
    ):
        table.add_column(column, justify="right")
    for trial in (first, *later):
        every = list(trial.values())
        rest = [trial[name] for name in trial if name != "weights"]
        for name, parts in (("all", every), ("all but the weights", rest)):
            trial[name] = (sum(part[0] for part in parts), sum(part[1] for part in parts))
    for name, of_first in first.items():
        seconds, cpu = zip(*(trial[name] for trial in later), strict=True)
        median = statistics.median
        shown = (*of_first, median(seconds), min(seconds), max(seconds), median(cpu))
        table.add_row(name, *(f"{value:.2f}" for value in shown))
    return table


class _SlowFolder(LocalStore):
    """A folder that answers each question for a document as late as a bucket does."""

    num_answers = 0

    def get(self, key: str) -> Stored | None:
        self._wait()
        return super().get(key)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._wait()
        return super().put_if_absent(key, data)

    def put_if_version(self, key: str, data: bytes, version: str) -> bool:
        self._wait()
        return super().put_if_version(key, data, version)

    def _wait(self) -> None:
        self.num_answers += 1
        time.sleep(ANSWER_SECONDS)


def _of_the_store(folder: Path) -> str:
    """How long each trial of a sweep takes to its training, and how often it asks the store."""
    given = make_inputs(folder) | {"num_trials": NUM_TRIALS, "lease_seconds": 60}
    seconds, answers = [], []
    for _ in range(NUM_TRIALS):
        store, stop, started = _SlowFolder(folder / "out"), Stop(8), time.monotonic()

        def fit(
            attempt: Attempt,
            uploads: Uploads,
            work_dir: Path,
            store: _SlowFolder = store,
            started: float = started,
        ) -> Any:
            seconds.append(time.monotonic() - started)
            answers.append(store.num_answers)
            return FAKE_TRAINING.fit(attempt, uploads, work_dir)

        training, watchdog = replace(FAKE_TRAINING, fit=fit), Watchdog(stop, lambda _reason: None)
        run_trial_on(store, Settings(**given), stop, training, watchdog)
    return (
        f"A sweep of {NUM_TRIALS} trials in a store that answers after {1000 * ANSWER_SECONDS:.0f}"
        f" ms: {statistics.median(seconds[1:]):.1f} s to a trial's training (lowest"
        f" {min(seconds[1:]):.1f}, highest {max(seconds[1:]):.1f}) and"
        f" {statistics.median(answers[1:]):.0f} answers, medians without the first"
    )


if __name__ == "__main__":
    main()
