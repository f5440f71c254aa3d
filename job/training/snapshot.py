"""What an optimizer step changes, copied away and put back: in memory or in a folder."""

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
    """On the CPU, fp32."""

    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]  # named <moment>.<weight>; empty before the first update
    num_updates: float
    scaler: dict[str, Any]  # loss scale and its growth; empty where there is none

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the tensors as safetensors; return the rest, as JSON."""
        write_tensors(folder / ADAPTER_FILE, self.weights)
        write_tensors(folder / OPTIMIZER_FILE, self.moments)
        return {"num_updates": self.num_updates, "scaler": self.scaler}


def read_snapshot(folder: Path, saved: dict[str, Any]) -> Snapshot:
    """What `write` wrote; `saved` is what it returned."""
    weights, moments = load_file(folder / ADAPTER_FILE), load_file(folder / OPTIMIZER_FILE)
    return Snapshot(weights, moments, saved["num_updates"], saved["scaler"])


def take_snapshot(
    model: Any, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> Snapshot:
    """Copies: later steps do not change them."""
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
    """The next step then computes what it would have computed after `take_snapshot`."""
    named = trainable_parameters(model)
    assert snapshot.weights.keys() == named.keys(), "the checkpoint is of another adapter"
    optimizer.zero_grad(set_to_none=True)
    optimizer.state.clear()
    for name, parameter in named.items():
        parameter.data.copy_(snapshot.weights[name])
        if snapshot.moments:
            moments = {key: snapshot.moments[f"{key}.{name}"] for key in MOMENTS}
            # The fused AdamW counts where its weights are, the others on the CPU.
            device = parameter.device if optimizer.defaults["fused"] else None
            optimizer.state[parameter] = {
                "step": torch.tensor(snapshot.num_updates, device=device),
                **{key: moment.to(parameter.device) for key, moment in moments.items()},
            }
    if snapshot.scaler:
        scaler.load_state_dict(snapshot.scaler)
