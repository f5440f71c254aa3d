"""What the ranks of a trial send each other: JSON, tables, the tensors of all parameters in one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from job.data.samples import SampleTable
from job.errors import GpuError


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A message between ranks; one that is gone is told in a line. Raises `GpuError`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo's and NCCL's own
        first_line = str(error).partition("\n")[0]
        raise GpuError(
            f"another process of this trial is gone, its lines tell why ({first_line})"
        ) from error


def broadcast(tensor: torch.Tensor) -> None:
    """From rank 0 to all, in place."""
    with together():
        dist.broadcast(tensor, src=0)


def send_json(content: dict[str, Any]) -> None:
    """From rank 0 to all. JSON, not torch's object collectives: those pickle."""
    data = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
    broadcast(torch.tensor([len(data)]))
    broadcast(data)


def receive_json() -> dict[str, Any]:
    """What rank 0 sent."""
    size = torch.zeros(1, dtype=torch.int64)
    broadcast(size)
    data = torch.empty(int(size), dtype=torch.uint8)
    broadcast(data)
    content: dict[str, Any] = json.loads(bytes(data.numpy()))
    return content


def send_table(table: SampleTable) -> None:
    """From rank 0 to all: followers need neither the store nor the rows."""
    send_json({"tokens": len(table.input_ids), "samples": len(table)})
    for array, dtype in _arrays(table):
        broadcast(torch.from_numpy(array.astype(dtype)))


def receive_table() -> SampleTable:
    """What rank 0 sent."""
    sizes = receive_json()
    input_ids = torch.empty(sizes["tokens"], dtype=torch.int32)
    is_target = torch.empty(sizes["tokens"], dtype=torch.uint8)
    offsets = torch.empty(sizes["samples"] + 1, dtype=torch.int64)
    for tensor in (input_ids, is_target, offsets):
        broadcast(tensor)
    return SampleTable(input_ids.numpy(), is_target.numpy().astype(np.bool_), offsets.numpy())


def _arrays(table: SampleTable) -> list[tuple[np.ndarray[Any, Any], type]]:
    return [(table.input_ids, np.int32), (table.is_target, np.uint8), (table.offsets, np.int64)]


def in_one_row(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One message instead of one for each of hundreds of tensors."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def cut_up(row: torch.Tensor, like: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    sizes = [parameter.numel() for parameter in like]
    pieces = torch.split(row, sizes)
    return [part.view(p.shape) for part, p in zip(pieces, like, strict=True)]
