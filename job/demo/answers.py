"""Answers of the demo's model before and after tuning, to be read by people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from job.base_model import BaseModel
from job.data.samples import SampleTable
from job.data.tokens import load_tokenizer


@dataclass(frozen=True)
class HeldOutRow:
    """A row that no trial of the sweep trained on."""

    question: str
    answer: str
    prompt: tuple[int, ...]  # the tokens before the answer, as the trials' evaluation has them


@dataclass(frozen=True)
class Answers:
    """What the model answers, untuned and with the adapter."""

    before: str
    after: str


def first_held_out(
    rows_path: Path, table: SampleTable, base: BaseModel, count: int
) -> list[HeldOutRow]:
    """The first rows of an evaluation's table, found again in the JSON lines at `rows_path`."""
    tokenizer = load_tokenizer(base.location, base.hub_revision)
    rows = [json.loads(line) for line in rows_path.read_text(encoding="utf-8").splitlines()]
    found = []
    for start, end in zip(table.offsets[:count], table.offsets[1:], strict=False):
        length = int(table.is_target[start:end].argmax())
        prompt = tuple(table.input_ids[start : start + length].tolist())
        text = tokenizer.decode(prompt)
        found += [
            HeldOutRow(row["question"], row["answer"], prompt)
            for row in rows
            if row["question"] in text
        ][:1]
    return found


def generate_answers(
    base: BaseModel,
    adapter_dir: Path,
    prompts: Iterable[Sequence[int]],
    *,
    max_new_tokens: int = 48,
) -> list[Answers]:
    """The most likely answers to each prompt, without special tokens; greedy, so no seed.

    The base is in plain fp32 on the CPU, although the adapter was trained on its 4-bit weights:
    the small difference does not matter for samples, `eval/loss` is measured as trained.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = load_tokenizer(base.location, base.hub_revision)
    untuned = AutoModelForCausalLM.from_pretrained(
        base.location, revision=base.hub_revision or "main", dtype=torch.float32
    )
    model = PeftModel.from_pretrained(untuned, adapter_dir).eval()

    def answer(prompt: Sequence[int]) -> str:  # one by one: a handful, and no padding
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            tokens = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_new_tokens,
            )
        return str(tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True)).strip()

    found = []
    for prompt in prompts:
        with model.disable_adapter():
            before = answer(prompt)
        found.append(Answers(before, answer(prompt)))
    return found
