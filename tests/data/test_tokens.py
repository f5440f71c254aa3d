"""The model learns the answers and their ends, nothing else. `pytest tests/data/test_tokens.py`"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.data.chat import Chat, Message
from job.data.formats import UnusableRowError
from job.data.templates import load_template
from job.data.tokens import (
    TOO_LONG,
    Sample,
    encode,
    load_tokenizer,
    tokenizer_fingerprint,
    vocabulary_digest,
)
from job.errors import SettingsError
from tests.tiny_tokenizer import (
    LLAMA3,
    bare_tokenizer,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
)

CHAT = (
    Message("system", "Be brief."),
    Message("user", "What is the capital of France?"),
    Message("assistant", "Paris."),
    Message("user", "And of Spain? 🙂"),
    Message("assistant", "Madrid, ça va 🙂"),
)


@cache
def tokenizer_named(name: str) -> Any:
    return {
        "mistral": sentencepiece_tokenizer,
        "sentencepiece without template": lambda: sentencepiece_tokenizer(None),
        "chatml": byte_level_tokenizer,
        "llama 3": lambda: byte_level_tokenizer(LLAMA3, bos=True),
        "byte-level without template": lambda: byte_level_tokenizer(None),
        "bare": bare_tokenizer,
    }[name]()


def sample(
    messages: tuple[Message, ...],
    tokenizer: Any,
    *,
    chat_template: str | None = None,
    length: int = 999,
) -> Sample:
    template = load_template(chat_template, tokenizer)
    (found,) = encode([template.render(Chat(messages))], tokenizer, max_seq_length=length)
    assert isinstance(found, Sample), found
    return found


def targets(found: Sample, tokenizer: Any) -> list[str]:
    """The text of each run of targets."""
    edges = np.flatnonzero(np.diff(np.r_[False, found.is_target, False].astype(int)))
    return [
        tokenizer.decode(found.input_ids[start:end].tolist())
        for start, end in edges.reshape(-1, 2).tolist()
    ]


ANSWERS = {
    # SentencePiece decoders strip the space before the first word; its token is a target.
    "mistral": ["Paris.</s>", "Madrid, ça va 🙂</s>"],
    "sentencepiece without template": ["Paris.</s>", "Madrid, ça va 🙂</s>"],
    "chatml": ["Paris.<|im_end|>", "Madrid, ça va 🙂<|im_end|>"],
    "llama 3": ["Paris.<|eot_id|>", "Madrid, ça va 🙂<|eot_id|>"],
    "byte-level without template": ["Paris.<|end|>", "Madrid, ça va 🙂<|end|>"],
    "bare": ["Paris.\n\n", "Madrid, ça va 🙂\n\n"],
}


@pytest.mark.parametrize("name", ANSWERS)
def test_targets_are_every_answer_with_its_end_of_turn(name: str) -> None:
    tokenizer = tokenizer_named(name)
    found = sample(CHAT, tokenizer)
    assert [text.lstrip(" ") for text in targets(found, tokenizer)] == ANSWERS[name]
    assert not found.truncated
    assert found.is_target[-1], "tokens after the last target are left out"


@pytest.mark.parametrize("name", ANSWERS)
def test_the_prompt_has_the_tokens_that_generation_starts_from(name: str) -> None:
    tokenizer = tokenizer_named(name)
    found = sample(CHAT[1:3], tokenizer)
    template = load_template(None, tokenizer)
    prompt = template.write(CHAT[1:2], opened=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start = int(found.is_target.argmax())
    assert found.input_ids[:start].tolist() == ids


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20), st.text(max_size=20))
def test_any_words_are_learned_whole_or_counted(question: str, answer: str) -> None:
    tokenizer = tokenizer_named("llama 3")
    messages = (Message("user", question), Message("assistant", answer))
    try:
        rendered = load_template(None, tokenizer).render(Chat(messages))
    except UnusableRowError:
        return
    (found,) = encode([rendered], tokenizer, max_seq_length=999)
    assert isinstance(found, Sample)
    learned = "".join(targets(found, tokenizer))
    # Tokens of an answer that opens with line ends may begin in the header; they are targets.
    assert learned.strip() == f"{answer.strip()}<|eot_id|>".strip()


@pytest.mark.parametrize("name", ["mistral", "llama 3", "sentencepiece without template"])
def test_bos_stands_once(name: str) -> None:
    tokenizer = tokenizer_named(name)
    for messages in (CHAT, (Message("text", "Paris is the capital."),)):
        ids = sample(messages, tokenizer).input_ids.tolist()
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


def test_a_plain_text_is_all_target_and_ends() -> None:
    tokenizer = tokenizer_named("mistral")
    found = sample((Message("text", "Paris is the capital."),), tokenizer)
    assert targets(found, tokenizer) == ["Paris is the capital.</s>"]
    assert found.is_target.tolist() == [False] + [True] * (len(found.input_ids) - 1)
    rendered = sample((Message("text", "<s>Paris</s>"),), tokenizer).input_ids.tolist()
    assert rendered.count(1) == 1
    assert rendered.count(2) == 1
    bare = tokenizer_named("bare")
    assert targets(sample((Message("text", "Paris"),), bare), bare) == ["ris"]  # no BOS before it


def test_a_long_row_loses_its_end_and_one_without_answer_is_dropped() -> None:
    tokenizer = tokenizer_named("chatml")
    whole = sample(CHAT, tokenizer)
    length = len(whole.input_ids)
    assert not sample(CHAT, tokenizer, length=length).truncated
    cut = sample(CHAT, tokenizer, length=length - 2)
    assert cut.truncated
    assert cut.input_ids.tolist() == whole.input_ids[: length - 2].tolist()
    first_end = int(np.flatnonzero(np.diff(whole.is_target.astype(int)) == -1)[0]) + 1
    inside_second_question = sample(CHAT, tokenizer, length=first_end + 3)
    assert len(inside_second_question.input_ids) == first_end
    assert inside_second_question.truncated
    rendered = load_template(None, tokenizer).render(Chat(CHAT))
    before_any_answer = int(whole.is_target.argmax())
    assert encode([rendered], tokenizer, max_seq_length=before_any_answer) == [TOO_LONG]


def test_the_fingerprint_is_of_what_decides_the_ids() -> None:
    tokenizer = byte_level_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "bc"], padding=False, truncation=True, max_length=1)
    assert (
        tokenizer_fingerprint(tokenizer) == before == tokenizer_fingerprint(byte_level_tokenizer())
    )
    tokenizer.add_tokens(["Paris"])
    assert tokenizer_fingerprint(tokenizer) != before


def test_a_vocabulary_is_the_same_whatever_is_added_for_a_chat() -> None:
    plain, chat, other = byte_level_tokenizer(), byte_level_tokenizer(), sentencepiece_tokenizer()
    chat.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    assert tokenizer_fingerprint(plain) != tokenizer_fingerprint(chat)
    assert vocabulary_digest(plain) == vocabulary_digest(chat)
    assert vocabulary_digest(plain) != vocabulary_digest(other)


@pytest.mark.slow  # AutoTokenizer imports torch
def test_a_folder_without_tokenizer_names_the_setting(tmp_path: Path) -> None:
    byte_level_tokenizer(LLAMA3, bos=True).save_pretrained(tmp_path / "model")
    loaded = load_tokenizer(str(tmp_path / "model"), "main")
    assert sample(CHAT, loaded).input_ids.tolist() == (
        sample(CHAT, tokenizer_named("llama 3")).input_ids.tolist()
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    for name in ("empty", "broken"):
        with pytest.raises(
            SettingsError, match=r"^JOB_BASE_MODEL \S+: no usable tokenizer"
        ) as caught:
            load_tokenizer(str(tmp_path / name))
        assert "\n" not in str(caught.value)
