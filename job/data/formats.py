"""Turns a row into messages, and counts the rows that give none."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from job.data.chat import PLAIN_TEXT, Chat, Message
from job.errors import DataError

UNUSABLE_LIMIT = 0.05  # share of the rows; above it the data set is not what the user thinks it is
TEXT_LIMIT = 2**20  # characters of one row
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
_TOOL_ROLES = ("tool", "function", "ipython", "observation", "function_call", "tool_call")
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))


class Columns(NamedTuple):
    """The columns that the user named instead of a detected format."""

    prompt: str
    completion: str


class UnusableRowError(Exception):
    """A row gives no sample; the message is one of a few reasons, by which rows are counted."""


def row_chat(row: Mapping[str, Any], columns: Columns | None = None) -> Chat:
    """The row's chat: [system], then user and assistant in turn, the last one the assistant's.

    The format is found row by row from the columns that are not null, in this order: `messages`;
    `conversations` (ShareGPT); `instruction`, `input`, `output` (Alpaca); `prompt` with
    `completion` or `response`; `question` with `answer`; `text`, which gives one message of role
    `PLAIN_TEXT`. Named `columns` replace all of these. Raises `UnusableRowError`.
    """
    messages = _checked(_raw_messages(row, columns))
    if sum(len(message.content) for message in messages) > TEXT_LIMIT:
        raise UnusableRowError("row over 1 MB")
    return Chat(messages)


def _raw_messages(row: Mapping[str, Any], columns: Columns | None) -> list[Message]:
    present = {name for name, value in row.items() if value is not None}
    if columns is not None:
        for name in columns:
            if name not in present:
                raise UnusableRowError(f"no column {name!r}")
        return _pair(row[columns.prompt], row[columns.completion])
    for name in ("messages", "conversations"):
        if name in present:
            return _turns(row[name])
    if {"instruction", "output"} <= present:
        return _alpaca(row)
    for prompt, completion in _PAIRS:
        if {prompt, completion} <= present:
            return _pair(row[prompt], row[completion])
    if "text" in present:
        return [Message(PLAIN_TEXT, _text(row["text"], "text"))]
    raise UnusableRowError("no known columns")


def _pair(prompt: object, completion: object) -> list[Message]:
    return [
        Message("user", _text(prompt, "prompt")),
        Message("assistant", _text(completion, "answer")),
    ]


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    instruction = _text(row["instruction"], "prompt")
    context = _text(row.get("input") or "", "prompt")
    prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
    return [Message("user", prompt), Message("assistant", _text(row["output"], "answer"))]


def _turns(value: object) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise UnusableRowError("no turns")
    messages = [_turn(turn) for turn in value]
    if messages[0].role == "system" and not messages[0].content.strip():
        del messages[0]  # many sets write an empty system prompt where there is none
    while messages and messages[-1].role != "assistant":
        del messages[-1]  # a question that nobody answered teaches nothing
    return messages


def _turn(turn: object) -> Message:
    if not isinstance(turn, Mapping):
        raise UnusableRowError("a turn is not a role and a text")
    name = turn.get("role") if turn.get("role") is not None else turn.get("from")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    name = name.lower() if isinstance(name, str) else ""
    # Templates write tools in ways of their own; half a tool's use would teach wrong answers.
    if name in _TOOL_ROLES or turn.get("tool_calls") or turn.get("function_call"):
        raise UnusableRowError("a tool's turn or call")
    role = _ROLES.get(name)
    if role is None:
        raise UnusableRowError("unknown role")
    if isinstance(content, list):
        content = _joined_parts(content)
    return Message(role, _text(content, "answer" if role == "assistant" else role))


def _joined_parts(parts: list[object]) -> str:
    """Join OpenAI's content parts as chat templates do: without anything between them."""
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise UnusableRowError("a part of the content is not text")
        texts.append(_text(part.get("text"), "a part of the content"))
    return "".join(texts)


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise UnusableRowError(f"{what} is not a string")
    return value


def _checked(messages: list[Message]) -> tuple[Message, ...]:
    if not messages:
        raise UnusableRowError("no assistant turn")
    if messages[0].role != PLAIN_TEXT:
        turns = messages[1:] if messages[0].role == "system" else messages
        for index, message in enumerate(turns):
            if message.role != ("user", "assistant")[index % 2]:
                raise UnusableRowError("roles out of order")
    for message in messages:
        if not message.content.strip():
            what = {"assistant": "answer", "user": "prompt"}.get(message.role, message.role)
            raise UnusableRowError(f"empty {what}")
        try:
            message.content.encode()
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair
            raise UnusableRowError("not valid Unicode") from None
    return tuple(messages)


@dataclass
class UnusableRows:
    """Rows that gave no sample, by reason, with the places of the first three of each."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Count one row."""
        self.counts[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < 3:
            places.append(place)

    def check_columns(self, columns_seen: Iterable[str], columns: Columns | None) -> None:
        """Raise `DataError` if a named column is in no row."""
        seen = sorted(columns_seen)
        for name in columns or ():
            if name not in seen and self.counts[f"no column {name!r}"]:
                raise _no_such_column(name, seen)

    def check_share(self, num_rows: int, *, way_out: str) -> None:
        """Raise `DataError` if more than 5 % of `num_rows` are unusable."""
        num_unusable = self.counts.total()
        if num_unusable <= UNUSABLE_LIMIT * num_rows:
            return
        reasons = "; ".join(
            f"{count} x {reason} ({', '.join(self.places[reason])}{', ...' if count > 3 else ''})"
            for reason, count in self.counts.most_common()
        )
        raise DataError(
            f"JOB_DATASET_URI: {num_unusable} of {num_rows} rows are unusable, limit is 5 %: "
            f"{reasons}: correct the rows, or {way_out}"
        )


def _no_such_column(name: str, columns_seen: list[str]) -> DataError:
    nearest = difflib.get_close_matches(name, columns_seen, n=1, cutoff=0.0)
    hint = f"did you mean {nearest[0]!r}" if nearest else "the rows have no columns at all"
    return DataError(
        f"JOB_PROMPT_COLUMN, JOB_COMPLETION_COLUMN: no row has a column {name!r}, {hint}: "
        f"columns present: {listing(columns_seen)}"
    )


def listing(names: list[str]) -> str:
    """At most twenty names in one line, for a message."""
    shown = [name[:60] for name in names[:20]]
    return ", ".join(shown) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
