"""Training steps on a fake card, counted: `python -m benchmarks.fake_cuda.steps REQUESTS`, as JSON.

Run by `library.run_with_fake_card`.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from benchmarks.fake_cuda.base import CARD, fake_base
from benchmarks.fake_cuda.card import T4_BYTES, fake_card
from benchmarks.fake_cuda.meter import Meter
from benchmarks.shapes import log_normal_rows, make_recipe
from job.data.samples import SampleTable
from job.training.device import open_device, usable_memory_bytes
from job.training.footprint import FP16_CUDA, Work, footprint
from job.training.memory import Samples, plan_memory
from job.training.model import add_adapters
from job.training.shape import model_shape
from job.training.state import TrainState
from job.training.trainer import Trainer
from job.training.warmup import warm_up

NUM_STEPS = 2
RECIPE = make_recipe(100, warmup_ratio=0.0)


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("requests", type=json.loads, help="a list of them as JSON")
    print(json.dumps([run(request) for request in parser.parse_args().requests]))


def run(request: Mapping[str, Any]) -> dict[str, Any]:
    """`side`: job, or peak (of one plan). `config`: entries of a config.json.

    Optional: `memory_gib`, which the card has; `cap_gib`, which comes after the plan was made;
    `quantization`.
    """
    sides = {"job": _job, "peak": _peak}
    memory = int(request["memory_gib"] * 2**30) if "memory_gib" in request else T4_BYTES
    with fake_card(memory) as card:
        return sides[request["side"]](card, request)


def _job(card: Meter, request: Mapping[str, Any]) -> dict[str, Any]:
    """Do what a trial does: plan, warm up, train."""
    device = open_device("cuda", gpu_memory_gb=None)
    config, quantization = request["config"], request.get("quantization", "nf4")
    table = rows_of(config)
    base = fake_base(config, quantization)
    plan = plan_memory(
        config,
        Samples.of(table.lengths, RECIPE.samples_per_step),
        lora_r=RECIPE.lora_r,
        lora_dropout=RECIPE.lora_dropout,
        per_device_train_batch_size=RECIPE.per_device_train_batch_size,
        usable_bytes=usable_memory_bytes(device, gpu_memory_gb=None),
        quantization=quantization,
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
    card.reset()
    for _ in range(0 if infeasible else NUM_STEPS):
        trainer.step(table, state)
    return {
        "peak_bytes": card.peak_bytes,
        "predicted_bytes": plan.predicted.total if plan.predicted else None,
        "infeasible": infeasible,
        "warm_up_bytes": warm_up_bytes,
        "standing_bytes": standing_bytes,
        "token_budget": trainer.token_budget,
        "recompute": trainer.recompute,
        "eased": (trainer.token_budget, trainer.recompute) != (plan.token_budget, plan.recompute),
    }


def _peak(card: Meter, request: Mapping[str, Any]) -> dict[str, Any]:
    """The peak of a step of two equal micro-batches in a given plan, beside the prediction."""
    config, quantization = request["config"], request.get("quantization", "nf4")
    if (shape := model_shape(config, quantization)) is None:
        raise ValueError(f"no prediction for {config['model_type']}")
    trainer = Trainer(
        add_adapters(fake_base(config, quantization), RECIPE),
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


def rows_of(config: Mapping[str, Any]) -> SampleTable:
    """Rows as the training benchmark's: log-normal lengths, half of a row to be learned."""
    return log_normal_rows(64, config["vocab_size"])


def _all_targets(num_tokens: int, num_samples: int) -> SampleTable:
    """A row of equal samples of which every token but the first is a target."""
    ids = [np.full(num_tokens // num_samples, 7, dtype=np.int32)] * num_samples
    return SampleTable.concatenate(ids, [np.arange(len(row)) > 0 for row in ids])


if __name__ == "__main__":
    main()
