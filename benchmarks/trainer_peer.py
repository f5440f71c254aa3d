"""The peer: `transformers.Trainer`, padded, on our samples in our order; the tests' oracle too."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from job.data.samples import SampleTable
from job.ledger.records import Recipe
from job.training.batching import samples_of_step


@dataclass(frozen=True)
class PeerStep:
    """What the Trainer logged for one optimizer step."""

    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float


class _Recorder(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.steps: list[PeerStep] = []
        self._started = 0.0
        self._seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds = time.monotonic() - self._started

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.steps.append(
                PeerStep(logs["loss"], logs["learning_rate"], logs["grad_norm"], self._seconds)
            )


class _InOurOrder(Trainer):  # type: ignore[misc]
    """Takes the samples as `samples_of_step` gives them."""

    order: list[int]

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        order = self.order

        class Order(torch.utils.data.Sampler[int]):
            def __iter__(self) -> Iterator[int]:
                return iter(order)

            def __len__(self) -> int:
                return len(order)

        return Order()


def train_with_trainer(
    model: Any, table: SampleTable, recipe: Recipe, output_dir: Path, *, on_gpu: bool = False
) -> list[PeerStep]:
    """Train `model` by the same recipe; micro-batches are padded to their longest.

    On a GPU in fp16, with all layers recomputed.
    """
    as_peft_leaves_it(model)
    recorder = _Recorder()
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=recipe.planned_steps,
        per_device_train_batch_size=recipe.per_device_train_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup_steps=recipe.warmup_ratio,
        lr_scheduler_type=recipe.lr_scheduler,
        max_grad_norm=recipe.max_grad_norm,
        optim="adamw_torch",
        logging_steps=1,
        use_cpu=not on_gpu,
        fp16=on_gpu,
        activation_checkpointing=on_gpu,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = _InOurOrder(
        model=model,
        args=arguments,
        train_dataset=_rows(table),
        data_collator=_collate,
        callbacks=[recorder],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.order = [
        index
        for step in range(recipe.planned_steps)
        for index in samples_of_step(recipe, len(table), step)
    ]
    trainer.train()
    return recorder.steps


def as_peft_leaves_it(model: Any) -> None:
    """Nothing of ours: transformers' attention, PEFT's own forward pass."""
    model.get_base_model().set_attn_implementation("sdpa")
    for module in model.modules():
        module.__dict__.pop("forward", None)


def _rows(table: SampleTable) -> list[dict[str, list[int]]]:
    rows = []
    for start, end in zip(table.offsets[:-1], table.offsets[1:], strict=True):
        ids, targets = table.input_ids[start:end], table.is_target[start:end]
        rows.append({"input_ids": ids.tolist(), "labels": np.where(targets, ids, -100).tolist()})
    return rows


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (longest - len(values))

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], 0) for row in rows]),
        "labels": torch.tensor([padded(row["labels"], -100) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
    }
