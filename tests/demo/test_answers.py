"""Held-out questions and their answers, on a tiny model. `pytest tests/demo/test_answers.py`"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from job.base_model import BaseModel
from job.data.samples import SampleTable
from job.demo.answers import first_held_out, generate_answers
from tests.tiny_model import make_base
from tests.tiny_tokenizer import byte_level_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("base")
    byte_level_tokenizer().save_pretrained(folder)
    make_base(folder, vocab_size=600)
    return BaseModel("base", str(folder), "sha256:0", {})


def test_the_rows_of_an_evaluation_are_found_by_their_questions(
    base: BaseModel, tmp_path: Path
) -> None:
    tokenizer = byte_level_tokenizer()
    rows = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}."} for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples, targets, prompts = [], [], []
    for number in (7, 2, 5):
        turns = [{"role": "user", "content": rows[number]["question"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        answer = tokenizer(rows[number]["answer"])["input_ids"]
        samples.append(np.array([*prompt, *answer], dtype=np.int32))
        targets.append(np.arange(len(samples[-1])) >= len(prompt))
        prompts.append(tuple(prompt))
    table = SampleTable.concatenate(samples, targets)
    found = first_held_out(tmp_path / "rows.jsonl", table, base, 2)
    assert [(row.question, row.answer) for row in found] == [
        ("What is 7 plus 7?", "It is 14."),
        ("What is 2 plus 2?", "It is 4."),
    ]
    assert [row.prompt for row in found] == prompts[:2]


def test_before_is_the_base_alone_and_after_is_with_the_adapter(
    base: BaseModel, tmp_path: Path
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base.location)
    prompts = [(5, 6, 7), (9, 8)]
    plain = [
        model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)
        for prompt in prompts
    ]
    torch.manual_seed(17)
    # Not the identity that LoRA starts from: a random adapter.
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, adapter).save_pretrained(tmp_path)
    answers = generate_answers(base, tmp_path, prompts, max_new_tokens=8)
    tokenizer = byte_level_tokenizer()
    assert [answer.before for answer in answers] == [
        tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True).strip()
        for tokens, prompt in zip(plain, prompts, strict=True)
    ]
    assert all(answer.after != answer.before for answer in answers)
