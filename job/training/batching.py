"""Which samples a step takes, and how they are packed into padding-free micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from job.data.samples import SampleTable
from job.ledger.records import Recipe
from job.training.recipe import derive_seed


@dataclass(frozen=True)
class MicroBatch:
    """Samples one after another in one row, without padding and without a mask.

    Position ids restart at 0 with every sample. `sample_lengths` keeps samples from seeing each
    other (`attention.py`); it is on the host, so that reading it does not wait for the GPU.
    """

    input_ids: torch.Tensor  # (1, tokens) int64
    position_ids: torch.Tensor  # (1, tokens) int64
    target_positions: torch.Tensor  # (targets,) int64: where the hidden state predicts a target
    targets: torch.Tensor  # (targets,) int64: the token ids to be predicted there
    sample_lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all samples together."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device) -> MicroBatch:
        """Copy the tensors to `device` without waiting for it."""
        return MicroBatch(
            self.input_ids.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.target_positions.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            self.sample_lengths,
        )


def samples_of_step(recipe: Recipe, num_samples: int, step: int) -> list[int]:
    """Choose the samples of optimizer step `step` (the first is 0) by (seed, step) alone.

    Every epoch is a seeded permutation of all samples. A step that crosses the end of an epoch
    takes the rest of it and the beginning of the next.
    """
    first = step * recipe.samples_per_step
    indices: list[int] = []
    while len(indices) < recipe.samples_per_step:
        epoch, position = divmod(first + len(indices), num_samples)
        order = np.random.default_rng(derive_seed(recipe.seed, "epoch", epoch)).permutation(
            num_samples
        )
        missing = recipe.samples_per_step - len(indices)
        indices += order[position : position + missing].tolist()
    return indices


def pack(table: SampleTable, indices: Sequence[int], token_budget: int) -> Iterator[MicroBatch]:
    """Pack samples, in their order, into micro-batches of at most `token_budget` tokens.

    A sample that is longer than the budget gets a micro-batch of its own.
    """
    group: list[int] = []
    tokens = 0
    for index in indices:
        length = int(table.offsets[index + 1] - table.offsets[index])
        if group and tokens + length > token_budget:
            yield _concatenate(table, group)
            group, tokens = [], 0
        group.append(index)
        tokens += length
    if group:
        yield _concatenate(table, group)


def _concatenate(table: SampleTable, indices: Sequence[int]) -> MicroBatch:
    slices = [slice(table.offsets[i], table.offsets[i + 1]) for i in indices]
    input_ids = np.concatenate([table.input_ids[s] for s in slices]).astype(np.int64)
    is_target = np.concatenate([table.is_target[s] for s in slices])
    positions = np.concatenate([np.arange(s.stop - s.start) for s in slices])
    where = np.flatnonzero(is_target)  # never 0: a sample's first token is no target
    return MicroBatch(
        torch.from_numpy(input_ids)[None],
        torch.from_numpy(positions.astype(np.int64))[None],
        torch.from_numpy(where - 1),
        torch.from_numpy(input_ids[where]),
        tuple(int(s.stop - s.start) for s in slices),
    )
