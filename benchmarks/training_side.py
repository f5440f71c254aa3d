"""One side of `benchmarks.training` in a process of its own: prints its steps as JSON."""

from __future__ import annotations

import argparse
import json
import logging
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.trainer_peer import train_with_trainer
from job.data.samples import SampleTable
from job.ledger.records import Recipe
from job.training.batching import samples_of_step
from job.training.device import open_device, usable_memory_bytes
from job.training.memory import MemoryPlan, Samples, plan_memory
from job.training.model import add_adapters, load_base
from job.training.state import TrainState
from job.training.trainer import Trainer
from job.training.warmup import warm_up

PROFILED_STEPS = 2
# How the sides of the job hold the base that is not all in 4 bits.
QUANTIZATIONS = {"mixed": "mixed:q_proj,k_proj,v_proj,o_proj", "none": "none"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "side", choices=("job", *QUANTIZATIONS, "any kernels", "untimed", "trainer")
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--gpu-memory-gb", type=float)
    arguments = parser.parse_args()
    device = open_device(arguments.device, gpu_memory_gb=arguments.gpu_memory_gb)
    if device.type == "cuda":  # as on a T4, which has neither
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    recipe = Recipe.model_validate(json.loads((arguments.folder / "recipe.json").read_text()))
    rows = np.load(arguments.folder / "rows.npz")
    table = SampleTable(rows["input_ids"], rows["is_target"], rows["offsets"])
    config = json.loads((arguments.folder / "model" / "config.json").read_text())
    quantization = QUANTIZATIONS.get(arguments.side, "nf4")
    base = load_base(str(arguments.folder / "model"), None, device, quantization=quantization)
    model = add_adapters(base, recipe)
    before = _resident_bytes()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if arguments.side != "trainer":
        usable = usable_memory_bytes(device, gpu_memory_gb=arguments.gpu_memory_gb)
        plan = _plan(config, table, recipe, usable, quantization)
        if arguments.side in ("untimed", "any kernels"):  # both take the same plan
            plan = replace(plan, rivals=())
        result = _train(model, table, recipe, device, plan)
    else:
        result = _train_with_peer(model, table, recipe, arguments.folder / "trainer", device)
    if device.type != "cuda":
        result["peak_bytes"] = _most_resident_bytes() - before
    elif arguments.side == "trainer":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(result))


def _plan(
    config: dict[str, Any],
    table: SampleTable,
    recipe: Recipe,
    usable_bytes: int | None,
    quantization: str,
) -> MemoryPlan:
    return plan_memory(
        config,
        Samples.of(table.lengths, recipe.samples_per_step),
        lora_r=recipe.lora_r,
        lora_dropout=recipe.lora_dropout,
        per_device_train_batch_size=recipe.per_device_train_batch_size,
        usable_bytes=usable_bytes,
        quantization=quantization,
    )


def _train(
    model: Any, table: SampleTable, recipe: Recipe, device: torch.device, plan: MemoryPlan
) -> dict[str, Any]:
    trainer = Trainer(
        model, recipe, device=device, token_budget=plan.token_budget, recompute=plan.recompute
    )
    if infeasible := warm_up(trainer, table, plan):
        raise SystemExit(infeasible)
    state = TrainState()
    steps = [trainer.step(table, state) for _ in range(recipe.planned_steps)]
    taken = MemoryPlan(trainer.token_budget, trainer.recompute)
    predicted = next((p.predicted for p in (plan, *plan.rivals) if p.words == taken.words), None)
    result = {
        "losses": [step.train_loss for step in steps],
        "seconds": [step.seconds for step in steps],
        "plan": str(taken),
        "predicted_bytes": predicted.total if predicted else None,
    }
    if device.type == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()  # the profiler's own apart
        result["kernel_rate"] = _kernel_rate(trainer, table)
    return result


def _kernel_rate(trainer: Trainer, table: SampleTable) -> float | None:
    """Real tokens by the seconds that kernels run: the card's rate if it never waits for its host.

    None where the profiler sees no kernels.
    """
    state, recipe = TrainState(), trainer.recipe
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(PROFILED_STEPS):
            trainer.step(table, state)
    steps = range(PROFILED_STEPS)
    tokens = sum(int(table.lengths[samples_of_step(recipe, len(table), s)].sum()) for s in steps)
    microseconds = sum(kernel.self_device_time_total for kernel in profile.key_averages())
    return tokens / microseconds * 1e6 if microseconds else None


def _train_with_peer(
    model: Any, table: SampleTable, recipe: Recipe, output_dir: Path, device: torch.device
) -> dict[str, Any]:
    """On a GPU everything is recomputed: two samples of 1024 tokens would not fit otherwise."""
    steps = train_with_trainer(model, table, recipe, output_dir, on_gpu=device.type == "cuda")
    return {
        "losses": [step.loss for step in steps],
        "seconds": [step.seconds for step in steps],
        "plan": "padded to the longest of each pair"
        + (", all layers recomputed" if device.type == "cuda" else ""),
        "predicted_bytes": None,
    }


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _most_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux


if __name__ == "__main__":
    # On stderr, of which `--logs` keeps what each side wrote: plans, their rates, the peak.
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("job").setLevel(logging.INFO)
    main()
