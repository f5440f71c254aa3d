"""Training steps on a fake card, counted: `python -m benchmarks.fake_cuda.steps REQUESTS`, as JSON.

Run by `library.run_with_fake_card`.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils._pytree import tree_leaves

from benchmarks.fake_cuda.base import CARD, fake_base
from benchmarks.fake_cuda.card import T4_BYTES, fake_card
from benchmarks.fake_cuda.meter import Cost, Meter
from benchmarks.shapes import log_normal_rows, make_recipe
from benchmarks.trainer_peer import as_peft_leaves_it, padded_batches
from job.data.samples import SampleTable
from job.training.batching import samples_of_step
from job.training.device import open_device, usable_memory_bytes
from job.training.footprint import FP16_CUDA, Work, footprint
from job.training.memory import Samples, plan_memory
from job.training.model import add_adapters, set_recompute, trainable_parameters
from job.training.shape import model_shape
from job.training.state import TrainState
from job.training.trainer import Trainer
from job.training.warmup import warm_up

# A T4's fp16 matrix products and memory, sustained: of 65 TFLOPS and 320 GB/s on its data sheet.
T4_FLOPS_PER_SECOND, T4_BYTES_PER_SECOND = 24e12, 240e9
NUM_STEPS = 2
RECIPE = make_recipe(100, warmup_ratio=0.0)


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(json.dumps([run(request) for request in json.loads(sys.argv[1])]))


def run(request: Mapping[str, Any]) -> dict[str, Any]:
    """`side`: job, padded, or peak (of one plan). `config`: entries of a config.json.

    Optional: `memory_gib`, which the card has; `cap_gib`, which comes after the plan was made.
    """
    sides = {"job": _job, "padded": _padded, "peak": _peak}
    memory = int(request["memory_gib"] * 2**30) if "memory_gib" in request else T4_BYTES
    with fake_card(memory) as card:
        return sides[request["side"]](card, request)


def _job(card: Meter, request: Mapping[str, Any]) -> dict[str, Any]:
    """Do what a trial does: plan, warm up, train."""
    device = open_device("cuda", gpu_memory_gb=None)
    config = request["config"]
    table = rows_of(config)
    base = fake_base(config)
    lengths = table.lengths
    plan = plan_memory(
        config,
        Samples(int(lengths.max()), float(lengths.mean()), RECIPE.samples_per_step),
        lora_r=RECIPE.lora_r,
        lora_dropout=RECIPE.lora_dropout,
        per_device_train_batch_size=RECIPE.per_device_train_batch_size,
        usable_bytes=usable_memory_bytes(device, gpu_memory_gb=None),
    )
    trainer = Trainer(
        add_adapters(base, RECIPE),
        RECIPE,
        device=device,
        token_budget=plan.token_budget,
        recompute=plan.recompute,
    )
    if "cap_gib" in request:
        card.limit_bytes = int(request["cap_gib"] * 2**30)
    # Not timed: no second of this card is a real one.
    infeasible = warm_up(trainer, table, replace(plan, rivals=()))
    warm_up_bytes, standing_bytes = card.peak_bytes, card.held_bytes
    state = TrainState()
    counted = {} if infeasible else _count(card, lambda: trainer.step(table, state))
    return {
        "tokens": num_tokens(table),
        "plan": str(plan),
        "predicted_bytes": plan.predicted.total if plan.predicted else None,
        "infeasible": infeasible,
        "warm_up_bytes": warm_up_bytes,
        "standing_bytes": standing_bytes,
        "token_budget": trainer.token_budget,
        "recompute": trainer.recompute,
        "eased": (trainer.token_budget, trainer.recompute) != (plan.token_budget, plan.recompute),
        **counted,
    }


def _padded(card: Meter, request: Mapping[str, Any]) -> dict[str, Any]:
    """Do what `transformers.Trainer` does: padded pairs, whole logits, all layers recomputed."""
    table = rows_of(request["config"])
    model = add_adapters(fake_base(request["config"]), RECIPE)
    as_peft_leaves_it(model)
    set_recompute(model, "all")
    weights = list(trainable_parameters(model).values())
    optimizer, scaler = torch.optim.AdamW(weights, fused=True), torch.amp.GradScaler("cuda")
    card.truth = False  # "are all tokens real?": there is padding
    batches = padded_batches(table, RECIPE)

    def step() -> None:
        optimizer.zero_grad()
        model.train()
        for batch in next(batches):
            on_card = {name: tensor.to(CARD) for name, tensor in batch.items()}
            with torch.autocast("cuda", dtype=torch.float16):
                loss = model(**on_card).loss / RECIPE.gradient_accumulation_steps
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(weights, RECIPE.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()

    return _count(card, step)


def _peak(card: Meter, request: Mapping[str, Any]) -> dict[str, Any]:
    """The peak of a step of two equal micro-batches in a given plan, beside the prediction."""
    config = request["config"]
    if (shape := model_shape(config)) is None:
        raise ValueError(f"no prediction for {config['model_type']}")
    trainer = Trainer(
        add_adapters(fake_base(config), RECIPE),
        RECIPE,
        device=CARD,
        token_budget=request["tokens"],
        recompute=request["recompute"],
    )
    dtypes: set[str] = set()
    for module in trainer.model.modules():
        module.register_forward_hook(lambda _m, _i, out: dtypes.update(_floating_dtypes(out)))
    batch = trainer.heaviest(_all_targets(request["tokens"], request["samples"]))
    trainer.take_step([batch], TrainState())  # gradients and moments are there
    card.reset()
    trainer.take_step([batch, batch], TrainState())
    work = Work(batch.num_tokens, len(batch.targets), RECIPE.lora_r, True, request["recompute"])
    return {
        "predicted_bytes": footprint(shape, work, FP16_CUDA).total - FP16_CUDA.workspace,
        "peak_bytes": card.peak_bytes,
        "dtypes": sorted(dtypes),
        "largest_bytes": card.largest_bytes,
        "logits_bytes": 4 * len(batch.targets) * shape.vocabulary,
    }


def _floating_dtypes(output: Any) -> set[str]:
    tensors = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
    return {str(t.dtype) for t in tensors if t.is_floating_point()}


def _count(card: Meter, step: Callable[[], object]) -> dict[str, Any]:
    card.reset()
    for _ in range(NUM_STEPS):
        step()
    return {
        "peak_bytes": card.peak_bytes,
        "flops": sum(cost.flops for cost in card.costs.values()),
        "moved_bytes": sum(cost.moved_bytes for cost in card.costs.values()),
        "seconds": sum(_least_seconds(cost) for cost in card.costs.values()),
        "calls": sum(cost.calls for cost in card.costs.values()),
        "slowest": _slowest(card.costs),
    }


def _slowest(costs: Mapping[str, Cost]) -> dict[str, float]:
    """The operations that take most of the roofline's seconds."""
    seconds = {name: round(_least_seconds(cost), 4) for name, cost in costs.items()}
    return dict(sorted(seconds.items(), key=lambda item: -item[1])[:12])


def _least_seconds(cost: Cost) -> float:
    """The roofline: an operation computes or moves, whichever takes longer."""
    return max(cost.flops / T4_FLOPS_PER_SECOND, cost.moved_bytes / T4_BYTES_PER_SECOND)


def rows_of(config: Mapping[str, Any]) -> SampleTable:
    """Rows as the training benchmark's: log-normal lengths, half of a row to be learned."""
    return log_normal_rows(64, config["vocab_size"])


def num_tokens(table: SampleTable) -> int:
    """Real tokens of the counted steps."""
    steps = [samples_of_step(RECIPE, len(table), step) for step in range(NUM_STEPS)]
    return sum(int(table.lengths[step].sum()) for step in steps)


def _all_targets(num_tokens: int, num_samples: int) -> SampleTable:
    """A row of equal samples of which every token but the first is a target."""
    ids = [np.full(num_tokens // num_samples, 7, dtype=np.int32)] * num_samples
    return SampleTable.concatenate(ids, [np.arange(len(row)) > 0 for row in ids])


if __name__ == "__main__":
    main()
