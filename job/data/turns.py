"""Turns as data sets write them, OpenAI's way and ShareGPT's, read into messages."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from job.data.chat import PLAIN_TEXT, Message
from job.data.unusable import UnusableRowError

_SPELLINGS = {
    "system": "system developer",
    "user": "user human prompter",
    "assistant": "assistant gpt chatgpt model bot ai chatbot bing bard claude",
    "tool": "tool function observation ipython tool_response function_response tool_result",
    "call": "function_call tool_call",  # ShareGPT: an assistant's turn that is a call and no text
}
_ROLES = {name: role for role, names in _SPELLINGS.items() for name in names.split()}
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value", "text")
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_LEARNED_KEYS = ("weight", "train", "loss")
_SWITCHES = {
    **dict.fromkeys(("true", "yes", "on", "1"), 1),
    **dict.fromkeys(("false", "no", "off", "0"), 0),
}
_KNOWN_KEYS = {
    *(*_ROLE_KEYS, *_CONTENT_KEYS, *_REASONING_KEYS, *_LEARNED_KEYS),
    *("name", "tool_calls", "function_call", "tool_call_id", "id"),
}
_IDENTIFIER = re.compile(r"(?:.*[_ -])?id|idx|index|__index_level_\d+__")  # the last: pandas'
_THOUGHT_PARTS = ("thinking", "reasoning")


def is_null(value: object) -> bool:
    """Whether a value is absent: null, or the NaN that pandas writes in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def says_something(name: str, value: object) -> bool:
    """Whether a column or key that nobody reads would be missed.

    Blank texts, nulls and empty lists say nothing; numbers under the name of an identifier only
    tell rows apart.
    """
    is_identifier = _IDENTIFIER.fullmatch(name.strip().lower()) is not None
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, str | bytes):
            if inner.strip():
                return True
        elif isinstance(inner, list):
            waiting.extend(inner)
        elif isinstance(inner, Mapping):
            waiting.extend(inner.values())
        elif not is_identifier and not is_null(inner):
            return True
    return False


def text_of(value: object, what: str) -> str:
    """The value, if it is a string. Raises `UnusableRowError`."""
    if not isinstance(value, str):
        raise UnusableRowError(f"{what} is not a string")
    return value


def parsed(value: object, what: str) -> object:
    """The value itself, or what it says if it is a string of JSON. Raises `UnusableRowError`."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise UnusableRowError(f"{what} is a string that is not JSON") from None


def without_nulls(value: Any) -> Any:
    """The value without the keys that hold null: Parquet gives every struct every key."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if not is_null(inner)}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def read_turns(value: object, what: str, unused: set[str]) -> list[Message]:
    """The turns of one column, as they stand there.

    A list of turns, a single turn, a struct of lists (one of roles, one of contents), or any of
    these as a string of JSON. Keys of turns that say something and mean nothing here are put into
    `unused`. Raises `UnusableRowError`.
    """
    value = parsed(value, "the value")
    if isinstance(value, Mapping):
        value = _turns_of_struct(value)
    if not isinstance(value, list) or not value:
        raise UnusableRowError("no turns")
    messages = [_turn(turn, what, unused) for turn in value]
    return (
        _with_tool_names(messages, value) if any(m.role == "tool" for m in messages) else messages
    )


def _turns_of_struct(struct: Mapping[str, Any]) -> list[object]:
    columns = {name: items for name, items in struct.items() if not is_null(items)}
    if any(isinstance(columns.get(key), list) for key in _ROLE_KEYS):
        lists = [items for items in columns.values() if isinstance(items, list)]
        if len(lists) < len(columns) or len({len(items) for items in lists}) > 1:
            raise UnusableRowError("lists of roles and contents differ")
        return [dict(zip(columns, items, strict=True)) for items in zip(*lists, strict=True)]
    return [struct]


def _first(turn: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((value for key in keys if not is_null(value := turn.get(key))), None)


def _turn(turn: object, what: str, unused: set[str]) -> Message:
    if isinstance(turn, str) and turn.lstrip().startswith("{"):
        turn = parsed(turn, "a turn")
    if not isinstance(turn, Mapping):
        raise UnusableRowError("a turn is not a role and a text")
    name = _first(turn, _ROLE_KEYS)
    role = _ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise UnusableRowError("unknown role")
    if not turn.keys() <= _KNOWN_KEYS:
        more = (key for key in turn if key not in _KNOWN_KEYS and says_something(key, turn[key]))
        unused.update(f"{what}[].{key}" for key in more)
    content = _first(turn, _CONTENT_KEYS)
    if role == "assistant":
        return _answer(turn, content)
    if role == "call":
        calls = _calls(parsed(content, "a tool call"))
        return Message("assistant", "", tool_calls=calls, is_context=not _is_learned(turn))
    if role == "tool":
        name = turn.get("name")
        return Message("tool", _tool_text(content), name=name if isinstance(name, str) else "")
    text, _ = _parts(content) if isinstance(content, list) else (text_of(content, role), "")
    return Message(role, text)


def _answer(turn: Mapping[str, Any], content: object) -> Message:
    calls: tuple[dict[str, Any], ...] = ()
    if wanted := turn.get("tool_calls"):
        calls = _calls(parsed(wanted, "tool_calls"))
    elif wanted := turn.get("function_call"):
        calls = _calls(wanted)
    thought = _first(turn, _REASONING_KEYS)
    reasoning = "" if thought is None else text_of(thought, "an answer's reasoning")
    if isinstance(content, list):
        text, thoughts = _parts(content)
        reasoning = reasoning or thoughts
    else:
        text = "" if content is None and calls else text_of(content, "answer")
    return Message(
        *("assistant", text, reasoning if reasoning.strip() else "", calls),
        is_context=not _is_learned(turn),
    )


def _is_learned(turn: Mapping[str, Any]) -> bool:
    """What `weight`, `train` and `loss` say: 0 and false (also as words) make a turn context.

    Raises `UnusableRowError` for any other value: nobody knows what was meant by it.
    """
    is_learned = True
    for key in _LEARNED_KEYS:
        value = turn.get(key)
        if is_null(value):
            continue
        if isinstance(value, str):
            value = _SWITCHES.get(value.strip().lower(), value)
        if value not in (0, 1):
            raise UnusableRowError(f"a turn's {key} is neither 0 nor 1")
        is_learned = is_learned and bool(value)
    return is_learned


def _parts(parts: list[object]) -> tuple[str, str]:
    """OpenAI's content parts, joined as chat templates do, without anything between; the thoughts.

    Raises `UnusableRowError` for a part that is no text.
    """
    texts, thoughts = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _THOUGHT_PARTS and isinstance(part, Mapping):
            thoughts.append(text_of(_first(part, (str(kind), "text")), "a part of the content"))
        elif kind == "text" and isinstance(part, Mapping):
            texts.append(text_of(part.get("text"), "a part of the content"))
        else:
            raise UnusableRowError("a part of the content is not text")
    return "".join(texts), "\n\n".join(thoughts)


def _calls(value: object) -> tuple[dict[str, Any], ...]:
    """One call or several, each as OpenAI writes it but with its arguments as an object."""
    return tuple(map(_call, value if isinstance(value, list) else [value]))


def _call(call: object) -> dict[str, Any]:
    call = parsed(call, "a tool call")
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(inner, Mapping) or not name:
        raise UnusableRowError("a tool call has no name")
    arguments = _first(inner, ("arguments", "parameters"))
    if isinstance(arguments, str) and arguments.strip():
        arguments = parsed(arguments, "a tool call's arguments")
    else:
        arguments = without_nulls(arguments or {})
    if not isinstance(arguments, dict):
        raise UnusableRowError("a tool call's arguments are no object")
    function = {"name": text_of(name, "a tool's name"), "arguments": arguments}
    number = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**number, "type": "function", "function": function}


def _tool_text(content: object) -> str:
    if isinstance(content, list) and all(isinstance(p, Mapping) and "type" in p for p in content):
        return _parts(content)[0]
    if isinstance(content, Mapping | list):
        return json.dumps(without_nulls(content), ensure_ascii=False)
    return "" if content is None else text_of(content, "tool")


def _with_tool_names(messages: list[Message], turns: list[Any]) -> list[Message]:
    """The messages, with the names of tools that only the numbers of the calls tell."""
    calls = [call for message in messages for call in message.tool_calls if "id" in call]
    names = {call["id"]: call["function"]["name"] for call in calls}
    named = []
    for message, turn in zip(messages, turns, strict=True):
        number = turn.get("tool_call_id") if isinstance(turn, Mapping) else None
        is_unnamed = message.role == "tool" and not message.name and isinstance(number, str)
        named.append(message._replace(name=names.get(number, "")) if is_unnamed else message)
    return named


class Settled(NamedTuple):
    """Turns in an order that is learned, and what it took."""

    messages: tuple[Message, ...]
    is_joined: bool  # neighbouring turns of one role became one
    is_unanswered: bool  # turns after the last answer were left out: they teach nothing


def settled(turns: list[Message]) -> Settled:
    """The chat that these turns make.

    System turns first, then users' and assistants' in turn, the last one an assistant's; a tool's
    turns follow an assistant's. What stands before the first question is context. Raises
    `UnusableRowError` for any other order, an empty turn, and a chat of which nothing is learned.
    """
    messages: list[Message] = []
    is_joined = False
    for turn in turns:
        if turn.role == "system" and not turn.content.strip():
            continue  # many sets write an empty system prompt where there is none
        _check_content(turn)
        if messages and _may_join(messages[-1], turn):
            messages[-1] = _joined(messages[-1], turn)
            is_joined = True
        else:
            messages.append(turn)
    num_turns = len(messages)
    while messages and messages[-1].role not in ("assistant", PLAIN_TEXT):
        del messages[-1]
    if not messages:
        raise UnusableRowError("no assistant turn")
    if messages[0].role != PLAIN_TEXT:
        _check_order(messages)
    return Settled(tuple(messages), is_joined, len(messages) < num_turns)


def _check_content(message: Message) -> None:
    if not message.content.strip() and not message.tool_calls and message.role != "tool":
        what = {"assistant": "answer", "user": "prompt"}.get(message.role, message.role)
        raise UnusableRowError(f"empty {what}")
    try:
        message.content.encode()
        message.reasoning.encode()
        if message.tool_calls:
            json.dumps(message.tool_calls, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        raise UnusableRowError("not valid Unicode") from None


def _may_join(first: Message, second: Message) -> bool:
    """Whether two neighbours are one turn, without anything of them changing its place."""
    if first.role != second.role or first.role == "tool" or first.is_context != second.is_context:
        return False
    return not second.reasoning and not (first.tool_calls and second.content)


def _joined(first: Message, second: Message) -> Message:
    content = "\n\n".join(filter(None, (first.content, second.content)))
    return first._replace(content=content, tool_calls=first.tool_calls + second.tool_calls)


def _check_order(messages: list[Message]) -> None:
    """Refuse what is no chat, and mark the answers before the first question as context."""
    has_question = False
    for index, message in enumerate(messages):
        if message.role == "system" and index > 0:
            raise UnusableRowError("a system turn after the first turn")
        if message.role == "tool" and (
            index == 0 or messages[index - 1].role not in ("assistant", "tool")
        ):
            raise UnusableRowError("a tool's turn without a call")
        has_question = has_question or message.role == "user"
        if message.role == "assistant" and not has_question:
            messages[index] = message._replace(is_context=True)
    if not has_question:
        raise UnusableRowError("no user turn before the answer")
    if all(message.is_context for message in messages if message.role == "assistant"):
        raise UnusableRowError("every answer is context only (weight 0)")
