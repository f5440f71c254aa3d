"""Our loop against transformers.Trainer, step by step. `pytest tests/test_training_oracle.py`"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.data.samples import SampleTable
from job.training.recipe import Recipe
from tests.tiny_model import make_base, make_recipe, make_table

pytestmark = [
    pytest.mark.slow,
    # Trainer's own: its tensorboard hook, and pin_memory without an accelerator.
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


def _padded_rows(table: SampleTable) -> list[dict[str, list[int]]]:
    rows = []
    for start, end in zip(table.offsets[:-1], table.offsets[1:], strict=True):
        ids, targets = table.input_ids[start:end], table.is_target[start:end]
        rows.append({"input_ids": ids.tolist(), "labels": np.where(targets, ids, -100).tolist()})
    return rows


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    pad = lambda values, filler: values + [filler] * (longest - len(values))  # noqa: E731
    return {
        "input_ids": torch.tensor([pad(row["input_ids"], 0) for row in rows]),
        "labels": torch.tensor([pad(row["labels"], -100) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
    }


def _oracle_losses(
    base: Path, table: SampleTable, recipe: Recipe, output_dir: Path
) -> list[tuple[float, float, float]]:
    """(loss, learning rate, gradient norm) of each step by transformers.Trainer."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from job.training.batching import samples_of_step
    from job.training.model import add_adapters, load_base

    order = [
        index
        for step in range(recipe.planned_steps)
        for index in samples_of_step(recipe, len(table), step)
    ]

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.rows: list[tuple[float, float, float]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.rows.append((logs["loss"], logs["learning_rate"], logs["grad_norm"]))

    class InOurOrder(Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            class Order(torch.utils.data.Sampler[int]):
                def __iter__(self) -> Iterator[int]:
                    return iter(order)

                def __len__(self) -> int:
                    return len(order)

            return Order()

    model = add_adapters(load_base(str(base), None, torch.device("cpu")), recipe, recompute=False)
    recorder = Recorder()
    trainer = InOurOrder(
        model=model,
        args=TrainingArguments(
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
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=_padded_rows(table),
        data_collator=_collate,
        callbacks=[recorder],
    )
    trainer.train()
    return recorder.rows


def _our_losses(
    base: Path, table: SampleTable, recipe: Recipe, token_budget: int
) -> list[tuple[float, float, float]]:
    import torch

    from job.training.loop import Trainer, TrainState
    from job.training.model import add_adapters, load_base

    device = torch.device("cpu")
    model = add_adapters(load_base(str(base), None, device), recipe, recompute=False)
    trainer, state = Trainer(model, recipe, device=device, token_budget=token_budget), TrainState()
    reports = [trainer.step(table, state) for _ in range(recipe.planned_steps)]
    return [(r.train_loss, r.learning_rate, r.grad_norm) for r in reports]


@pytest.mark.parametrize("lr_scheduler", ["linear", "cosine"])
def test_losses_equal_the_trainers_to_1e_5_over_20_steps(tmp_path: Path, lr_scheduler: str) -> None:
    base = make_base(tmp_path / "base")
    table = make_table(30, seed=1)  # 20 steps of 4 cross the end of the epoch twice
    recipe = make_recipe(lr_scheduler=lr_scheduler)
    ours = _our_losses(base, table, recipe, token_budget=60)
    oracle = _oracle_losses(base, table, recipe, tmp_path / "trainer")
    assert len(ours) == len(oracle) == 20
    for step, (mine, theirs) in enumerate(zip(ours, oracle, strict=True)):
        # The first losses sit at ln(128) = 4.85; 1e-5 relative is 5e-5 of it.
        assert math.isclose(mine[0], theirs[0], rel_tol=0, abs_tol=1e-5), (step, mine, theirs)
        assert math.isclose(mine[1], theirs[1], rel_tol=1e-9, abs_tol=1e-12), (step, mine, theirs)
        assert math.isclose(mine[2], theirs[2], rel_tol=1e-4), (step, mine, theirs)
    assert ours[-1][0] < ours[0][0] - 0.1, "the comparison must cover real learning"
