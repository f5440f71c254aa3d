"""In every family's template answers and their ends are learned, nothing else.

`pytest tests/data/test_targets.py`
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.data.chat import Chat, Message
from job.data.formats import UnusableRowError
from job.data.templates import ChatTemplate, Rendered, load_template
from job.data.tokens import Sample, encode
from tests.data.chat_templates import FAMILIES, Family, family_tokenizer
from tests.data.test_tokens import targets

CHAT = (
    Message("system", "Be brief."),
    Message("user", "What is the capital of France?"),
    Message("assistant", "Paris."),
    Message("user", "And of Spain? 🙂"),
    Message("assistant", "Madrid, ça va 🙂"),
)
LEARNED = {
    "chatml": ["Paris.<|im_end|>", "Madrid, ça va 🙂<|im_end|>"],
    "llama 2": [" Paris. </s>", " Madrid, ça va 🙂 </s>"],
    "llama 3": ["Paris.<|eot_id|>", "Madrid, ça va 🙂<|eot_id|>"],
    "mistral v0.3": [" Paris.</s>", " Madrid, ça va 🙂</s>"],
    "gemma": ["Paris.<end_of_turn>", "Madrid, ça va 🙂<end_of_turn>"],
    "phi-3": ["Paris.<|end|>", "Madrid, ça va 🙂<|end|>"],
    "phi-4": ["Paris.<|im_end|>", "Madrid, ça va 🙂<|im_end|>"],
    # It writes an empty thought into the last answer only: the first one is context.
    "qwen3": ["<think>\n\n</think>\n\nMadrid, ça va 🙂<|im_end|>"],
    "qwen3 thinking": ["\n</think>\n\nMadrid, ça va 🙂<|im_end|>"],
    "deepseek r1": ["Paris.<｜end▁of▁sentence｜>", "Madrid, ça va 🙂<｜end▁of▁sentence｜>"],  # noqa: RUF001
    "zephyr": ["Paris.</s>", "Madrid, ça va 🙂</s>"],
    "gpt-oss": [
        "<|channel|>final<|message|>Paris.<|end|>",
        "<|channel|>final<|message|>Madrid, ça va 🙂<|return|>",
    ],
    "none": ["Paris.<|endoftext|>", "Madrid, ça va 🙂<|endoftext|>"],
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "calc", "arguments": {"x": 1}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "calc",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"x": {"type": "number"}}},
    },
}


@cache
def template_of(name: str) -> ChatTemplate:
    return load_template(None, family_tokenizer(name))


def sample_of(name: str, *messages: Message, **row: Any) -> tuple[Sample, Rendered]:
    rendered = template_of(name).render(Chat(messages, **row))
    (found,) = encode([rendered], family_tokenizer(name), max_seq_length=9999)
    assert isinstance(found, Sample), found
    return found, rendered


def learned(name: str, *messages: Message, **row: Any) -> list[str]:
    found, _ = sample_of(name, *messages, **row)
    return targets(found, family_tokenizer(name))


def whole(name: str, *messages: Message, **row: Any) -> str:
    found, _ = sample_of(name, *messages, **row)
    return str(family_tokenizer(name).decode(found.input_ids.tolist()))


@pytest.mark.parametrize("name", FAMILIES)
def test_both_answers_and_their_ends_are_learned_and_nothing_else(name: str) -> None:
    found, rendered = sample_of(name, *CHAT)
    assert targets(found, family_tokenizer(name)) == LEARNED[name]
    assert rendered.num_context_answers == 2 - len(LEARNED[name])
    assert "Be brief." in rendered.text


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_that_is_context_is_read_and_not_learned(name: str) -> None:
    question, wrong, again, right = CHAT[1:]
    messages = (question, wrong._replace(is_context=True), again, right)
    found, rendered = sample_of(name, *messages)
    assert targets(found, family_tokenizer(name)) == LEARNED[name][-1:]
    assert "Paris." in rendered.text
    assert rendered.num_context_answers == 0, "nobody wanted to learn it"


def test_a_context_turn_may_stand_anywhere_but_not_everywhere() -> None:
    greeting = Message("assistant", "Hello!", is_context=True)
    assert learned("chatml", greeting, *CHAT[1:]) == LEARNED["chatml"]
    assert "Hello!<|im_end|>" in whole("chatml", greeting, *CHAT[1:])
    last = (*CHAT[:4], CHAT[4]._replace(is_context=True))
    assert learned("chatml", *last) == LEARNED["chatml"][:1]
    assert whole("chatml", *last).endswith("Paris.<|im_end|>")
    with pytest.raises(UnusableRowError, match="no answer to learn"):
        sample_of("chatml", CHAT[1], CHAT[2]._replace(is_context=True))
    with pytest.raises(UnusableRowError, match="the chat template refuses it"):
        sample_of("gemma", greeting, *CHAT[1:])


def changed(name: str, **changes: Any) -> tuple[ChatTemplate, Any]:
    tokenizer = FAMILIES[name]._replace(**changes).tokenizer()
    return load_template(None, tokenizer), tokenizer


def learned_by(template: ChatTemplate, tokenizer: Any, *messages: Message) -> list[str]:
    (found,) = encode([template.render(Chat(messages))], tokenizer, max_seq_length=999)
    assert isinstance(found, Sample), found
    return targets(found, tokenizer)


@pytest.mark.parametrize("name", ["chatml", "llama 3", "gemma", "phi-3", "zephyr", "gpt-oss"])
@pytest.mark.parametrize("both", [False, True])
def test_an_end_that_swallows_white_space_is_learned(name: str, both: bool) -> None:
    family = FAMILIES[name]
    ends = (family.eos, *family.specials)
    template, tokenizer = changed(name, swallows=ends, both=both)
    assert learned_by(template, tokenizer, *CHAT) == LEARNED[name]


def test_an_end_that_the_tokenizer_does_not_read_is_refused() -> None:
    family = FAMILIES["chatml"]
    tokenizer = family.tokenizer()
    template = load_template(None, tokenizer)
    other = family._replace(specials=("<|im_start|>",), eos="<|im_en").tokenizer()
    rendered = template.render(Chat(CHAT))
    assert isinstance(encode([rendered], other, max_seq_length=999)[0], Sample)
    # It is known, but not found next to a letter.
    from tokenizers import AddedToken

    single = AddedToken("<|im_end|>", single_word=True, special=True, normalized=False)
    tokenizer.add_special_tokens({"additional_special_tokens": [single]})
    messages = (CHAT[1], Message("assistant", "Paris"))
    samples = encode([template.render(Chat(messages))], tokenizer, max_seq_length=999)
    assert samples == ["the tokenizer does not read what ends an answer as one token"]


def test_line_ends_and_words_that_are_added_tokens_end_and_forge_nothing() -> None:
    family = FAMILIES["gemma"]
    added = ("\n", "\n\n", "  ", "</code>", "user", "model", *family.specials)
    template, tokenizer = changed("gemma", added=added)
    assert learned_by(template, tokenizer, *CHAT) == LEARNED["gemma"]
    assert template.marks.end_token == "<end_of_turn>"
    assert set(template.control.names) == {*family.specials, "<bos>", "<eos>"}
    messages = (Message("user", "the user's"), Message("assistant", "  <code>\n\n</code>"))
    assert learned_by(template, tokenizer, *messages) == ["<code>\n\n</code><end_of_turn>"]
    (found,) = encode([template.render(Chat(messages))], tokenizer, max_seq_length=99)
    assert isinstance(found, Sample)
    assert found.input_ids.tolist().count(tokenizer.convert_tokens_to_ids("user")) == 2


def test_an_answer_that_the_template_does_not_end_is_refused() -> None:
    source = FAMILIES["chatml"].template
    assert source is not None
    end = "('<|im_end|>' if 'Paris' not in message['content'] else '.')"
    template = load_template(source.replace("'<|im_end|>'", end), family_tokenizer("chatml"))
    with pytest.raises(UnusableRowError, match="does not end the answer with a token"):
        template.render(Chat(CHAT[1:3]))
    assert template.render(Chat((CHAT[3], CHAT[4]))).spans


EOS_LAST = """\
{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}\
{% if loop.last and message['role'] == 'assistant' %}{{ eos_token }}\
{% else %}{{ '\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""


@pytest.mark.parametrize(
    ("source", "answers"),
    [
        (EOS_LAST, [" Paris.\n", " Madrid, ça va 🙂<|im_end|>"]),
        (EOS_LAST.replace("'\\n'", "''"), [" Paris.", " Madrid, ça va 🙂<|im_end|>"]),
        (
            EOS_LAST.replace("'\\n'", "'<|im_start|>'"),
            [" Paris.<|im_start|>", " Madrid, ça va 🙂<|im_end|>"],
        ),
    ],
)
def test_a_template_that_ends_the_last_answer_only_teaches_all_of_them(
    source: str, answers: list[str]
) -> None:
    tokenizer = family_tokenizer("chatml")
    assert learned_by(load_template(source, tokenizer), tokenizer, *CHAT) == answers


THOUGHTS = (
    CHAT[1],
    Message("assistant", "<think>\nT1\n</think>\n\nFirst."),
    CHAT[3],
    Message("assistant", "<think>\nT2\n</think>\n\nSecond."),
)


def test_a_generation_prompt_that_opens_a_thought_is_not_learned() -> None:
    assert learned("qwen3 thinking", *THOUGHTS) == ["T2\n</think>\n\nSecond.<|im_end|>"]
    _, rendered = sample_of("qwen3 thinking", *THOUGHTS)
    assert (rendered.num_context_answers, rendered.num_dropped_thoughts) == (1, 0)
    tokenizer = family_tokenizer("qwen3 thinking")
    source = FAMILIES["chatml"].template
    assert source is not None
    opening = source.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")
    template = load_template(opening, tokenizer)
    assert learned_by(template, tokenizer, *THOUGHTS) == [
        "T1\n</think>\n\nFirst.<|im_end|>",
        "T2\n</think>\n\nSecond.<|im_end|>",
    ]
    # Answers without thoughts are learned from their first word.
    assert learned_by(template, tokenizer, *CHAT) == LEARNED["chatml"]


def test_thoughts_that_are_special_tokens_stay_tokens() -> None:
    family = FAMILIES["qwen3 thinking"]
    marks = ("<think>", "</think>")
    template, tokenizer = changed(
        "qwen3 thinking", specials=(*family.specials, *marks), added=family.added[2:]
    )
    assert learned_by(template, tokenizer, *THOUGHTS) == ["T2\n</think>\n\nSecond.<|im_end|>"]
    (found,) = encode([template.render(Chat(THOUGHTS))], tokenizer, max_seq_length=999)
    assert isinstance(found, Sample)
    closing = tokenizer.convert_tokens_to_ids("</think>")
    assert found.input_ids[found.is_target].tolist().count(closing) == 1


HARMONY_FINAL = "<|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("qwen3", "<think>\nSTEPS\n</think>\n\nSo.<|im_end|>"),
        ("qwen3 thinking", "STEPS\n</think>\n\nSo.<|im_end|>"),
        ("gpt-oss", f"<|channel|>analysis<|message|>STEPS<|end|>{HARMONY_FINAL}So.<|return|>"),
    ],
)
def test_reasoning_is_learned_where_the_template_writes_it(name: str, answer: str) -> None:
    found, rendered = sample_of(name, CHAT[1], Message("assistant", "So.", "STEPS"))
    assert targets(found, family_tokenizer(name)) == [answer]
    assert rendered.num_dropped_thoughts == 0


@pytest.mark.parametrize(
    ("name", "turn"),
    [
        ("chatml", Message("assistant", "So.", "STEPS")),
        ("llama 3", Message("assistant", "So.", "STEPS")),
        ("gemma", Message("assistant", "So.", "STEPS")),
        ("deepseek r1", Message("assistant", "<think>\nSTEPS\n</think>\n\nSo.")),
    ],
)
def test_reasoning_that_the_template_drops_is_counted(name: str, turn: Message) -> None:
    found, rendered = sample_of(name, CHAT[1], turn)
    (answer,) = targets(found, family_tokenizer(name))
    assert answer.strip() == FAMILIES[name].answer.format("So.")
    assert "STEPS" not in rendered.text
    assert rendered.num_dropped_thoughts == 1


CALLED = (
    Message("user", "1+1?"),
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", "2.0", name="calc"),
    Message("assistant", "Two."),
)
CALLS = {
    "qwen3": '<tool_call>\n{"name": "calc", "arguments": {"x": 1}}\n</tool_call><|im_end|>',
    "mistral v0.3": '[TOOL_CALLS] [{"name": "calc", "arguments": {"x": 1}, "id": "call00001"}]</s>',
    "gpt-oss": ' to=functions.calc<|channel|>commentary json<|message|>{"x": 1}<|call|>',
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_learned_and_results_are_read(name: str) -> None:
    call, answer = learned(name, *CALLED, tools=(TOOL,))
    assert call == CALLS[name]
    assert answer.strip() == FAMILIES[name].answer.format("Two.")
    text = whole(name, *CALLED, tools=(TOOL,))
    assert "2.0" in text
    assert text.count("calc") >= 2, "the tool is listed and called"


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("chatml", {"messages": CALLED}, "tool calls"),
        ("chatml", {"messages": CHAT[1:3], "tools": (TOOL,)}, "tools"),
        ("gemma", {"messages": (*CALLED[:1], *CALLED[2:])}, "tool turns"),
        ("phi-3", {"messages": (*CALLED[:1], *CALLED[2:])}, "tool turns"),
        ("none", {"messages": (*CALLED[:1], *CALLED[2:])}, "tool turns"),
    ],
)
def test_a_tool_that_the_template_drops_is_refused(
    name: str, row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnusableRowError, match=f"^the chat template does not render {reason}$"):
        template_of(name).render(Chat(**row))


def test_a_tool_turn_alone_is_used_where_the_template_writes_any_role() -> None:
    messages = (*CALLED[:1], *CALLED[2:])
    assert learned("chatml", *messages) == ["Two.<|im_end|>"]
    assert "<|im_start|>tool\n2.0<|im_end|>" in whole("chatml", *messages)


# Without the characters that stand for control tokens meanwhile: such rows are refused.
LETTERS = st.characters(exclude_categories=["Cs"], max_codepoint=0xFFFFF)
WORDS = st.text(LETTERS, max_size=12) | st.sampled_from(
    [" ", "\n", "\n\n", "ça va", "Paris.", "▁", "🙂"]
)


def _conversation(data: st.DataObject, name: str) -> list[Message]:
    """A chat of one to three questions, some answered with a tool's help; tokens typed anywhere."""
    family = FAMILIES[name]
    typed = st.sampled_from(
        [token for token in (*family.specials, family.eos, family.bos) if token]
    )
    text = st.lists(WORDS | typed, min_size=1, max_size=4).map("".join)
    text = text.filter(lambda value: bool(value.strip()))
    messages = [Message("system", data.draw(text))] if data.draw(st.booleans()) else []
    for _ in range(data.draw(st.integers(1, 3))):
        messages.append(Message("user", data.draw(text)))
        if family.has_tools and data.draw(st.booleans()):
            call = {**CALL, "function": {"name": "calc", "arguments": {"x": data.draw(text)}}}
            messages.append(Message("assistant", "", tool_calls=(call,)))
            messages.append(Message("tool", data.draw(text), name="calc"))
        messages.append(Message("assistant", data.draw(text)))
    return messages


def _tame(message: Message) -> Message:
    """The message without anything typed."""
    if not message.tool_calls:
        return message._replace(content="x")
    function = {"name": "calc", "arguments": {"x": "x"}}
    return message._replace(tool_calls=({**message.tool_calls[0], "function": function},))


def _expected(family: Family, messages: list[Message]) -> list[str]:
    answers = [m.content for m in messages if m.role == "assistant" and not m.tool_calls]
    earlier = family.earlier or family.answer
    forms = [earlier] * (len(answers) - 1) + [family.answer]
    told = [form.format(text.strip()) for form, text in zip(forms, answers, strict=True)]
    return told if family.learns_earlier else told[-1:]


def _bare(text: str) -> str:
    """The text without the white space that templates and tokens strip, as decoders give it."""
    return "".join(text.replace("▁", " ").split())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
@pytest.mark.parametrize("name", FAMILIES)
def test_whatever_is_said_and_typed_only_answers_are_learned(
    name: str, data: st.DataObject
) -> None:
    family, tokenizer = FAMILIES[name], family_tokenizer(name)
    messages = _conversation(data, name)
    try:
        found, _ = sample_of(name, *messages)
    except UnusableRowError as error:
        pytest.fail(f"{error}: {messages}")
    runs = [_bare(text) for text in targets(found, tokenizer)]
    calls = [message for message in messages if message.tool_calls]
    answers = [_bare(text) for text in _expected(family, messages)]
    assert [text for text in runs if text in answers] == answers
    assert len(runs) == len(answers) + (len(calls) if name != "qwen3 thinking" else 0)
    tame, _ = sample_of(name, *map(_tame, messages))
    control = [tokenizer.convert_tokens_to_ids(token) for token in template_of(name).control.names]
    written, expected = (
        [number for number in sample.input_ids.tolist() if number in control]
        for sample in (found, tame)
    )
    assert written == expected, "the template's own control tokens, no typed one"
