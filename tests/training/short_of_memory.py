"""Rank 1 of test_crew_memory.py: `python -m tests.training.short_of_memory MEETING ACT`.

Real ranks over gloo; what fails is torch's own `cat`, which needs room for a second copy, the way
CUDA's allocator fails it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from job.errors import GpuError
from job.training.crew import join, receive_order, sum_up
from job.wandb.client import leave

CPU = torch.device("cpu")


class NoRoomToFlatten(TorchFunctionMode):
    """No memory is left for one tensor that holds all the others."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.cat:
            raise torch.OutOfMemoryError("CUDA out of memory: as a test wants it")
        return func(*args, **(kwargs or {}))


def two_parameters(gradient: float) -> list[torch.nn.Parameter]:
    """The second has no gradient, as after an empty share."""
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    parameters[0].grad = torch.full((2,), gradient)
    return parameters


def summed(parameters: list[torch.nn.Parameter], total: torch.Tensor) -> str:
    """What became of a sum: `summed`, or what out of memory says."""
    try:
        sum_up(total, parameters, failed=False)
    except torch.OutOfMemoryError as error:
        return str(error)
    return "summed"


def main(meeting: Path, act: str) -> None:
    """Play the follower's part, a line for each act."""
    join(meeting, rank=1, size=2, device=CPU)
    if act == "be dismissed":
        print(receive_order([]), torch.distributed.is_initialized())
        return
    parameters, total = two_parameters(10.0), torch.tensor(5.0)
    with NoRoomToFlatten():
        print(summed(parameters, total))
    print(summed(parameters, total))  # rank 0 has no room now
    print(summed(parameters, total))
    order = receive_order(parameters)
    print(order.seed if order else None, parameters[0].data.tolist())
    try:
        with NoRoomToFlatten():
            receive_order(parameters)
    except GpuError as error:
        print(error)
        leave(error.exit_code, has_ranks=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
