"""Any row gives messages or a reason, never a crash. `pytest tests/data/test_formats.py`"""

from __future__ import annotations

import json
import math
from datetime import date
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.data.chat import Chat, Message
from job.data.formats import Layout, RowParser
from job.data.unusable import UnusableRowError
from job.errors import DataError, SettingsError

QUESTION = Message("user", "Why?")
ANSWER = Message("assistant", "So.")
SYSTEM = Message("system", "Be brief.")
PAIR = {"question": "Why?", "answer": "So."}


def row_chat(row: dict[str, Any], layout: Layout | None = None) -> Chat:
    return RowParser(layout).parse(row).chat


def turn(role: object, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [turn("user", "Why?"), turn("assistant", "So.")]}, (QUESTION, ANSWER)),
        (
            {"messages": [turn("system", "Be brief."), turn("user", "Why?"), turn("model", "So.")]},
            (SYSTEM, QUESTION, ANSWER),
        ),
        (
            {"messages": [turn("system", " "), turn("User", "Why?"), turn("assistant", "So.")]},
            (QUESTION, ANSWER),
        ),
        # OpenAI's content parts, and what Parquet adds to a row of a set where others use tools.
        (
            {
                "messages": [
                    turn("developer", "Be brief."),
                    turn("user", [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]),
                    {"role": "assistant", "content": "So.", "tool_calls": None},
                ]
            },
            (SYSTEM, QUESTION, ANSWER),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Why?"},
                    {"from": "gpt", "value": "So."},
                    {"from": "human", "value": "nobody answers this"},
                ]
            },
            (QUESTION, ANSWER),
        ),
        ({"instruction": "Why?", "input": "", "output": "So."}, (QUESTION, ANSWER)),
        ({"instruction": "Why?", "input": None, "output": "So."}, (QUESTION, ANSWER)),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            (Message("user", "Add.\n\n1 2"), Message("assistant", "3")),
        ),
        ({"prompt": "Why?", "completion": "So.", "id": 7}, (QUESTION, ANSWER)),
        ({"prompt": "Why?", "response": "So."}, (QUESTION, ANSWER)),
        ({"question": "Why?", "answer": "So."}, (QUESTION, ANSWER)),
        ({"text": " as it is \n"}, (Message("text", " as it is \n"),)),
        # Parquet gives every row every column: a null column is not there.
        (
            {"messages": None, "text": None, "prompt": "Why?", "completion": "So."},
            (QUESTION, ANSWER),
        ),
    ],
)
def test_a_format_is_found_from_the_columns(
    row: dict[str, Any], messages: tuple[Message, ...]
) -> None:
    assert row_chat(row).messages == messages


def test_named_columns_replace_the_detected_format() -> None:
    row = {"messages": [], "frage": "Why?", "antwort": "So."}
    assert row_chat(row, Layout("frage", "antwort")).messages == (QUESTION, ANSWER)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "no known columns"),
        ({"prompt": "Why?", "completion": None}, "no known columns"),
        ({"prompt": "Why?", "completion": math.nan}, "no known columns"),
        ({"prompt": "Why?", "completion": 42}, "prompt, completion: completion is not a string"),
        ({"prompt": ["Why?"], "completion": "So."}, "prompt, completion: prompt is not a string"),
        ({"prompt": "Why?", "completion": " \n"}, "prompt, completion: empty answer"),
        ({"Prompt": "", "Completion": "So."}, "Prompt, Completion: empty prompt"),
        ({"prompt": "Why?", "completion": "\ud800"}, "prompt, completion: not valid Unicode"),
        ({"question": "Why?", "answers": []}, "question, answers: empty answer"),
        ({"text": "x" * (2**20 + 1)}, "text: row over 1 MB"),
        ({"text": ""}, "text: empty text"),
        ({**PAIR, "system": ["Be."]}, "question, answer: system is not a string"),
        ({**PAIR, "context": {"a": "b"}}, "question, answer: context is not a string"),
        ({**PAIR, "history": "And?"}, "question, answer: history is a string that is not JSON"),
        ({**PAIR, "history": [["a", "b", "c"]]}, "question, answer: history is no list of pairs"),
        ({**PAIR, "history": [["a", None]]}, "question, answer: history is not a string"),
        ({**PAIR, "history": [["a", ""]]}, "question, answer: empty answer"),
        ({**PAIR, "tools": "calc"}, "question, answer: tools is a string that is not JSON"),
        ({**PAIR, "tools": "[1]"}, "question, answer: tools is no list of JSON schemas"),
        ({**PAIR, "thinking": ["a"]}, "question, answer: thinking is not a string"),
    ],
)
def test_an_unusable_row_says_why_and_in_which_columns(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableRowError) as caught:
        row_chat(row)
    assert str(caught.value) == reason


def test_columns_have_any_case_and_any_usual_pair_of_names() -> None:
    for prompt, answer in [
        *(("Question", "Answer"), ("INSTRUCTION", "OUTPUT"), ("input", "output")),
        *(("query", "response"), ("instruction", "response"), ("prompt", "response")),
        *(("Prompt ", "response"), ("question", "answers"), ("question", "Response")),
    ]:
        chat = row_chat({prompt: "Why?", answer: "So.", "id": "7"})
        assert chat == Chat((QUESTION, ANSWER), is_pair=True), (prompt, answer)
    for name in ("conversation", "chat", "Dialog", "Messages", "CONVERSATIONS"):
        chat = row_chat({name: [turn("user", "Why?"), turn("assistant", "So.")]})
        assert chat == Chat((QUESTION, ANSWER)), name
    assert row_chat({"Text": "So."}).messages == (Message("text", "So."),)
    assert row_chat({**PAIR, "chat": "a title"}).messages == (QUESTION, ANSWER)


@pytest.mark.parametrize(
    "answers", ["So.", ["So.", "Thus."], {"text": ["So.", "Thus."], "answer_start": [3, 4]}]
)
def test_of_several_answers_the_first_is_learned(answers: object) -> None:
    for name in ("answers", "answer"):
        assert row_chat({"question": "Why?", name: answers}).messages == (QUESTION, ANSWER)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        {"messages": [turn("system", ""), turn("user", "Why?"), turn("assistant", "So.")]},
        {"messages": [turn("system", "Be brief."), turn("user", "Why?"), turn("model", "So.")]},
        {"instruction": "Why?", "input": "", "output": "So."},
        {"question": "Why?", "response": "So."},
        {"prompt": [turn("user", "Why?")], "completion": [turn("assistant", "So.")]},
    ],
)
@pytest.mark.parametrize("name", ["system", "System", "system_prompt", "system_message"])
def test_a_system_column_is_the_system_turn(row: dict[str, Any], name: str) -> None:
    assert row_chat({**row, name: "Be brief."}).messages == (SYSTEM, QUESTION, ANSWER)
    own = row_chat(row, Layout(system="By default.")).messages
    assert own[-2:] == (QUESTION, ANSWER)
    assert own[0].content in ("By default.", "Be brief."), "the row's own wins"
    blank = row_chat({**row, name: " "}, Layout(system="By default.")).messages
    assert blank == own


def test_a_system_column_and_another_system_turn_are_joined() -> None:
    row = {"messages": [turn("system", "In verse."), turn("user", "Why?"), turn("bot", "So.")]}
    parsed = RowParser().parse({**row, "system": "Be brief."})
    assert parsed.chat.messages[0] == Message("system", "Be brief.\n\nIn verse.")
    assert parsed.is_joined


@pytest.mark.parametrize(
    "history",
    [
        [["Who?", "Me."]],
        '[["Who?", "Me."]]',
        [{"instruction": "Who?", "output": "Me."}],
        [{"user": "Who?", "assistant": "Me."}],
        [turn("user", "Who?"), turn("assistant", "Me.")],
    ],
)
@pytest.mark.parametrize(
    "row", [{"question": "Why?", "answer": "So."}, {"instruction": "Why?", "output": "So."}]
)
def test_a_history_column_is_earlier_turns(row: dict[str, Any], history: object) -> None:
    earlier = (Message("user", "Who?"), Message("assistant", "Me."))
    chat = row_chat({**row, "history": history, "system": "Be brief."})
    assert chat == Chat((SYSTEM, *earlier, QUESTION, ANSWER))
    for none in ([], "[]", "", None, "null"):
        assert row_chat({**row, "history": none, "tools": none}).messages == (QUESTION, ANSWER)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Why?", "context": "It is.", "response": "So.", "category": "qa"},
        {"question": "Why?", "Context": "It is.", "answer": "So."},
        {"question": "Why?", "passage": "It is.", "answers": ["So."]},
        {"question": "Why?", "context": ["It is."], "answers": {"text": ["So."]}},
    ],
)
def test_a_context_column_goes_before_the_question(row: dict[str, Any]) -> None:
    asked = Message("user", "It is.\n\nWhy?")
    assert row_chat(row) == Chat((asked, ANSWER), is_pair=True)
    without = {
        name: " " if name.lower() in ("context", "passage") else v for name, v in row.items()
    }
    assert row_chat(without).messages == (QUESTION, ANSWER)


TOOL = {"type": "function", "function": {"name": "calc", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        json.dumps([TOOL]),
        [json.dumps(TOOL)],
        TOOL,
        [{**TOOL, "function": {**TOOL["function"], "description": None}}],  # as Parquet has it
    ],
)
def test_a_tools_column_is_the_chats_tools(tools: object) -> None:
    turns = [turn("user", "Why?"), turn("assistant", "So.")]
    assert row_chat({"messages": turns, "tools": tools}) == Chat((QUESTION, ANSWER), (TOOL,))
    assert row_chat({**PAIR, "tools": tools}) == Chat((QUESTION, ANSWER), (TOOL,), is_pair=True)
    assert row_chat({**PAIR, "tools": "[]"}).tools == ()


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "Reasoning"])
def test_a_reasoning_column_beside_a_pair_is_the_answers(name: str) -> None:
    assert row_chat({**PAIR, name: "Hm."}).messages[-1] == ANSWER._replace(reasoning="Hm.")
    assert row_chat({**PAIR, name: ""}).messages[-1] == ANSWER


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ([turn("user", "Why?")], [turn("assistant", "So.")]),
        ([turn("user", "Why?")], "So."),
        ("Why?", [turn("assistant", "So.")]),
        (turn("user", "Why?"), turn("assistant", "So.")),
        ({"role": ["user"], "content": ["Why?"]}, {"role": ["assistant"], "content": ["So."]}),
    ],
)
def test_a_prompt_and_a_completion_of_messages_are_one_chat(
    prompt: object, completion: object
) -> None:
    assert row_chat({"prompt": prompt, "completion": completion}) == Chat((QUESTION, ANSWER))


def test_answers_in_a_prompt_of_messages_are_context() -> None:
    prompt = [turn("user", "Who?"), turn("assistant", "Me."), turn("user", "Why?")]
    chat = row_chat({"prompt": prompt, "completion": [turn("assistant", "So.")]})
    assert [m.is_context for m in chat.messages] == [False, True, False, False]


def test_beside_a_prompt_of_messages_texts_have_no_place_and_are_named() -> None:
    row = {"instruction": [turn("user", "Why?")], "output": "So.", "input": "1", "thinking": "Hm."}
    parsed = RowParser().parse({**row, "context": " ", "system": "Be brief."})
    assert parsed.chat == Chat((SYSTEM, QUESTION, ANSWER))
    assert set(parsed.unused) == {"input", "thinking"}


TEMPLATE = Layout(template="{context}\\n\n{ Question }?".replace(" ", ""))


def test_a_prompt_template_makes_the_users_turn() -> None:
    row = {"context": "It is.", "question": "Why", "answer": "So.", "choices": ["a", "b"]}
    parsed = RowParser(TEMPLATE).parse(row)
    asked = Message("user", "It is.\n\nWhy?")
    assert parsed.chat == Chat((asked, ANSWER), is_pair=True)
    assert parsed.unused == ("choices",)
    for empty in ("", None):
        chat = row_chat({**row, "context": empty}, TEMPLATE)
        assert chat.messages == (QUESTION, ANSWER), "no blank lines where the context stood"
    chosen = Layout(template="{question}?\n{choices}: {{{n}}}", completion="gold")
    row = {**row, "gold": "b", "n": 2, "answer": 1}
    turns = (Message("user", "Why?\na\nb: {2}"), Message("assistant", "b"))
    assert row_chat(row, chosen).messages == turns
    with pytest.raises(UnusableRowError, match="no answer's column; give JOB_COMPLETION_COLUMN"):
        row_chat({"question": "Why"}, TEMPLATE)
    with pytest.raises(UnusableRowError, match="PLATE, answer: context is not a string"):
        row_chat({"context": {"a": 1}, "question": "Why", "answer": "So."}, TEMPLATE)


def test_columns_that_a_setting_names_and_no_row_has_give_the_nearest() -> None:
    TEMPLATE.check_columns(("context", "question", "answer"))
    words = "JOB_PROMPT_TEMPLATE: no row has a column 'context', did you mean 'contxt'"
    with pytest.raises(SettingsError, match=words):
        TEMPLATE.check_columns(("contxt", "question", "answer"))
    words = "JOB_PROMPT_COLUMN.*'anwser', did you mean 'answer'.*present: answer, question"
    with pytest.raises(DataError, match=words):
        Layout("question", "anwser").check_columns(("question", "answer"))


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        (
            {**PAIR, "id": "7", "score": 3, "lang": ["", "de"], "meta": {"n": 1}},
            {"id", "score", "lang", "meta"},
        ),
        (
            {"text": "So.", "label": 1, "weight": 0, "is_correct": False},
            {"label", "weight", "is_correct"},
        ),
        (
            {**PAIR, "choices": [1, 2], "when": date(2026, 1, 2), "deep": {"a": [{"b": 0}]}},
            {"choices", "when", "deep"},
        ),
        (
            {
                **PAIR,
                "id": 7,
                "idx": 0,
                "Index": 1,
                "doc_id": 3,
                "doc-id": 3,
                "__index_level_0__": 5,
            },
            set(),
        ),
        ({**PAIR, "a": None, "b": [], "c": {}, "d": {"x": [None, math.nan, " "]}, "e": b""}, set()),
        ({**PAIR, "user_id": {"$oid": "5f"}, "paid": 3}, {"user_id", "paid"}),
        ({**PAIR, "deep": json.loads("[" * 900 + "1" + "]" * 900)}, {"deep"}),
        ({**PAIR, "text": "Why? So.", "image": {"bytes": b"x", "path": None}}, {"text", "image"}),
        ({"text": "So.", "system": "Be.", "url": ""}, {"system"}),
        ({"prompt": "Why?", "completion": "So.", "context": "It is."}, {"context"}),
        ({"question": "Why?", "answer": "So.", "Question": "Who?"}, {"Question"}),
        (
            {"messages": [{**turn("user", "Why?"), "lang": "de"}, turn("assistant", "So.")]},
            {"messages[].lang"},
        ),
        (
            {
                "messages": [
                    turn("user", "Why?"),
                    {**turn("bot", "So."), "good": False, "turn_id": 2},
                ]
            },
            {"messages[].good"},
        ),
        (
            {"prompt": [turn("user", "Why?")], "completion": "So.", "reasoning": [0.5]},
            {"reasoning"},
        ),
    ],
)
def test_columns_that_say_something_and_are_not_used_are_named(
    row: dict[str, Any], unused: set[str]
) -> None:
    assert set(RowParser().parse(row).unused) == unused


def test_beside_named_columns_system_history_and_tools_count() -> None:
    row = {"frage": "Why?", "antwort": "So.", "system": "Be brief.", "context": "It is."}
    parsed = RowParser(Layout("frage", "antwort")).parse(row)
    assert parsed.chat == Chat((SYSTEM, QUESTION, ANSWER), is_pair=True)
    assert parsed.unused == ("context",)


def test_a_column_in_the_prompt_template_is_used_only_there() -> None:
    layout = Layout(template="{SYSTEM}: {question}")
    parsed = RowParser(layout).parse({**PAIR, "system": "Be brief.", "context": "It is."})
    assert parsed.chat.messages == (Message("user", "Be brief.: Why?"), ANSWER)
    assert parsed.unused == ("context",)


def test_a_text_takes_no_system_prompt() -> None:
    with pytest.raises(UnusableRowError, match="a text has no place for JOB_SYSTEM_PROMPT"):
        row_chat({"text": "So."}, Layout(system="Be brief."))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]) | st.text(), inner)
    ),
    max_leaves=6,
)
_COLUMNS = (
    *("messages", "conversations", "chat", "prompt", "completion", "question", "answers", "text"),
    *("instruction", "input", "output", "system", "history", "context", "tools", "thinking"),
)
_NAMES = st.sampled_from(_COLUMNS)
_TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "x"]) | _JSON, "content": _JSON}
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(_NAMES, _JSON | st.lists(_TURN | _JSON)))
def test_any_json_in_any_column_is_used_or_has_a_reason(row: dict[str, Any]) -> None:
    try:
        messages = row_chat(row).messages
    except UnusableRowError as error:
        reason = str(error)
    else:
        reason = ""
    if reason:
        assert len(reason) < 80  # from the list of reasons, nothing of the row
        return
    assert messages[-1].role in ("assistant", "text")
    for message in messages:
        assert message.content.strip() or message.tool_calls or message.role == "tool"
        assert message.content.encode()
