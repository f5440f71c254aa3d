"""How much memory a piece of work holds on the CPU at most, read off the allocator's own events."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
    tree = profile.profiler.kineto_results.experimental_event_tree()
    events = sorted(_allocations(tree), key=lambda event: event.start_time_ns)
    return most_held((event.extra_fields.ptr, event.extra_fields.alloc_size) for event in events)


def most_held(events: Iterable[tuple[int, int]]) -> int:
    """Most bytes held at once, of events with a block's address and its bytes, negative at its end.

    A block from before the trace, at the address of one that an earlier trace saw, is told at its
    end with the size of that one: nothing is taken off for it.
    """
    held = most = 0
    blocks: dict[int, int] = {}
    for address, size in events:
        if size > 0:
            blocks[address] = size
            held += size
        else:
            held -= blocks.pop(address, 0)
        most = max(most, held)
    return most


def _allocations(tree: Iterable[Any]) -> Iterator[Any]:
    """All events of the tree by which memory was taken or given back."""
    for event in tree:
        if hasattr(event.extra_fields, "alloc_size"):
            yield event
        yield from _allocations(event.children)


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
