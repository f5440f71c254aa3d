"""How much memory a piece of work holds on the CPU at most, read off the allocator's own events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that `work` held at once beyond what was there when it began."""
    import torch

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU],
        profile_memory=True,
        acc_events=True,  # without it torch 2.11 warns, though there is one cycle only
    ) as profile:
        work()
    held = most = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def storage_bytes(model: Any, optimizer: Any) -> int:
    """What stands between two steps: weights, quantisation states, gradients, moments."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors += [state.absmax, state.state2.absmax]
    if optimizer is not None:
        tensors += [slot for slots in optimizer.state.values() for slot in slots.values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
