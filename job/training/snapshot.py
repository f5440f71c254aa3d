"""`Snapshot`: a copy of all that an optimizer step changes, in memory or in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from job.training.model import trainable_parameters, write_tensors

ADAPTER_FILE, OPTIMIZER_FILE = "adapter.safetensors", "optimizer.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Snapshot:
    """Adapter, optimizer and loss scale at one moment; the tensors are fp32 on the CPU."""

    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]  # named <moment>.<weight>; empty before the first update
    num_updates: float
    scaler: dict[str, Any]  # loss scale and its growth; empty where there is none

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the tensors to `folder` as safetensors; return everything else, for JSON."""
        write_tensors(folder / ADAPTER_FILE, self.weights)
        write_tensors(folder / OPTIMIZER_FILE, self.moments)
        return {"num_updates": self.num_updates, "scaler": self.scaler}


def read_snapshot(folder: Path, saved: dict[str, Any]) -> Snapshot:
    """Read a snapshot from its folder; `saved` is what `Snapshot.write` returned."""
    weights, moments = load_file(folder / ADAPTER_FILE), load_file(folder / OPTIMIZER_FILE)
    return Snapshot(weights, moments, saved["num_updates"], saved["scaler"])


def take_snapshot(
    model: Any, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> Snapshot:
    """Copy weights, moments and loss scale; later steps do not change the copy."""
    named = trainable_parameters(model)
    weights = {n: p.detach().to("cpu", copy=True) for n, p in named.items()}
    moments: dict[str, torch.Tensor] = {}
    num_updates = 0.0
    for name, parameter in named.items():
        slots = optimizer.state.get(parameter, {})
        num_updates = float(slots.get("step", 0.0))
        moments |= {
            f"{key}.{name}": slots[key].to("cpu", copy=True) for key in MOMENTS if key in slots
        }
    return Snapshot(weights, moments, num_updates, scaler.state_dict())


def put_back(
    snapshot: Snapshot,
    model: Any,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Restore what `take_snapshot` copied; the next step then computes what it would have then."""
    named = trainable_parameters(model)
    assert snapshot.weights.keys() == named.keys(), "the checkpoint is of another adapter"
    optimizer.zero_grad(set_to_none=True)
    optimizer.state.clear()
    for name, parameter in named.items():
        parameter.data.copy_(snapshot.weights[name])
        if snapshot.moments:
            moments = {key: snapshot.moments[f"{key}.{name}"] for key in MOMENTS}
            # The fused AdamW keeps its count of updates on the GPU, any other AdamW on the CPU.
            device = parameter.device if optimizer.defaults["fused"] else None
            optimizer.state[parameter] = {
                "step": torch.tensor(snapshot.num_updates, device=device),
                **{key: moment.to(parameter.device) for key, moment in moments.items()},
            }
    if snapshot.scaler:
        scaler.load_state_dict(snapshot.scaler)
