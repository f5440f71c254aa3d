"""Turns in every spelling are one chat, or a reason. `pytest tests/data/test_turns.py`"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from job.data.chat import Chat, Message
from job.data.formats import ParsedRow, RowParser
from job.data.unusable import UnusableRowError

QUESTION = Message("user", "Why?")
ANSWER = Message("assistant", "So.")
SYSTEM = Message("system", "Be brief.")


def turn(role: object, content: object, **others: object) -> dict[str, object]:
    return {"role": role, "content": content, **others}


ASKED, ANSWERED = turn("user", "Why?"), turn("assistant", "So.")


def parse(*turns: object, name: str = "messages", **others: object) -> ParsedRow:
    return RowParser().parse({name: list(turns), **others})


def messages(*turns: object) -> tuple[Message, ...]:
    return parse(*turns).chat.messages


@pytest.mark.parametrize(
    "value",
    [
        json.dumps([ASKED, ANSWERED]),
        json.dumps([{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]),
        [json.dumps(ASKED), json.dumps(ANSWERED)],
        {"role": ["user", "assistant"], "content": ["Why?", "So."]},
        {"from": ["human", "gpt"], "value": ["Why?", "So."], "weight": None},
        json.dumps({"role": ["user", "assistant"], "content": ["Why?", "So."]}),
    ],
)
def test_turns_may_be_json_or_a_struct_of_lists(value: object) -> None:
    for name in ("messages", "conversations", "chat"):
        assert RowParser().parse({name: value}).chat == Chat((QUESTION, ANSWER))


@pytest.mark.parametrize("user", ["user", "Human", "prompter", " USER "])
@pytest.mark.parametrize(
    "assistant", ["assistant", "gpt", "ChatGPT", "bing", "bard", "claude", "model", "bot"]
)
@pytest.mark.parametrize("system", ["system", "developer"])
def test_roles_have_many_names(user: str, assistant: str, system: str) -> None:
    turns = [turn(system, "Be brief."), turn(user, "Why?"), turn(assistant, "So.")]
    assert messages(*turns) == (SYSTEM, QUESTION, ANSWER)


@pytest.mark.parametrize(
    "flag",
    [
        *({"weight": 0}, {"weight": 0.0}, {"weight": "0"}, {"weight": False}),
        *({"train": False}, {"train": 0}, {"train": "False"}, {"loss": 0}, {"loss": False}),
        *({"train": "no"}, {"train": " No"}, {"loss": "OFF"}, {"weight": "no"}, {"train": 0.0}),
        *({"weight": 1, "train": "no"}, {"train": "0", "loss": 1}),
    ],
)
def test_a_turn_with_weight_0_is_context(flag: dict[str, object]) -> None:
    turns = messages(ASKED, {**turn("assistant", "Bad."), **flag}, ASKED, {**ANSWERED, "weight": 1})
    bad = Message("assistant", "Bad.", is_context=True)
    assert turns == (QUESTION, bad, QUESTION, ANSWER)
    gpt = {"from": "gpt", "value": "Bad.", **flag}
    asked, answered = {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}
    assert parse(asked, gpt, asked, answered, name="conversations").chat.messages == turns
    assert messages({**ASKED, **flag}, ANSWERED) == (QUESTION, ANSWER)
    with pytest.raises(UnusableRowError, match="every answer is context only"):
        messages(ASKED, {**ANSWERED, **flag})


@pytest.mark.parametrize(
    "flag",
    [
        *({"weight": 1}, {"weight": None}, {"weight": math.nan}, {"train": True}, {"loss": "1"}),
        *({"train": "Yes"}, {"train": "on"}, {"loss": "TRUE "}, {"weight": "yes"}, {"loss": 1.0}),
    ],
)
def test_other_weights_are_learned(flag: dict[str, object]) -> None:
    assert messages(ASKED, {**ANSWERED, **flag}) == (QUESTION, ANSWER)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_of_an_answer_is_kept_apart_from_it(key: str) -> None:
    thought = ANSWER._replace(reasoning="Hm.")
    assert messages(ASKED, {**ANSWERED, key: "Hm."}) == (QUESTION, thought)
    assert messages(ASKED, {**ANSWERED, key: None}) == (QUESTION, ANSWER)
    assert messages(ASKED, {**ANSWERED, key: " "}) == (QUESTION, ANSWER)
    asked, said = {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So.", key: "Hm."}
    assert parse(asked, said, name="conversations").chat.messages == (QUESTION, thought)
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "So."}]
    assert messages(ASKED, turn("assistant", parts)) == (QUESTION, thought)


def call(name: str, arguments: object, **others: object) -> dict[str, Any]:
    return {**others, "type": "function", "function": {"name": name, "arguments": arguments}}


CALLED = Message("assistant", "", tool_calls=(call("calc", {"x": 1}),))
RESULT = Message("tool", "2", name="calc")


@pytest.mark.parametrize(
    "called",
    [
        turn("assistant", None, tool_calls=[call("calc", '{"x": 1}')]),
        turn("assistant", "", tool_calls=[call("calc", {"x": 1, "y": None})]),
        turn("assistant", "", tool_calls=json.dumps([call("calc", {"x": 1})])),
        turn("assistant", None, tool_calls=[{"name": "calc", "arguments": {"x": 1}}]),
        turn("assistant", None, function_call={"name": "calc", "arguments": '{"x": 1}'}),
        {"from": "function_call", "value": '{"name": "calc", "arguments": {"x": 1}}'},
        {"from": "tool_call", "value": '[{"name": "calc", "arguments": "{\\"x\\": 1}"}]'},
        {"role": "function_call", "content": '{"name": "calc", "parameters": {"x": 1}}'},
    ],
)
@pytest.mark.parametrize("role", ["tool", "function", "observation", "ipython"])
def test_a_call_and_its_result_are_turns_in_every_spelling(
    called: dict[str, object], role: str
) -> None:
    chat = parse(ASKED, called, turn(role, "2", name="calc"), ANSWERED).chat
    assert chat == Chat((QUESTION, CALLED, RESULT, ANSWER))
    assert messages(ASKED, called) == (QUESTION, CALLED), "a call may be the last answer"


def test_calls_keep_their_numbers_and_give_their_results_a_name() -> None:
    calls = [call("calc", "{}", id="c1"), call("time", None, id="c2")]
    results = [turn("tool", "2", tool_call_id="c2"), turn("tool", {"a": 1}, tool_call_id="c1")]
    turns = messages(ASKED, turn("assistant", "Let me see.", tool_calls=calls), *results, ANSWERED)
    expected = (call("calc", {}, id="c1"), call("time", {}, id="c2"))
    assert turns[1] == Message("assistant", "Let me see.", tool_calls=expected)
    assert turns[2:4] == (
        Message("tool", "2", name="time"),
        Message("tool", '{"a": 1}', name="calc"),
    )


@pytest.mark.parametrize(
    ("turns", "content"),
    [
        ([ASKED, turn("user", "Who?"), ANSWERED], ("Why?\n\nWho?", "So.")),
        ([ASKED, ANSWERED, turn("assistant", "Yes.")], ("Why?", "So.\n\nYes.")),
        (
            [turn("system", "A."), turn("developer", "B."), ASKED, ANSWERED],
            ("A.\n\nB.", "Why?", "So."),
        ),
        ([ASKED, ASKED, ASKED, ANSWERED, ANSWERED], ("Why?\n\nWhy?\n\nWhy?", "So.\n\nSo.")),
    ],
)
def test_neighbours_of_one_role_are_joined_and_counted(
    turns: list[object], content: tuple[str, ...]
) -> None:
    parsed = parse(*turns)
    assert tuple(message.content for message in parsed.chat.messages) == content
    assert parsed.is_joined
    assert not parse(ASKED, ANSWERED, ASKED, ANSWERED).is_joined


@pytest.mark.parametrize(
    "last", [[ASKED], [ASKED, ASKED], [turn("system", "Be brief.")], [turn("tool", "4")]]
)
def test_turns_that_nobody_answered_are_left_out_and_counted(last: list[object]) -> None:
    parsed = parse(ASKED, ANSWERED, *last)
    assert parsed.chat == parse(ASKED, ANSWERED).chat
    assert parsed.is_unanswered
    assert not parse(ASKED, ANSWERED).is_unanswered


def test_neighbours_stay_apart_where_joining_would_change_what_is_learned() -> None:
    weightless = {**turn("assistant", "Bad."), "weight": 0}
    thoughtful = {**ANSWERED, "reasoning": "Hm."}
    calling = turn("assistant", None, tool_calls=[call("calc", {"x": 1})])
    for second, first in ((weightless, ANSWERED), (thoughtful, ANSWERED), (ANSWERED, calling)):
        parsed = parse(ASKED, first, second)
        assert len(parsed.chat.messages) == 3
        assert not parsed.is_joined
    both = parse(ASKED, calling, calling)
    assert both.chat.messages[1].tool_calls == CALLED.tool_calls * 2, "calls at the same time"


@pytest.mark.parametrize("opening", [[], [turn("system", "Be brief.")]])
def test_an_answer_before_the_first_question_is_context(opening: list[object]) -> None:
    turns = messages(*opening, turn("assistant", "Hello!"), ASKED, ANSWERED)
    assert turns[-3:] == (Message("assistant", "Hello!", is_context=True), QUESTION, ANSWER)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "no turns"),
        (["Why?", "So."], "a turn is not a role and a text"),
        ([["user", "Why?"]], "a turn is not a role and a text"),
        (["{oops"], "a turn is a string that is not JSON"),
        ([turn("narrator", "3"), ANSWERED], "unknown role"),
        ([turn(["user"], "3")], "unknown role"),
        ([turn("user", None), ANSWERED], "user is not a string"),
        ([turn("user", [{"type": "image_url"}]), ANSWERED], "a part of the content is not text"),
        ([turn("user", [{"type": "text"}]), ANSWERED], "a part of the content is not a string"),
        ([ASKED], "no assistant turn"),
        ([turn("system", "")], "no assistant turn"),
        ([ANSWERED], "no user turn before the answer"),
        ([turn("system", "Be."), ANSWERED], "no user turn before the answer"),
        ([ASKED, turn("system", "Be."), ANSWERED], "a system turn after the first turn"),
        ([turn("tool", "3"), ASKED, ANSWERED], "a tool's turn without a call"),
        ([ASKED, turn("tool", "3"), ANSWERED], "a tool's turn without a call"),
        ([ASKED, turn("user", " "), ANSWERED], "empty prompt"),
        ([ASKED, turn("assistant", "")], "empty answer"),
        ([ASKED, turn("assistant", "", tool_calls=[])], "empty answer"),
        ([ASKED, turn("assistant", "", tool_calls=[{"id": "1"}])], "a tool call has no name"),
        ([ASKED, turn("assistant", "", tool_calls="x")], "tool_calls is a string that is not JSON"),
        (
            [ASKED, turn("assistant", "", tool_calls=[call("calc", "x=1")])],
            "a tool call's arguments is a string that is not JSON",
        ),
        (
            [ASKED, turn("assistant", "", tool_calls=[call("calc", "[1]")])],
            "a tool call's arguments are no object",
        ),
        ([ASKED, {**ANSWERED, "weight": 0.5}], "a turn's weight is neither 0 nor 1"),
        ([ASKED, {**ANSWERED, "train": "nein"}], "a turn's train is neither 0 nor 1"),
        ([ASKED, {**ANSWERED, "train": ""}], "a turn's train is neither 0 nor 1"),
        ([ASKED, {**ANSWERED, "loss": -1}], "a turn's loss is neither 0 nor 1"),
        ([ASKED, {**ANSWERED, "weight": 0, "loss": ["0"]}], "a turn's loss is neither 0 nor 1"),
        ([ASKED, {**ANSWERED, "thinking": ["Hm."]}], "an answer's reasoning is not a string"),
        ([ASKED, {**ANSWERED, "thinking": "\ud800"}], "not valid Unicode"),
        ([ASKED, turn("bot", "", tool_calls=[call("\ud800", {})])], "not valid Unicode"),
    ],
)
def test_turns_that_are_no_chat_say_why(turns: list[object], reason: str) -> None:
    with pytest.raises(UnusableRowError) as caught:
        messages(*turns)
    assert str(caught.value) == f"messages: {reason}"


def test_turns_as_a_string_that_is_not_json_say_so() -> None:
    for value in ("Why?", "[{'role': 'user'}]", ""):
        with pytest.raises(UnusableRowError, match="messages: the value is a string that is not"):
            RowParser().parse({"messages": value})
    with pytest.raises(UnusableRowError, match="lists of roles and contents differ"):
        RowParser().parse({"messages": {"role": ["user", "bot"], "content": ["Why?"]}})
