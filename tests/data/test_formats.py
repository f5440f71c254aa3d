"""Any row gives messages or a reason, never a crash. `pytest tests/data/test_formats.py`"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.data.chat import Message
from job.data.formats import Columns, UnusableRowError, UnusableRows, row_chat
from job.errors import DataError

QUESTION = Message("user", "Why?")
ANSWER = Message("assistant", "So.")
SYSTEM = Message("system", "Be brief.")


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
    assert row_chat(row, Columns("frage", "antwort")).messages == (QUESTION, ANSWER)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "no known columns"),
        ({"prompt": "Why?", "completion": None}, "no known columns"),
        ({"prompt": "Why?", "completion": 42}, "answer is not a string"),
        ({"prompt": ["Why?"], "completion": "So."}, "prompt is not a string"),
        ({"prompt": "Why?", "completion": " \n"}, "empty answer"),
        ({"prompt": "", "completion": "So."}, "empty prompt"),
        ({"prompt": "Why?", "completion": "\ud800"}, "not valid Unicode"),
        ({"text": "x" * (2**20 + 1)}, "row over 1 MB"),
        ({"text": ""}, "empty text"),
        ({"messages": []}, "no turns"),
        ({"messages": "Why?"}, "no turns"),
        ({"messages": ["Why?", "So."]}, "a turn is not a role and a text"),
        ({"messages": [turn("narrator", "3"), turn("assistant", "So.")]}, "unknown role"),
        ({"messages": [turn("tool", "3"), turn("assistant", "So.")]}, "a tool's turn or call"),
        (
            {
                "messages": [
                    turn("user", "Why?"),
                    {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
                ]
            },
            "a tool's turn or call",
        ),
        (
            {"conversations": [{"from": "human", "value": "?"}, {"from": "observation"}]},
            "a tool's turn or call",
        ),
        (
            {"messages": [turn("user", [{"type": "image_url"}]), turn("assistant", "So.")]},
            "a part of the content is not text",
        ),
        (
            {"messages": [turn("user", [{"type": "text"}]), turn("assistant", "So.")]},
            "a part of the content is not a string",
        ),
        ({"messages": [turn(["user"], "3")]}, "unknown role"),
        ({"messages": [turn("user", None), turn("assistant", "So.")]}, "user is not a string"),
        ({"messages": [turn("user", "Why?")]}, "no assistant turn"),
        ({"messages": [turn("system", "")]}, "no assistant turn"),
        ({"messages": [turn("assistant", "So.")]}, "roles out of order"),
        ({"messages": [turn("system", "Be."), turn("assistant", "So.")]}, "roles out of order"),
        (
            {"messages": [turn("user", "a"), turn("user", "b"), turn("assistant", "c")]},
            "roles out of order",
        ),
    ],
)
def test_an_unusable_row_says_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableRowError) as caught:
        row_chat(row)
    assert str(caught.value) == reason


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]) | st.text(), inner)
    ),
    max_leaves=6,
)
_NAMES = st.sampled_from(
    ["messages", "conversations", "instruction", "input", "output", "prompt", "completion", "text"]
)
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
        assert len(reason) < 40  # from the list of reasons, nothing of the row
        return
    assert messages[-1].role in ("assistant", "text")
    for message in messages:
        assert message.content.strip()
        assert message.content.encode()


def tally(num_unusable: int, reason: str = "empty answer") -> UnusableRows:
    rows = UnusableRows()
    for number in range(num_unusable):
        rows.add(reason, f"rows.jsonl:{number + 1}")
    return rows


def test_five_percent_of_unusable_rows_pass_and_one_more_does_not() -> None:
    tally(5).check_share(100, way_out="go home")
    with pytest.raises(DataError) as caught:
        tally(6).check_share(100, way_out="go home")
    message = str(caught.value)
    assert "6 of 100 rows are unusable, limit is 5 %" in message
    assert "6 x empty answer (rows.jsonl:1, rows.jsonl:2, rows.jsonl:3, ...)" in message
    assert message.endswith(": correct the rows, or go home")


def test_a_named_column_that_no_row_has_gives_the_nearest() -> None:
    rows = tally(3, "no column 'anwser'")
    with pytest.raises(DataError, match="did you mean 'answer'.*columns present: answer, question"):
        rows.check_columns(("question", "answer"), Columns("question", "anwser"))
