"""`Trainer`: a model with its optimizer and scaler; a step, an evaluation, save and restore."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from job.data.samples import SampleTable
from job.ledger.records import Recipe
from job.training.batching import MicroBatch, pack, samples_of_step
from job.training.footprint import Recompute
from job.training.gpu_faults import out_of_memory_by_one_name
from job.training.loss import has_chunked_loss, target_nll
from job.training.model import set_recompute, trainable_parameters
from job.training.precision import autocast, loss_scaler, model_dtype
from job.training.recipe import derive_seed, learning_rate_at
from job.training.snapshot import Snapshot, put_back, read_snapshot, take_snapshot
from job.training.state import StepReport, TrainState

MIN_TOKEN_BUDGET = 16  # below it every sample goes alone, and a smaller budget changes nothing
MAX_SKIPPED_STEPS = 20  # in a row; the scaler's first few skips are normal

ShouldStop = Callable[[], None]


def _never() -> None:
    """A `should_stop` that never stops."""


class Trainer:
    """A model being trained by a recipe on one device."""

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        *,
        device: torch.device,
        token_budget: int,
        recompute: Recompute = "none",
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.device, self.dtype = device, model_dtype(model)
        self.set_plan(token_budget, recompute)
        self._packed = has_chunked_loss(model.get_base_model())
        self.parameters = list(trainable_parameters(model).values())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=0.0,
            betas=(0.9, 0.999),
            weight_decay=recipe.weight_decay,
            # Takes no memory and is one kernel: the update happens as a whole or not at all.
            fused=device.type == "cuda",
        )
        self.scaler = loss_scaler(device, self.dtype)

    def set_plan(self, token_budget: int, recompute: Recompute) -> None:
        """What a micro-batch may hold from now on; changes rounding and dropout's masks only."""
        self.token_budget, self.recompute = token_budget, recompute
        set_recompute(self.model, recompute)

    def step(
        self, table: SampleTable, state: TrainState, should_stop: ShouldStop = _never
    ) -> StepReport:
        """One optimizer step on the samples of `state.step`. Raises `torch.OutOfMemoryError`.

        Whatever is raised, also by `should_stop`, weights, moments and `state` are those before
        the step; partial gradients are dropped.
        """
        started = time.monotonic()
        learning_rate = learning_rate_at(self.recipe, state.step)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        indices = samples_of_step(self.recipe, len(table), state.step)
        num_targets = table.targets_of(indices)
        # Dropout must not depend on what ran before, or a resumed trial would differ.
        torch.manual_seed(derive_seed(self.recipe.seed, "step", state.step))
        batches = pack(table, indices, self._row_budget)
        total = self.accumulate(batches, num_targets, should_stop)
        grad_norm = self._update(state)
        train_loss = float(total) / num_targets
        state.step += 1
        state.diverged = (
            not math.isfinite(train_loss) or state.skipped_in_a_row >= MAX_SKIPPED_STEPS
        )
        seconds = time.monotonic() - started
        num_tokens = int(table.lengths[indices].sum())
        state.tokens += num_tokens
        state.clock_seconds += seconds
        state.step_seconds += seconds
        return StepReport(state.step, train_loss, learning_rate, grad_norm, num_tokens, seconds)

    def take_step(self, batches: Sequence[MicroBatch], state: TrainState) -> None:
        """Update the weights from given micro-batches, whatever step it is."""
        num_targets = sum(len(batch.targets) for batch in batches)
        self.accumulate(batches, num_targets)
        self._update(state)

    @out_of_memory_by_one_name()
    def accumulate(
        self, batches: Iterable[MicroBatch], num_targets: int, should_stop: ShouldStop = _never
    ) -> torch.Tensor:
        """Gradients of the mean over `num_targets` targets; return the summed NLL, fp32."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        # Summed on the device: reading a loss back after every micro-batch would stall the GPU.
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for batch in batches:
            should_stop()
            nll = self._nll(batch)
            self.scaler.scale(nll / num_targets).backward()  # type: ignore[no-untyped-call]
            total += nll.detach()
        return total

    def heaviest(self, table: SampleTable) -> MicroBatch:
        """The micro-batch that takes the most memory: the longest samples that share a row."""
        longest_first = np.argsort(table.lengths)[::-1].tolist()
        return next(pack(table, longest_first, self._row_budget))

    def ease(self) -> bool:
        """After a failed step: need less memory from now on. False if there is nothing to ease.

        Recomputing costs a third more, a smaller budget mostly less; but only after recomputing
        does one sample alone take the least, so this order is sure to come down to it.
        """
        if self.recompute != "all":
            self.set_plan(self.token_budget, "second" if self.recompute == "none" else "all")
        elif self.token_budget >= MIN_TOKEN_BUDGET:
            self.set_plan(self.token_budget // 2, "all")
        else:
            return False
        self.optimizer.zero_grad(set_to_none=True)
        for parameter, moments in list(self.optimizer.state.items()):
            if "exp_avg_sq" not in moments:  # made last: memory ran out while they were made
                del self.optimizer.state[parameter]
        # An OOM between unscaling and the update would leave the scaler refusing the next step.
        old = self.scaler.state_dict()
        self.scaler = loss_scaler(self.device, self.dtype)
        if old:
            self.scaler.load_state_dict(old)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def evaluate(
        self, table: SampleTable, state: TrainState, should_stop: ShouldStop = _never
    ) -> float:
        """eval/loss: summed NLL over all target tokens divided by their number, fp32 sums."""
        started = time.monotonic()
        total = self._summed_nll(table, should_stop)
        loss = float(total) / table.num_target_tokens
        state.clock_seconds += time.monotonic() - started
        return loss

    def snapshot(self) -> Snapshot:
        """Weights, moments and loss scale as they are now."""
        return take_snapshot(self.model, self.optimizer, self.scaler)

    def go_back(self, snapshot: Snapshot) -> None:
        """To what `snapshot` saw."""
        put_back(snapshot, self.model, self.optimizer, self.scaler)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write adapter and moments as safetensors; return what else `restore` needs, as JSON."""
        plan = {"token_budget": self.token_budget, "recompute": self.recompute}
        return {**self.snapshot().write(folder), **plan}

    def restore(self, folder: Path, saved: dict[str, Any]) -> None:
        """Put back what `save` wrote; the next step then computes what it would have computed."""
        self.go_back(read_snapshot(folder, saved))
        # The mode was not written by the first version.
        self.set_plan(saved["token_budget"], saved.get("recompute", self.recompute))

    @property
    def _row_budget(self) -> int:
        """Samples of a family that we do not know share no row."""
        return self.token_budget if self._packed else 1

    def _nll(self, batch: MicroBatch) -> torch.Tensor:
        # Entered here, around backbone and head alike; an autocast around an outer forward only
        # would not cover a backbone that is called directly.
        with autocast(self.device, self.dtype):
            return target_nll(self.model, batch.to(self.device))

    @out_of_memory_by_one_name()
    def _summed_nll(self, table: SampleTable, should_stop: ShouldStop) -> torch.Tensor:
        self.model.eval()
        # On the device, as in a step; in fp64, so that the number of micro-batches does not show.
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for batch in pack(table, range(len(table)), self._row_budget):
                should_stop()
                total += self._nll(batch)
        return total

    @out_of_memory_by_one_name()
    def _update(self, state: TrainState) -> float:
        """Step the optimizer; return the gradient's norm before clipping.

        If a gradient overflowed, the scaler skips the step and shrinks.
        """
        self.scaler.unscale_(self.optimizer)
        # The GPU is waited for here, and once more in the scaler: of a step's seconds, nothing.
        grad_norm = float(clip_grad_norm_(self.parameters, self.recipe.max_grad_norm))
        skipped = not math.isfinite(grad_norm)
        if not skipped or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
        return grad_norm
