"""Which samples a step takes, and how they are packed into padding-free micro-batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

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


def heaviest(table: SampleTable, samples_per_step: int, token_budget: int) -> MicroBatch:
    """Make a micro-batch that no micro-batch of any step exceeds in tokens, targets, or length.

    It holds the longest samples, the last of them cut where the budget is full; then tokens are
    made targets until there are as many as the densest samples could bring together. Its loss
    means nothing: it is there to be timed and weighed.
    """
    lengths = table.lengths
    targets = np.add.reduceat(table.is_target, table.offsets[:-1], dtype=np.int64)
    most_tokens = max(int(lengths.max()), _most(lengths, lengths, samples_per_step, token_budget))
    most_targets = max(int(targets.max()), _most(targets, lengths, samples_per_step, token_budget))
    longest_first = np.argsort(-lengths, kind="stable").tolist()
    pieces, left = [], most_tokens
    for index in itertools.cycle(longest_first):
        start = int(table.offsets[index])
        pieces.append(slice(start, start + min(left, int(lengths[index]))))
        left -= pieces[-1].stop - pieces[-1].start
        if left == 0:
            break
    row = np.concatenate([table.is_target[piece] for piece in pieces])
    row[0] = False  # nothing stands before it that could predict it
    free = np.flatnonzero(~row)[1:]
    row[free[: max(0, most_targets - int(row.sum()))]] = True
    return _row([table.input_ids[piece] for piece in pieces], row)


def _most(
    weights: NDArray[np.int64], lengths: NDArray[np.int64], samples_per_step: int, token_budget: int
) -> int:
    """Bound from above what the samples of a micro-batch of several weigh together.

    The bound of a knapsack: the densest samples first, the last one in part. Of a table with fewer
    samples than a step takes, or where an epoch ends within a step, a sample comes several times.
    """
    copies = (samples_per_step - 2) // len(lengths) + 2 if samples_per_step > 1 else 1
    heavy = np.sort(weights)[::-1].repeat(copies)[:samples_per_step]
    densest_first = np.argsort(-weights / lengths, kind="stable").repeat(copies)
    filled = np.minimum(lengths[densest_first].cumsum(), token_budget)
    taken = np.diff(filled, prepend=0) / lengths[densest_first]  # of each sample, the share
    in_budget = math.floor(float((taken * weights[densest_first]).sum()) + 1e-6)
    return min(int(heavy.sum()), in_budget)


def _concatenate(table: SampleTable, indices: Sequence[int]) -> MicroBatch:
    slices = [slice(table.offsets[i], table.offsets[i + 1]) for i in indices]
    is_target = np.concatenate([table.is_target[s] for s in slices])
    return _row([table.input_ids[s] for s in slices], is_target)


def _row(samples: Sequence[NDArray[np.int32]], is_target: NDArray[np.bool_]) -> MicroBatch:
    input_ids = np.concatenate(samples).astype(np.int64)
    positions = np.concatenate([np.arange(len(sample)) for sample in samples])
    where = np.flatnonzero(is_target)  # never 0: a sample's first token is no target
    return MicroBatch(
        torch.from_numpy(input_ids)[None],
        torch.from_numpy(positions.astype(np.int64))[None],
        torch.from_numpy(where - 1),
        torch.from_numpy(input_ids[where]),
        tuple(len(sample) for sample in samples),
    )
