"""The demo's base model, with real but short pre-training.

`pytest tests/demo/test_generated_base.py`
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job.demo.answers import generate_answers
from job.demo.generated_base import BaseInfo, ensure_base
from job.demo.pretraining import PretrainingPlan
from job.demo.tokenizer import train_tokenizer

SHORT = PretrainingPlan(
    num_steps=30, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2
)
ONE_STEP = replace(SHORT, num_steps=1)
MESSAGES = [
    {"role": "user", "content": "What does `posixpath.join` do?"},
    {"role": "assistant", "content": "`join` is part of `posixpath`."},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["Join two or more pathname components."], vocab_size=300, max_length=64)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def short_base(cache_dir: Path) -> BaseInfo:
    return ensure_base(cache_dir, plan=SHORT)


def test_chat_template_ends_every_message(tokenizer: Any) -> None:
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == (
        "<s><|user|>What does `posixpath.join` do?</s>"
        "<|assistant|>`join` is part of `posixpath`.</s>"
    )


def test_prompt_is_a_prefix_of_the_whole_conversation(tokenizer: Any) -> None:
    whole = tokenizer.apply_chat_template(MESSAGES, tokenize=True)["input_ids"]
    prompt = tokenizer.apply_chat_template(MESSAGES[:1], add_generation_prompt=True)["input_ids"]
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(prompt[-1]) == "<|assistant|>"
    assert tokenizer.decode(whole[len(prompt) :]) == "`join` is part of `posixpath`.</s>"


def test_tokenizer_adds_no_second_bos_and_knows_every_byte(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False) + " naïve 東京 \x00"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids) == text


@pytest.fixture(scope="module")
def one_step_base(cache_dir: Path, short_base: BaseInfo) -> BaseInfo:
    return ensure_base(cache_dir, plan=ONE_STEP)


@pytest.mark.slow
def test_short_pretraining_lowers_the_held_out_loss(short_base: BaseInfo) -> None:
    assert not short_base.was_cached
    assert short_base.steps == 30
    assert 7.5 < short_base.held_out_loss_before < 7.8  # ln(2048) = 7.62
    assert short_base.held_out_loss_after < short_base.held_out_loss_before - 0.5


@pytest.mark.slow
def test_second_call_takes_the_model_from_the_cache(short_base: BaseInfo, cache_dir: Path) -> None:
    def fail(*_: object) -> None:
        pytest.fail("trained again")

    cached = ensure_base(cache_dir, plan=SHORT, on_progress=fail)
    assert cached.was_cached
    assert cached.model_dir == short_base.model_dir
    assert cached.held_out_loss_after == short_base.held_out_loss_after
    assert not list(cache_dir.glob(".*"))  # nothing half-made is left


@pytest.mark.slow
def test_same_plan_gives_the_same_weights_and_reports_each_step(
    short_base: BaseInfo, tmp_path: Path
) -> None:
    calls: list[tuple[int, int, float]] = []
    again = ensure_base(tmp_path, plan=SHORT, on_progress=lambda *call: calls.append(call))
    weights = [info.model_dir / "model.safetensors" for info in (short_base, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert [call[:2] for call in calls] == [(step, 30) for step in range(1, 31)]
    assert calls[-1][2] < calls[0][2]


@pytest.mark.slow
def test_interrupted_preparation_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(step: int, _: int, __: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_base(tmp_path, plan=SHORT, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["marker missing", "marker cut short", "weights flipped"])
def test_damaged_model_is_made_again(one_step_base: BaseInfo, tmp_path: Path, damage: str) -> None:
    model_dir = tmp_path / one_step_base.model_dir.name
    shutil.copytree(one_step_base.model_dir, model_dir)
    marker, weights = model_dir / "base.json", model_dir / "model.safetensors"
    good = weights.read_bytes()
    if damage == "marker missing":  # as after SIGKILL, had the folder had its name already
        marker.unlink()
    elif damage == "marker cut short":
        marker.write_text(marker.read_text()[:40])
    else:
        weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert not ensure_base(tmp_path, plan=ONE_STEP).was_cached
    assert weights.read_bytes() == good
    assert ensure_base(tmp_path, plan=ONE_STEP).was_cached


@pytest.mark.slow
def test_other_plan_is_another_folder(short_base: BaseInfo, one_step_base: BaseInfo) -> None:
    assert one_step_base.model_dir != short_base.model_dir
    assert not one_step_base.was_cached
    assert one_step_base.steps == 1


@pytest.mark.slow
def test_folder_is_a_plain_llama_in_fp32(short_base: BaseInfo) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    config = json.loads((short_base.model_dir / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    model = AutoModelForCausalLM.from_pretrained(short_base.model_dir)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.slow
def test_answers_are_text_and_repeatable(short_base: BaseInfo) -> None:
    questions = ["What does `posixpath.join` do?", "What is `re` for?"]
    answers = generate_answers(short_base.model_dir, None, questions, max_new_tokens=8)
    assert len(answers) == 2
    assert all(isinstance(answer, str) and "<" not in answer for answer in answers)
    assert answers == generate_answers(short_base.model_dir, None, questions, max_new_tokens=8)


@pytest.mark.slow
def test_adapter_changes_the_answers(short_base: BaseInfo, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(17)
    model = AutoModelForCausalLM.from_pretrained(short_base.model_dir)
    # Not the identity that LoRA starts from: a random adapter.
    adapter = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    adapter.save_pretrained(tmp_path)
    questions = ["What does `posixpath.join` do?"]
    tuned = generate_answers(short_base.model_dir, tmp_path, questions, max_new_tokens=8)
    assert tuned != generate_answers(short_base.model_dir, None, questions, max_new_tokens=8)
