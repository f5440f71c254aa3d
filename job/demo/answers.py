"""Answers of the demo's model before and after tuning, to be read by people."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from job.demo.pretraining import no_progress_bars


def pick_questions(rows_path: Path, n: int, seed: int) -> list[str]:
    """`n` different questions of the rows at `rows_path` (JSON lines, see `write_rows`).

    They are drawn from all rows, so most were trained on: samples show the format, not knowledge.
    """
    with rows_path.open(encoding="utf-8") as lines:
        questions = [str(json.loads(line)["question"]) for line in lines]
    return random.Random(seed).sample(questions, n)  # noqa: S311 - not for secrets


def generate_answers(
    model_dir: Path,
    adapter_dir: Path | None,
    questions: Sequence[str],
    *,
    max_new_tokens: int = 48,
) -> list[str]:
    """The most likely answer to each question, without special tokens; greedy, so no seed.

    The base is in plain fp32 on the CPU, although the adapter was trained on its 4-bit weights:
    the small difference does not matter for samples, `eval/loss` is measured as trained.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    with no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if adapter_dir is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter_dir)
    model.eval()
    answers = []
    for question in questions:  # one by one: a handful, and no padding to think about
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            tokens = model.generate(**prompt, do_sample=False, max_new_tokens=max_new_tokens)
        answer = tokens[0, prompt["input_ids"].shape[1] :]
        answers.append(str(tokenizer.decode(answer, skip_special_tokens=True)).strip())
    return answers
