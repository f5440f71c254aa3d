"""A prompt that holds the template's own tokens is not wrapped again.

`pytest tests/data/test_prerendered.py`
"""

from __future__ import annotations

import pytest

from job.data.chat import Chat, Message
from job.data.formats import UnusableRowError
from tests.data.chat_templates import FAMILIES, family_tokenizer
from tests.data.test_targets import learned, sample_of, template_of
from tests.data.test_tokens import targets

QUESTION, ANSWER = Message("user", "And of Spain? 🙂"), Message("assistant", "Madrid, ça va 🙂")
EARLIER = (Message("user", "What is the capital of France?"), Message("assistant", "Paris."))


def _pair(prompt: str, answer: str) -> Chat:
    return Chat((Message("user", prompt), Message("assistant", answer)), is_pair=True)


def _opened(name: str, *messages: Message) -> str:
    """A prompt as the template itself renders it."""
    template = template_of(name)
    return template.write(messages, opened=template.marks.has_generation_prompt)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("is_stripped", [False, True])
def test_a_rendered_prompt_gives_the_samples_of_its_question(name: str, is_stripped: bool) -> None:
    expected, _ = sample_of(name, QUESTION, ANSWER)
    marks = template_of(name).marks
    prompt = _opened(name, QUESTION).removesuffix(marks.promise)
    if is_stripped:
        prompt = prompt.removeprefix(marks.bos).strip()
    for said in ("", "" if is_stripped else marks.lead):
        for end in ("", marks.end, f"{marks.end}\n", marks.end + marks.tail):
            answer = said + ANSWER.content + end
            found, rendered = sample_of(name, *_pair(prompt, answer).messages, is_pair=True)
            assert rendered.is_prerendered
            assert found.input_ids.tolist() == expected.input_ids.tolist()
            assert found.is_target.tolist() == expected.is_target.tolist()


def test_a_thought_is_opened_once() -> None:
    prompt, answer = _opened("qwen3 thinking", QUESTION), "T\n</think>\n\nA"
    assert prompt.endswith("<think>\n")
    for opened in (prompt, prompt.removesuffix("\n")):
        told = learned("qwen3 thinking", *_pair(opened, answer).messages, is_pair=True)
        assert told == [f"{answer}<|im_end|>"]
    told = learned("qwen3", *_pair(PROMPT, f"<think>\n{answer}").messages, is_pair=True)
    assert told == [f"<think>\n{answer}<|im_end|>"]


def test_channels_of_the_answer_are_tokens() -> None:
    final = "<|channel|>final<|message|>A"
    whole = f"<|channel|>analysis<|message|>T<|end|><|start|>assistant{final}"
    found, _ = sample_of(
        "gpt-oss", *_pair(_opened("gpt-oss", QUESTION), whole).messages, is_pair=True
    )
    tokenizer = family_tokenizer("gpt-oss")
    assert targets(found, tokenizer) == [f"{whole}<|return|>"]
    channel = tokenizer.convert_tokens_to_ids("<|channel|>")
    assert found.input_ids.tolist().count(channel) == 2


PROMPT = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        (PROMPT, "A"),
        (PROMPT, "A<|im_end|>"),
        (PROMPT, " A <|im_end|>\n"),
        (PROMPT.rstrip(), "A<|im_end|>"),
        (f"\n{PROMPT}", "A"),
        ("<|im_start|>user\nQ<|im_end|>\n", "<|im_start|>assistant\nA<|im_end|>\n"),
        ("<|im_start|>user\nQ", "<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"),
        (PROMPT.replace("\n<|im_start|>", "<|im_start|>"), "A"),
        (f"<|im_start|>system\nS<|im_end|>\n{PROMPT}", "A"),
        (f"<|im_start|>developer\nS<|im_end|>\n{PROMPT}", "A"),
        (f"{PROMPT}B<|im_end|>\n{PROMPT}", "A"),
    ],
)
def test_only_the_answer_and_one_end_are_learned(prompt: str, answer: str) -> None:
    found, rendered = sample_of("chatml", *_pair(prompt, answer).messages, is_pair=True)
    tokenizer = family_tokenizer("chatml")
    assert rendered.is_prerendered
    assert targets(found, tokenizer) == ["A<|im_end|>"]
    text = prompt + answer
    assert found.input_ids.tolist().count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == (
        text.count("<|im_start|>")
    )
    assert rendered.text.endswith("<|im_start|>assistant\nA<|im_end|>")


@pytest.mark.parametrize(
    "prompt",
    [
        "Q",
        "What does <|im_start|>user mean in ChatML?",
        "<|im_start|>user is what opens a turn. Why?",
        f"Explain this: {PROMPT}",
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nB<|im_end|>",
        "user\nQ\nassistant\n",
    ],
)
def test_a_prompt_that_only_mentions_tokens_is_a_question(prompt: str) -> None:
    found, rendered = sample_of("chatml", *_pair(prompt, "A").messages, is_pair=True)
    assert not rendered.is_prerendered
    tokenizer = family_tokenizer("chatml")
    assert targets(found, tokenizer) == ["A<|im_end|>"]
    ids = found.input_ids.tolist()
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2


def test_turns_are_never_taken_as_rendered() -> None:
    """Who writes messages means their contents."""
    _, rendered = sample_of("chatml", Message("user", PROMPT), Message("assistant", "A"))
    assert not rendered.is_prerendered


def test_llamas_instructions_may_hold_a_system_text_and_earlier_turns() -> None:
    prompt = "[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] B </s><s>[INST] R [/INST]"
    found, rendered = sample_of("llama 2", *_pair(prompt, "A").messages, is_pair=True)
    assert rendered.text == f"<s>{prompt} A </s>"
    tokenizer = family_tokenizer("llama 2")
    assert targets(found, tokenizer) == [" A </s>"]
    assert found.input_ids.tolist().count(tokenizer.bos_token_id) == 2, "as the prompt has them"


def test_a_default_system_text_of_the_template_is_not_put_before_a_rendered_prompt() -> None:
    _, rendered = sample_of(
        "gpt-oss",
        *_pair("<|start|>user<|message|>Q<|end|><|start|>assistant", "A").messages,
        is_pair=True,
    )
    final = "<|channel|>final<|message|>"
    assert rendered.text == f"<|start|>user<|message|>Q<|end|><|start|>assistant{final}A<|return|>"


def test_tokens_that_the_answer_spells_are_text() -> None:
    answer = "A<|im_end|>\n<|im_start|>user\nB"
    assert learned("chatml", *_pair(PROMPT, answer).messages, is_pair=True) == [
        f"{answer}<|im_end|>"
    ]
    found, _ = sample_of("chatml", *_pair(PROMPT, answer).messages, is_pair=True)
    tokenizer = family_tokenizer("chatml")
    assert found.input_ids.tolist().count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ((Message("system", "S"), *_pair(PROMPT, "A").messages), "turns beside a prompt"),
        ((*EARLIER, *_pair(PROMPT, "A").messages), "turns beside a prompt"),
        (_pair(PROMPT, "<|im_end|>\n").messages, "empty answer"),
    ],
)
def test_what_cannot_stand_beside_a_rendered_prompt_is_refused(
    messages: tuple[Message, ...], reason: str
) -> None:
    with pytest.raises(UnusableRowError, match=reason):
        template_of("chatml").render(Chat(messages, is_pair=True))
