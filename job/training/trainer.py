"""`Trainer`: a model with its optimizer and loss scaler, and what can be done with them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils import clip_grad_norm_

from job.data.samples import SampleTable
from job.ledger.records import Recipe
from job.training.batching import MicroBatch, heaviest, pack, samples_of_step
from job.training.footprint import Recompute
from job.training.gpu_faults import out_of_memory_by_one_name
from job.training.loss import has_chunked_loss, sample_nll, target_nll
from job.training.model import set_recompute, trainable_parameters
from job.training.precision import autocast, loss_scaler, model_dtype
from job.training.recipe import derive_seed, learning_rate_at
from job.training.snapshot import Snapshot, put_back, read_snapshot, take_snapshot
from job.training.state import StepReport, TrainState

MIN_TOKEN_BUDGET = 16  # below it every sample goes alone, and a smaller budget changes nothing
MAX_SKIPPED_STEPS = 20  # in a row; the scaler's first few skips are normal

ShouldStop = Callable[[], None]  # raises to stop; asked before every micro-batch


def never_stop() -> None:
    """A `should_stop` that never stops."""


@dataclass(frozen=True)
class Evaluation:
    """The negative log-likelihood of a table's targets, sample by sample."""

    nll: NDArray[np.float64]  # (samples,), in nats, summed over the sample's targets
    targets: NDArray[np.int64]  # (samples,), how many

    @property
    def loss(self) -> float:
        """The mean over all target tokens: the sum is divided once, whatever the packing was."""
        return float(self.nll.sum() / self.targets.sum())


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
        """Set how many tokens a micro-batch may hold, and which layers are recomputed, from now on.

        Changes only the rounding of sums and dropout's masks.
        """
        self.token_budget, self.recompute = token_budget, recompute
        set_recompute(self.model, recompute)

    def step(
        self, table: SampleTable, state: TrainState, should_stop: ShouldStop = never_stop
    ) -> StepReport:
        """Take the optimizer step number `state.step` (the first is 0) and count it in `state`.

        Raises `torch.OutOfMemoryError` and what `should_stop` raises; weights, moments and `state`
        are then those before the step, and partial gradients are dropped.
        """
        started = time.monotonic()
        learning_rate = learning_rate_at(self.recipe, state.step)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        indices = samples_of_step(self.recipe, len(table), state.step)
        num_targets = table.targets_of(indices)
        # Dropout must not depend on what ran before, or a resumed trial would differ.
        torch.manual_seed(derive_seed(self.recipe.seed, "step", state.step))
        batches = pack(table, indices, self.row_budget)
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
        """Update the weights once from given micro-batches, at the learning rate as it is."""
        num_targets = sum(len(batch.targets) for batch in batches)
        self.accumulate(batches, num_targets)
        self._update(state)

    @out_of_memory_by_one_name()
    def accumulate(
        self, batches: Iterable[MicroBatch], num_targets: int, should_stop: ShouldStop = never_stop
    ) -> torch.Tensor:
        """Add up the gradients of `batches`, of their summed NLL divided by `num_targets`.

        Returns the summed negative log-likelihood in nats, a fp32 scalar on the device. Raises
        `torch.OutOfMemoryError`.
        """
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
        """Make the micro-batch that takes the most memory of all that `table` can give."""
        return heaviest(table, self.recipe.samples_per_step, self.row_budget)

    def ease(self) -> bool:
        """Need less memory from now on, after a step that ran out of it; False if that cannot be.

        First more layers are recomputed, then the token budget is halved. Recomputing all layers
        costs a third more time, a smaller budget mostly less; but a single sample takes the least
        memory only with all layers recomputed, so this order is sure to come down to that.
        """
        if self.recompute != "all":
            self.set_plan(self.token_budget, "second" if self.recompute == "none" else "all")
        elif self.token_budget >= MIN_TOKEN_BUDGET:
            self.set_plan(self.token_budget // 2, "all")
        else:
            return False
        self.drop_partial_step()
        return True

    def drop_partial_step(self) -> None:
        """Drop what a step that ran out of memory left behind, and give its memory back."""
        self.optimizer.zero_grad(set_to_none=True)
        for parameter, moments in list(self.optimizer.state.items()):
            if "exp_avg_sq" not in moments:  # the last one made: memory ran out before it
                del self.optimizer.state[parameter]
        # A scaler whose step ran out of memory after unscaling would refuse the next step.
        old = self.scaler.state_dict()
        self.scaler = loss_scaler(self.device, self.dtype)
        if old:
            self.scaler.load_state_dict(old)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def evaluate(
        self, table: SampleTable, state: TrainState, should_stop: ShouldStop = never_stop
    ) -> float:
        """Measure eval/loss, as `evaluate_rows` does, for those who need no more."""
        return self.evaluate_rows(table, state, should_stop).loss

    def evaluate_rows(
        self, table: SampleTable, state: TrainState, should_stop: ShouldStop = never_stop
    ) -> Evaluation:
        """Measure the negative log-likelihood of every sample's targets.

        Its seconds are added to the training clock. Raises `torch.OutOfMemoryError` and what
        `should_stop` raises.
        """
        started = time.monotonic()
        nll = self._row_nll(table, should_stop)
        targets = np.add.reduceat(table.is_target, table.offsets[:-1], dtype=np.int64)
        state.clock_seconds += time.monotonic() - started
        return Evaluation(nll, targets)

    def snapshot(self) -> Snapshot:
        """Copy the weights, the optimizer's moments and the loss scale as they are now."""
        return take_snapshot(self.model, self.optimizer, self.scaler)

    def go_back(self, snapshot: Snapshot) -> None:
        """Restore the state that `snapshot` saved."""
        put_back(snapshot, self.model, self.optimizer, self.scaler)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write adapter and moments as safetensors; return what else `restore` needs, as JSON."""
        plan = {"token_budget": self.token_budget, "recompute": self.recompute}
        return {**self.snapshot().write(folder), **plan}

    def restore(self, folder: Path, saved: dict[str, Any]) -> None:
        """Put back what `save` wrote; the next step then computes what it would have computed."""
        self.go_back(read_snapshot(folder, saved))
        # The first version wrote no recompute mode.
        self.set_plan(saved["token_budget"], saved.get("recompute", self.recompute))

    @property
    def row_budget(self) -> int:
        """The token budget of `pack`: 1 puts each sample of an unknown family into its own row."""
        return self.token_budget if self._packed else 1

    def _nll(self, batch: MicroBatch) -> torch.Tensor:
        # `target_nll` calls backbone and head itself, so autocast has to be entered around both.
        with autocast(self.device, self.dtype):
            return target_nll(self.model, batch.to(self.device))

    @out_of_memory_by_one_name()
    def _row_nll(self, table: SampleTable, should_stop: ShouldStop) -> NDArray[np.float64]:
        self.model.eval()
        causal_lm, parts = self.model.get_base_model(), []
        with torch.no_grad(), autocast(self.device, self.dtype):
            for batch in pack(table, range(len(table)), self.row_budget):
                should_stop()
                parts.append(sample_nll(causal_lm, batch.to(self.device)))
        # Read back once: in fp64, so that the packing does not show.
        nll: NDArray[np.float64] = torch.cat(parts).cpu().numpy()
        return nll

    @out_of_memory_by_one_name()
    def _update(self, state: TrainState) -> float:
        """Clip the gradients and step the optimizer; return the gradients' norm before clipping.

        If a gradient overflowed, nothing is updated and the loss scale shrinks.
        """
        self.scaler.unscale_(self.optimizer)
        # Reading the norm waits for the GPU, and so does the scaler; next to a step it is nothing.
        grad_norm = float(clip_grad_norm_(self.parameters, self.recipe.max_grad_norm))
        skipped = not math.isfinite(grad_norm)
        if not skipped or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
        return grad_norm
