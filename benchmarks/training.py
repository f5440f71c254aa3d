"""Our training against a padded `transformers.Trainer` and, if there is one, TRL's packing.

`make bench` (one CPU thread, a small model) and `make bench-gpu` (random weights in real shapes,
4-bit, fp16, memory capped to a T4's, no FlashAttention). Prints tables; asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pynvml
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.shapes import SHAPES, log_normal_rows, make_recipe, write_model
from job.process.gpu import CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACE
from job.training.batching import samples_of_step
from job.training.shape import model_shape

NOT_COUNTED = 2  # of a side's steps: the first are slow
# The job as it is; with the plan that the memory model takes, not timed against its rivals; with
# that plan and without deterministic kernels, which shows their price; and in other precisions.
NAMES = {
    "job": "job",
    "untimed": "job, plan not timed",
    "any kernels": "job, plan not timed, kernels not deterministic",
    "mixed": "job, attention in 16 bits",
    "none": "job, base in 16 bits",
    "trainer": "transformers.Trainer, padded",
    "trl": "TRL SFTTrainer, packing",
    "liger": "transformers.Trainer + Liger, pairs of like length",
    "unsloth": "Unsloth, padding-free",
}
PEERS = ("trl", "liger", "unsloth")  # each in an environment of its own


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", default="tiny", help=f"some of {','.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--gpu-memory-gb", type=float, default=None)
    parser.add_argument("--sides", default="", help=f"some of {','.join(NAMES)}; default: all")
    parser.add_argument("--trl-python", default="", help="a Python that has TRL (trl_peer.py)")
    parser.add_argument("--liger-python", default="", help="one with Liger (liger_peer.py)")
    parser.add_argument("--unsloth-python", default="", help="one with Unsloth (unsloth_peer.py)")
    parser.add_argument("--limit", type=float, default=1800, help="seconds that a side may take")
    parser.add_argument("--logs", type=Path, help="a folder for what each side writes on stderr")
    parser.add_argument("--models", type=Path, help="where models are kept, and found when again")
    arguments = parser.parse_args()
    console = Console(width=132, highlight=False)
    sustained = sustained_flops(torch.device(arguments.device))
    console.print(_machine(sustained, arguments))
    for name in arguments.shapes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            console.print(_shape_table(name, Path(folder) / name, arguments, sustained, console))


def _machine(sustained: float, arguments: argparse.Namespace) -> str:
    text = f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, torch"
    text += f" {torch.__version__}, "
    if arguments.device == "cpu":
        text += f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread"
    else:
        text += torch.cuda.get_device_name(0)
        cap = arguments.gpu_memory_gb
        text += f" capped to {cap} GiB" if cap else ""
    return f"{text}; large matrix products sustained at {sustained / 1e12:.3g} TFLOPS"


def sustained_flops(device: torch.device, size: int = 0, seconds: float = 3.0) -> float:
    """FLOP/s of matrix products over some seconds, fp16 on a GPU: hot, as in training."""
    on_gpu = device.type == "cuda"
    size = size or (8192 if on_gpu else 1024)
    dtype = torch.float16 if on_gpu else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def run(at_least: float) -> float:
        num_products, started = 0, time.monotonic()
        while time.monotonic() - started < at_least:
            for _ in range(8):
                torch.mm(a, b)
            if on_gpu:
                torch.cuda.synchronize()
            num_products += 8
        return num_products * 2 * size**3 / (time.monotonic() - started)

    run(seconds / 3)
    return run(seconds)


def _shape_table(
    name: str, folder: Path, arguments: argparse.Namespace, sustained: float, console: Console
) -> Table:
    # On the CPU without dropout, so that losses can be compared.
    dropout = 0.05 if arguments.device == "cuda" else 0.0
    recipe = make_recipe(arguments.steps, lora_dropout=dropout)
    table = log_normal_rows(recipe.samples_per_step * arguments.steps, SHAPES[name]["vocab_size"])
    _put_model(folder / "model", name, arguments.models)
    if arguments.device == "cuda":  # of this process, or the sides would plan with what it left
        torch.cuda.empty_cache()
    (folder / "recipe.json").write_text(json.dumps(recipe.to_json()))
    np.savez(
        folder / "rows.npz",
        input_ids=table.input_ids,
        is_target=table.is_target,
        offsets=table.offsets,
    )
    on_gpu = ["untimed", "any kernels"] if arguments.device == "cuda" else []
    sides = ["job", *on_gpu, "mixed", "none", "trainer"]
    sides += [peer for peer in PEERS if getattr(arguments, f"{peer}_python")]
    asked = arguments.sides.split(",") if arguments.sides else sides
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides if side in asked}
    steps = range(recipe.planned_steps)
    tokens = [int(table.lengths[samples_of_step(recipe, len(table), s)].sum()) for s in steps]
    for _ in range(arguments.rounds):  # in turn, so that a slow minute hits all
        for side, done in runs.items():
            done.append(_run(side, folder, arguments))
            console.print(f"  {name}, {NAMES[side]}: {_in_short(done[-1], tokens)}", soft_wrap=True)
    config = json.loads((folder / "model" / "config.json").read_text())
    return _show(name, runs, tokens, config, sustained)


def _put_model(folder: Path, name: str, kept: Path | None) -> None:
    """Write the shape's model, or link to the one that an earlier run wrote into `kept`."""
    if kept is None:
        write_model(folder, name)
        return
    if not (kept / name).exists():
        write_model(kept / f"{name}.part", name)
        (kept / f"{name}.part").rename(kept / name)
    folder.parent.mkdir()
    folder.symlink_to((kept / name).resolve())


def _in_short(result: dict[str, Any], our_tokens: list[int]) -> str:
    """A side's run in a line, which stays if a later side never ends."""
    if "failure" in result:
        return f"failed: {result['failure']}"
    text = f"{_rate(result, our_tokens):.0f} tokens/s, peak {result['peak_bytes'] / 1e6:.0f} MB"
    text += f", loss {result['losses'][-1]:.5f}, {result['wall_seconds']:.0f} s in all"
    return text + _median([result], "kernel_rate", ", {:.0f} tokens a kernel second")


def _run(side: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    options = [str(folder), "--device", arguments.device]
    if arguments.gpu_memory_gb:
        options += ["--gpu-memory-gb", str(arguments.gpu_memory_gb)]
    environ = dict(os.environ)
    if side in PEERS:
        # Not as a file: our wandb.py and data.py would stand in for packages that a peer imports.
        command = [getattr(arguments, f"{side}_python"), "-m", f"benchmarks.{side}_peer", *options]
        environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    else:
        command = [sys.executable, "-m", "benchmarks.training_side", side, *options]
        wanted = "" if side == "any kernels" else DETERMINISTIC_WORKSPACE
        environ[CUBLAS_WORKSPACE] = wanted or ":0:0"
    log = (arguments.logs or folder) / f"{folder.name}-{side.replace(' ', '-')}.log"
    began = time.monotonic()
    with BusyShare(arguments.device) as busy, log.open("a") as stderr:
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, check=True, env=environ,
                timeout=arguments.limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"failure": f"took more than {arguments.limit:.0f} s"}
        except subprocess.CalledProcessError as error:  # it may not fit the card: a result, too
            last_line = (log.read_text().strip() or str(error)).splitlines()[-1]
            return {"failure": last_line[:200]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result | {"busy": busy.share, "wall_seconds": time.monotonic() - began}


def _show(
    name: str,
    runs: dict[str, list[dict[str, Any]]],
    our_tokens: list[int],
    config: dict[str, Any],
    sustained: float,
) -> Table:
    shown = Table(
        title=f"{name}: {len(next(iter(runs.values())))} rounds in turn, real (non-padding) tokens",
        box=box.SIMPLE,
        title_justify="left",
        caption_justify="left",
    )
    columns = ["", "tokens/s", "lowest", "highest", "peak MB", f"loss, step {len(our_tokens)}"]
    for column in [*columns, "FLOP used", "busy", "a kernel s", "ratio"]:
        shown.add_column(column, justify="right" if column else "left")
    rates: dict[str, list[float]] = {}
    notes = []
    for side, results in runs.items():
        if failure := next((r["failure"] for r in results if "failure" in r), None):
            shown.add_row(NAMES[side], "failed")
            notes.append(f"{NAMES[side]}: {failure}")
            continue
        rates[side] = [_rate(result, our_tokens) for result in results]
        peak = max(result["peak_bytes"] for result in results)
        median = statistics.median(rates[side])
        shown.add_row(
            NAMES[side],
            f"{median:.0f}",
            f"{min(rates[side]):.0f}",
            f"{max(rates[side]):.0f}",
            f"{peak / 1e6:.0f}{_predicted(results[0])}",
            f"{results[0]['losses'][-1]:.5f}",
            f"{median * _flops_of_a_token(config) / sustained:.0%}",
            _median(results, "busy", "{:.0%}"),
            _median(results, "kernel_rate", "{:.0f}"),
            _ratio(rates, side),
        )
        notes.append(f"{NAMES[side]}: {results[0]['plan']}")
    if price := _ratio(rates, "any kernels", of="untimed"):
        notes.append(f"with deterministic kernels {price} of the rate without, on the same plan")
    shown.caption = "\n".join(notes)
    return shown


class BusyShare:
    """The mean share of time that the card was busy, asked of its driver four times a second.

    It counts the side's whole process, its loading too.
    """

    def __init__(self, device: str) -> None:
        self.share: float | None = None
        self._on_gpu = device == "cuda"
        self._ended = threading.Event()
        self._seen: list[int] = []

    def __enter__(self) -> BusyShare:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self._on_gpu:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._on_gpu:
            self._thread.join(timeout=5)
            self.share = statistics.mean(self._seen) / 100 if self._seen else None

    def _watch(self) -> None:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        while not self._ended.wait(0.25):
            self._seen.append(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)


def _median(results: list[dict[str, Any]], key: str, form: str) -> str:
    """A figure that only some sides have, and only on a GPU."""
    found = [result[key] for result in results if result.get(key) is not None]
    return form.format(statistics.median(found)) if found else ""


def _ratio(rates: dict[str, list[float]], side: str, of: str = "job") -> str:
    """How many times one side's rate another's is, round by round; nothing if one has none."""
    if of not in rates or side not in rates:
        return ""
    pairs = zip(rates[of], rates[side], strict=True)
    return f"{statistics.median(ours / theirs for ours, theirs in pairs):.2f}"


def _rate(result: dict[str, Any], our_tokens: list[int]) -> float:
    tokens = result.get("tokens", our_tokens)
    return float(sum(tokens[NOT_COUNTED:]) / sum(result["seconds"][NOT_COUNTED:]))


def _predicted(result: dict[str, Any]) -> str:
    predicted = result["predicted_bytes"]
    return f" (predicted {predicted / 1e6:.0f})" if predicted else ""


def _flops_of_a_token(config: dict[str, Any]) -> float:
    """Model FLOP: forward and back through frozen weights; nothing recomputed, head included."""
    if (shape := model_shape(config)) is None:
        raise ValueError(f"no FLOP count for {config['model_type']}")
    return 4.0 * (shape.linear_weights + shape.vocabulary * shape.hidden / 2)  # half are targets


if __name__ == "__main__":
    main()
