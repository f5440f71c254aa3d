"""Several GPUs of one node at one trial: what the ranks say to each other.

Rank 0 trains; the others only compute their share of a step's samples. Every order brings them the
weights, and their gradients are summed into rank 0's, so optimizer, loss scale, checkpoints and
exactness are rank 0's alone, and a follower keeps nothing that could be lost.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.distributed as dist

from job.data.samples import SampleTable
from job.errors import GpuError
from job.ledger.records import Recipe
from job.log import log
from job.training.footprint import Recompute
from job.training.messages import (
    broadcast,
    cut_up,
    in_one_row,
    receive_json,
    send_json,
    send_table,
    together,
)

Kind = Literal["step", "evaluate"]
KINDS: tuple[Kind, ...] = ("step", "evaluate")
# What a share's summed NLL is held in; the ranks must agree.
TOTALS: dict[Kind, torch.dtype] = {"step": torch.float32, "evaluate": torch.float64}
# A follower waits so long for an order: checkpoints and evaluations of rank 0 lie between two.
ORDER_SECONDS = 1800.0
TASK_FILE = "task.json"  # in the meeting folder: what rank 0 has to train
LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class CrewPlan:
    """Who trains a trial together."""

    meeting: Path  # a folder that all ranks see, empty at first
    size: int  # ranks
    location: str  # of the base, for load_base()
    revision: str | None


@dataclass(frozen=True)
class Order:
    """What all ranks do next. `shares`: the sample indices of each rank."""

    kind: Kind
    shares: list[list[int]]
    token_budget: int
    recompute: Recompute
    seed: int = 0
    num_targets: int = 1  # of the whole step
    scaler: dict[str, Any] = field(default_factory=dict)  # of the leader's GradScaler


def join(meeting: Path, *, rank: int, size: int, device: torch.device) -> None:
    """Meet the other ranks; CPU tensors go by gloo, CUDA tensors by NCCL."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{meeting}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=ORDER_SECONDS),
    )


def read_task(meeting: Path) -> dict[str, Any]:
    """Wait until rank 0 has something to train: for hours, if rows are prepared first."""
    while not (meeting / TASK_FILE).exists():
        time.sleep(LOOK_SECONDS)
    task: dict[str, Any] = json.loads((meeting / TASK_FILE).read_text())
    return task


def ready_file(rank: int) -> str:
    """In the meeting folder: the rank has loaded the model."""
    return f"ready-{rank}"


def _write_task(meeting: Path, task: dict[str, Any]) -> None:
    temporary = meeting / f".{TASK_FILE}"
    temporary.write_text(json.dumps(task))
    temporary.replace(meeting / TASK_FILE)


def split_evenly(lengths: Sequence[int], indices: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Samples of a step by rank, so that the rank with the most tokens has as few as can be.

    Longest first to the rank with the fewest tokens so far; then each share in the step's order.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    tokens = [0] * num_ranks
    for place in sorted(range(len(indices)), key=lambda place: (-lengths[place], place)):
        rank = tokens.index(min(tokens))
        shares[rank].append(place)
        tokens[rank] += lengths[place]
    return [[indices[place] for place in sorted(share)] for share in shares]


class Crew:
    """Rank 0's followers."""

    def __init__(self, size: int) -> None:
        self.size = size

    @classmethod
    def gather(
        cls,
        plan: CrewPlan,
        recipe: Recipe,
        tables: tuple[SampleTable, SampleTable],  # of steps, of evaluations
        device: torch.device,
        should_stop: Callable[[], None],
    ) -> Self:
        """Tell the others what is trained, wait until they have loaded it, send them the rows."""
        task = {"location": plan.location, "revision": plan.revision, "recipe": recipe.to_json()}
        _write_task(plan.meeting, task)
        ready = [plan.meeting / ready_file(rank) for rank in range(1, plan.size)]
        while not all(path.exists() for path in ready):  # not in a collective: it hears no signal
            should_stop()
            time.sleep(LOOK_SECONDS)
        join(plan.meeting, rank=0, size=plan.size, device=device)
        for table in tables:
            send_table(table)
        log.info("%d GPUs share each step", plan.size)
        return cls(plan.size)

    def give(self, order: Order, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Send an order, and the weights it is to be computed with."""
        weights = in_one_row(
            [p.data for p in parameters]
        )  # before anything is said: it takes memory
        send_json(asdict(order))
        broadcast(weights)

    def dismiss(self) -> None:
        """The trial is over."""
        send_json({"kind": "end"})
        dist.destroy_process_group()


def receive_order(parameters: Sequence[torch.nn.Parameter]) -> Order | None:
    """A follower's next order, its weights put in place; None at the end."""
    content = receive_json()
    if content["kind"] == "end":
        dist.destroy_process_group()  # left to the exit, it may abort (4 of 8)
        return None
    try:
        weights = in_one_row([p.data for p in parameters])
    except torch.OutOfMemoryError as error:  # the others wait for us: nothing can be eased here
        raise GpuError("no room on this GPU for a copy of the adapter's weights") from error
    broadcast(weights)
    for parameter, part in zip(parameters, cut_up(weights, parameters), strict=True):
        parameter.data.copy_(part)
    return Order(**content)


def sum_up(
    total: torch.Tensor, parameters: Sequence[torch.nn.Parameter] | None, *, failed: bool
) -> None:
    """Sum `total` and the gradients of all ranks into rank 0's, in place.

    Raises `torch.OutOfMemoryError` in every rank if any of them failed: then nothing was summed.
    Whatever takes memory comes before the ranks agree on that.
    """
    row = None
    if parameters is not None and not failed:
        try:
            for parameter in parameters:  # a rank whose share is empty has no gradients
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            row = in_one_row([p.grad for p in parameters if p.grad is not None])
        except torch.OutOfMemoryError:
            failed = True
    failures = torch.tensor([float(failed)])
    with together():
        dist.all_reduce(failures)
    if failures.item():
        raise torch.OutOfMemoryError(f"{failures.item():.0f} GPUs of this node ran out of memory")
    with together():
        dist.reduce(total, dst=0)
    if parameters is None or row is None:
        return
    with together():
        dist.reduce(row, dst=0)
    for parameter, part in zip(parameters, cut_up(row, parameters), strict=True):
        if parameter.grad is not None:
            parameter.grad.copy_(part)
