"""A rank above 0: computes its share of each step and of each evaluation, until dismissed."""

from __future__ import annotations

from pathlib import Path

import torch

from job.data.samples import SampleTable
from job.ledger.records import Recipe
from job.training.crew import (
    KINDS,
    TOTALS,
    Kind,
    Order,
    join,
    read_task,
    ready_file,
    receive_order,
    sum_up,
)
from job.training.gpu_faults import gpu_faults_told
from job.training.messages import receive_table
from job.training.model import add_adapters, load_base
from job.training.trainer import Trainer


@gpu_faults_told()
def follow(meeting: Path, *, rank: int, size: int, device: torch.device) -> None:
    """Wait until rank 0 has a trial, load it, compute what is ordered until we are dismissed."""
    task = read_task(meeting)
    recipe = Recipe.model_validate(task["recipe"])
    model = add_adapters(load_base(task["location"], task["revision"], device), recipe)
    trainer = Trainer(model, recipe, device=device, token_budget=1)
    (meeting / ready_file(rank)).touch()
    join(meeting, rank=rank, size=size, device=device)
    serve(trainer, {kind: receive_table() for kind in KINDS}, rank)


def serve(trainer: Trainer, tables: dict[Kind, SampleTable], rank: int) -> None:
    """Do what rank 0 orders until it dismisses us."""
    while (order := receive_order(trainer.parameters)) is not None:
        _obey(trainer, order, tables[order.kind], rank)


def _obey(trainer: Trainer, order: Order, table: SampleTable, rank: int) -> None:
    """Compute and hand over; out of memory, say so and wait for an easier order."""
    trainer.set_plan(order.token_budget, order.recompute)
    if order.scaler:
        trainer.scaler.load_state_dict(order.scaler)
    total, failed = torch.zeros((), dtype=TOTALS[order.kind], device=trainer.device), False
    compute = trainer.compute_step if order.kind == "step" else trainer.compute_nll
    try:
        total = compute(table, order, rank)
    except torch.OutOfMemoryError:
        failed = True
    try:
        sum_up(total, trainer.parameters if order.kind == "step" else None, failed=failed)
    except torch.OutOfMemoryError:
        trainer.optimizer.zero_grad(set_to_none=True)
        if trainer.device.type == "cuda":
            torch.cuda.empty_cache()
