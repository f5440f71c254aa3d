"""How fast this CPU trains a base: real optimizer steps on random weights of its shape."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from job.data.samples import SampleTable
from job.ledger.records import Recipe
from job.training.model import add_adapters, load_base
from job.training.shape import ModelShape, model_shape
from job.training.state import StepReport, TrainState
from job.training.trainer import Trainer

# Deep enough that the layers take most of the time; a 7B's two layers take 2 GB of memory.
NUM_LAYERS = 2
VOCABULARY = 1024  # the head is a matrix product as others are, and would need the most memory
STEPS = 2  # timed, after one that warms up
# A step of many long samples takes minutes; so much of one is timed as takes about a second.
STEP_SECONDS = 1.0
SECONDS = 5.0  # and no further step is taken after so many
CPU = torch.device("cpu")


def measured_on_this_cpu(
    config: Mapping[str, Any], table: SampleTable, recipe: Recipe, token_budget: int
) -> tuple[ModelShape, float]:
    """Time optimizer steps of this `config.json` two layers deep; return its shape and tokens/s.

    A step that would take seconds is timed in part. `table` is trained on, its tokens' numbers
    folded into a small vocabulary; nothing of the base's weights is read.
    """
    shallow = {name: value for name, value in config.items() if name != "quantization_config"}
    shallow.pop("layer_types", None)  # one for each layer; transformers fills it in
    shallow |= {
        "num_hidden_layers": min(NUM_LAYERS, int(config["num_hidden_layers"])),
        "vocab_size": VOCABULARY,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    }
    shape = model_shape(shallow)
    assert shape is not None, "a family whose shape is not known"
    logging.disable_progress_bar()  # of one file of random weights
    folded = SampleTable(table.input_ids % VOCABULARY, table.is_target, table.offsets)
    with tempfile.TemporaryDirectory(prefix="shallow-") as folder, torch.random.fork_rng([]):
        random = AutoConfig.for_model(shallow.pop("model_type"), **shallow)
        AutoModelForCausalLM.from_config(random, dtype=torch.float16).save_pretrained(folder)
        model = add_adapters(load_base(folder, None, CPU), recipe)
    trainer = Trainer(model, recipe, device=CPU, token_budget=token_budget)
    reports = timed_steps(trainer, folded)
    tokens = sum(report.num_tokens for report in reports)
    return shape, tokens / sum(report.seconds for report in reports)


def timed_steps(trainer: Trainer, table: SampleTable) -> Sequence[StepReport]:
    """Take steps of one sample, two, four and so on, until they are whole or take long enough.

    Steps of that size are returned. The first one warms up, and counts only where
    a single sample takes all the time that there is.
    """
    recipe, whole = trainer.recipe, trainer.recipe.samples_per_step
    state, part, spent = TrainState(), 1, 0.0
    timed: list[StepReport] = []
    while len(timed) < STEPS and not (timed and spent >= SECONDS):
        trainer.recipe = recipe.changed(
            per_device_train_batch_size=1,
            gradient_accumulation_steps=part,
            planned_steps=whole + STEPS,  # more than there will be
        )
        report = trainer.step(table, state)
        spent += report.seconds
        if not timed and part < whole and report.seconds < STEP_SECONDS:
            part = min(whole, 2 * part)
        elif state.step > 1 or spent >= SECONDS:
            timed.append(report)
    trainer.recipe = recipe
    return timed
