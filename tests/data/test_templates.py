"""Answers are placed in any template, or not used. `pytest tests/data/test_templates.py`"""

from __future__ import annotations

from pathlib import Path

import pytest

from job.data.chat import Chat
from job.data.formats import UnusableRowError
from job.data.templates import DEFAULT_TEMPLATE, load_template
from job.data.tokens import Sample, encode
from job.errors import SettingsError
from tests.data.test_tokens import ANSWERS, CHAT, sample, targets, tokenizer_named
from tests.tiny_tokenizer import CHATML, LLAMA3, MISTRAL


def test_a_system_text_reaches_a_template_that_would_drop_it() -> None:
    tokenizer = tokenizer_named("mistral")
    whole = tokenizer.decode(sample(CHAT, tokenizer).input_ids.tolist())
    assert "Be brief.\n\nWhat is the capital" in whole
    assert whole.count("Be brief.") == 1


def test_a_header_is_no_target_where_the_template_has_no_generation_prompt() -> None:
    tokenizer = tokenizer_named("chatml")
    closed = CHATML.replace("add_generation_prompt", "false")
    assert targets(sample(CHAT, tokenizer, chat_template=closed), tokenizer) == ANSWERS["chatml"]
    thinking = CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>' }}{% endif")
    assert thinking != CHATML
    assert targets(sample(CHAT, tokenizer, chat_template=thinking), tokenizer) == ANSWERS["chatml"]


@pytest.mark.parametrize("rewritten", ["'Done.'", "('Earlier: ' + message['content'])"])
def test_an_answer_that_the_template_rewrites_later_is_context_only(rewritten: str) -> None:
    tokenizer = tokenizer_named("chatml")
    # As Qwen3 does with the reasoning of earlier turns.
    forgetful = CHATML.replace(
        "message['content'] ",
        f"(message['content'] if loop.last or message['role'] != 'assistant' else {rewritten}) ",
    )
    template = load_template(forgetful, tokenizer)
    rendered = template.render(Chat(CHAT))
    assert rendered.num_context_answers == 1
    (found,) = encode([rendered], tokenizer, max_seq_length=999)
    assert isinstance(found, Sample)
    assert targets(found, tokenizer) == ["Madrid, ça va 🙂<|im_end|>"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("message['content'] ", "message['content'] | upper "), "does not show where"),
        (("{% for", "{{ messages | length }}{% for"), None),
        (("{% for", "{{ raise_exception('no') if messages | length > 2 }}{% for"), "refuses"),
    ],
)
def test_a_row_whose_answers_cannot_be_placed_is_never_used(
    change: tuple[str, str], reason: str | None
) -> None:
    tokenizer = tokenizer_named("chatml")
    source = CHATML.replace(*change)
    if reason is None:  # even one answer cannot be placed: the setting is wrong, not a row
        with pytest.raises(SettingsError, match="JOB_CHAT_TEMPLATE.*does not begin as"):
            load_template(source, tokenizer)
        return
    with pytest.raises(UnusableRowError, match=reason):
        load_template(source, tokenizer).render(Chat(CHAT))


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ messages.nothing.more }}", "/no/such/file", "{{"]
)
def test_a_template_that_does_not_work_names_its_setting(source: str) -> None:
    with pytest.raises(SettingsError, match="JOB_CHAT_TEMPLATE"):
        load_template(source, tokenizer_named("chatml"))


def test_a_template_without_an_end_of_turn_token_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = tokenizer_named("chatml")
    for source in (None, DEFAULT_TEMPLATE, CHATML):
        load_template(source, tokenizer)
    for name in ("mistral", "llama 3", "sentencepiece without template"):
        load_template(None, tokenizer_named(name))
    assert caplog.messages == []
    load_template(CHATML.replace("<|im_end|>", ""), tokenizer)
    (message,) = caplog.messages
    assert "JOB_CHAT_TEMPLATE writes no end-of-turn token after an answer" in message
    load_template(None, tokenizer_named("bare"))
    assert "the default template writes no end-of-turn token" in caplog.messages[1]


def test_a_template_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(DEFAULT_TEMPLATE)
    tokenizer = tokenizer_named("chatml")
    assert load_template(str(path), tokenizer).source == DEFAULT_TEMPLATE


def test_a_template_that_writes_the_date_writes_the_same_one_every_day() -> None:
    source = "{{ strftime_now('%d %b %Y') }} " + CHATML
    rendered = load_template(source, tokenizer_named("chatml")).render(Chat(CHAT))
    assert rendered.text.startswith("26 Jul 2024 <|im_start|>")


def test_the_templates_under_test_are_not_the_default_one() -> None:
    for source in (MISTRAL, CHATML, LLAMA3):
        assert source != DEFAULT_TEMPLATE
        assert "generation %" not in source  # no markers: spans are found by rendering
