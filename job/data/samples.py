"""`SampleTable`: tokenised samples as three flat arrays; `Tables`: the two that a trial uses.

This module needs numpy only, so that `job.training` runs where pyarrow and datasets are absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SampleTable:
    """Samples one after another; sample i is the slice `offsets[i]:offsets[i + 1]`.

    `is_target[j]` says that token j is learned, that is, predicted from the tokens before it in
    the same sample. A sample's first token is therefore never a target. `TableWriter` checks that;
    a check here would read the whole of a mapped table.
    """

    input_ids: NDArray[np.int32]  # (tokens,)
    is_target: NDArray[np.bool_]  # (tokens,)
    offsets: NDArray[np.int64]  # (samples + 1,), offsets[0] == 0

    def __post_init__(self) -> None:
        assert self.input_ids.shape == self.is_target.shape
        assert self.offsets[0] == 0
        assert self.offsets[-1] == len(self.input_ids)

    @classmethod
    def concatenate(
        cls, input_ids: Sequence[NDArray[np.int32]], is_target: Sequence[NDArray[np.bool_]]
    ) -> SampleTable:
        """Make a table of samples that are two arrays each, in this order."""
        offsets = np.cumsum([0, *(len(ids) for ids in input_ids)], dtype=np.int64)
        return cls(
            np.concatenate([np.empty(0, dtype=np.int32), *input_ids]),
            np.concatenate([np.empty(0, dtype=np.bool_), *is_target]),
            offsets,
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each sample, (samples,) int64."""
        return np.diff(self.offsets)

    @property
    def num_target_tokens(self) -> int:
        """The number of target tokens of all samples."""
        return int(self.is_target.sum())

    def targets_of(self, indices: Sequence[int]) -> int:
        """The number of target tokens of the samples at these indices."""
        ends = ((self.offsets[index], self.offsets[index + 1]) for index in indices)
        return sum(int(self.is_target[start:end].sum()) for start, end in ends)

    def head(self, num_samples: int) -> SampleTable:
        """The first `num_samples` samples (all, if there are fewer)."""
        offsets = self.offsets[: min(num_samples, len(self)) + 1]
        end = int(offsets[-1])
        return SampleTable(self.input_ids[:end], self.is_target[:end], offsets)


@dataclass(frozen=True)
class Tables:
    """The samples that a trial trains on, and those of each evaluation."""

    train: SampleTable
    eval: SampleTable
