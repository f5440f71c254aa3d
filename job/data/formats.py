"""Turns a row into a chat: finds its format from its columns, and what stands beside it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from string import Formatter
from typing import Any, NamedTuple

from job.data.chat import PLAIN_TEXT, Chat, Message
from job.data.turns import (
    is_null,
    parsed,
    read_turns,
    says_something,
    settled,
    text_of,
    without_nulls,
)
from job.data.unusable import UnusableRowError, no_such_column
from job.errors import DataError, SettingsError

__all__ = ["Layout", "ParsedRow", "RowParser", "UnusableRowError"]

TEXT_LIMIT = 2**20  # characters of one row
_TURNS = ("messages", "conversations")
_ALSO_TURNS = ("conversation", "chat", "dialog", "dialogue")  # or a title, beside a pair
# A prompt's column and its answer's: those that are usual together first, then any two.
_PROMPTS = ("instruction", "prompt", "question", "query", "input")
_ANSWERS = ("output", "completion", "response", "answer", "answers")
_PAIRS = (
    *(("instruction", "output"), ("prompt", "completion"), ("prompt", "response")),
    *(("question", "answer"), ("query", "response"), ("input", "output")),
    *((prompt, answer) for prompt in _PROMPTS for answer in _ANSWERS),
)
_SYSTEM = ("system", "system_prompt", "system_message")
_CONTEXT = ("context", "passage")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_KNOWN_PLANS = 1000
_TEMPLATE = "JOB_PROMPT_TEMPLATE"


class Layout(NamedTuple):
    """What the settings say about the columns, beside what is found from their names."""

    prompt: str | None = None  # JOB_PROMPT_COLUMN
    completion: str | None = None  # JOB_COMPLETION_COLUMN
    template: str | None = None  # JOB_PROMPT_TEMPLATE: column names in braces
    system: str | None = None  # JOB_SYSTEM_PROMPT

    @property
    def template_columns(self) -> tuple[str, ...]:
        """The columns' names in the template."""
        fields = Formatter().parse(self.template or "")
        return tuple(name for _, name, _, _ in fields if name is not None)

    @property
    def named(self) -> tuple[str, ...]:
        """Every column that the settings name."""
        columns = (self.prompt, self.completion)
        return (*(name for name in columns if name is not None), *self.template_columns)

    def check_columns(self, columns_seen: Collection[str]) -> None:
        """Raise if no row has a column that the settings name.

        `SettingsError` for one in JOB_PROMPT_TEMPLATE, `DataError` for the others.
        """
        normal = {_normal(name) for name in columns_seen}
        for name in self.template_columns:
            if _normal(name) not in normal:
                raise SettingsError(f"{_TEMPLATE}: {no_such_column(name, columns_seen)}")
        for name in self.named:
            if name not in columns_seen and name not in self.template_columns:
                what = no_such_column(name, columns_seen)
                raise DataError(f"JOB_PROMPT_COLUMN, JOB_COMPLETION_COLUMN: {what}")


class ParsedRow(NamedTuple):
    """A row's chat, and what happened on the way to it."""

    chat: Chat
    is_joined: bool  # see `turns.Settled`
    is_unanswered: bool
    unused: tuple[str, ...]  # columns that say something which is not in the chat


class _Plan(NamedTuple):
    """Which columns of a row are what, by their names as they stand in the row."""

    label: str  # for the reasons of unusable rows
    turns: str | None = None
    prompt: str | None = None  # also of a prompt template, where it is ""
    answer: str | None = None
    text: str | None = None
    system: str | None = None
    history: str | None = None
    tools: str | None = None
    reasoning: str | None = None
    context: str | None = None
    input: str | None = None
    filled: tuple[tuple[str, str | None], ...] = ()  # of the prompt template, see `_filled`
    unused: tuple[str, ...] = ()


class RowParser:
    """Reads rows into chats by one layout; knows the formats of the rows that it saw before."""

    def __init__(self, layout: Layout | None = None) -> None:
        self._layout = layout or Layout()
        self._plans: dict[tuple[str, ...], _Plan] = {}

    def parse(self, row: Mapping[str, Any]) -> ParsedRow:
        """The row's chat: [system], then user and assistant in turn, the last the assistant's.

        The format is found row by row from the columns that are not null, in this order:
        JOB_PROMPT_TEMPLATE or the columns that the settings name; a list of turns; a prompt and
        an answer; `text`, which gives one message of role `PLAIN_TEXT`. Raises `UnusableRowError`.
        """
        names = tuple([name for name, value in row.items() if not is_null(value)])
        plan = self._plans.get(names)
        if plan is None:
            if len(self._plans) == _KNOWN_PLANS:
                self._plans.clear()
            plan = self._plans[names] = _plan(names, self._layout)
        unused = {n for n in plan.unused if says_something(n, row[n])} if plan.unused else set()
        try:
            return _parsed(row, plan, self._layout, unused)
        except UnusableRowError as error:
            raise UnusableRowError(f"{plan.label}: {error}") from None


def _normal(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _plan(names: tuple[str, ...], layout: Layout) -> _Plan:
    present = {_normal(name): name for name in reversed(names)}
    present.update((name, name) for name in names if name == _normal(name))
    main = _main_columns(names, present, layout)
    found: dict[str, Any] = dict(main)
    taken = set(main.values())
    if layout.template is not None:
        filled = _filled(layout.template, present)
        found |= {"prompt": "", "filled": filled}
        taken |= {column for _, column in filled if column}
    for what, spellings in _beside(main, layout).items():
        columns = (present[name] for name in spellings if name in present)
        column = next((column for column in columns if column not in taken), None)
        if column is not None:
            found[what] = column
            taken.add(column)
    label = ", ".join(main.values() if layout.template is None else [_TEMPLATE, *main.values()])
    return _Plan(label, unused=tuple(name for name in names if name not in taken), **found)


def _beside(main: Mapping[str, str], layout: Layout) -> dict[str, tuple[str, ...]]:
    """What else may belong to a row of this format, with the names that its column may have."""
    if "text" in main:
        return {}
    beside = {"system": _SYSTEM, "tools": ("tools",)}
    if "turns" not in main:
        beside |= {"history": ("history",), "reasoning": _REASONING}
    if layout.prompt is None:  # a prompt's column that the user names is the prompt as it is
        prompt = _normal(main.get("prompt", ""))
        if prompt in ("instruction", "question", "query"):
            beside["context"] = _CONTEXT
        if prompt == "instruction":
            beside["input"] = ("input",)
    return beside


def _main_columns(
    names: tuple[str, ...], present: Mapping[str, str], layout: Layout
) -> dict[str, str]:
    """The columns that make the format. Raises `UnusableRowError` if there are none."""
    for name in (layout.prompt, layout.completion):
        if name is not None and name not in names:
            raise UnusableRowError(f"no column {name!r}")
    if layout.template is not None:
        in_template = {_normal(name) for name in layout.template_columns}
        answers = (present[n] for n in _ANSWERS if n in present and n not in in_template)
        answer = layout.completion or next(answers, None)
        if answer is None:
            raise UnusableRowError("no answer's column; give JOB_COMPLETION_COLUMN")
        return {"answer": answer}
    if layout.prompt is not None and layout.completion is not None:
        return {"prompt": layout.prompt, "answer": layout.completion}
    for name in _TURNS:
        if name in present:
            return {"turns": present[name]}
    for prompt, answer in _PAIRS:
        if prompt in present and answer in present:
            return {"prompt": present[prompt], "answer": present[answer]}
    for name in _ALSO_TURNS:
        if name in present:
            return {"turns": present[name]}
    if "text" in present:
        return {"text": present["text"]}
    raise UnusableRowError("no known columns")


def _filled(template: str, present: Mapping[str, str]) -> tuple[tuple[str, str | None], ...]:
    """The template as pairs of a text and the column after it.

    That is "" for a column that the row lacks, and None after the last text.
    """
    columns = {**present, **{name: name for name in present.values()}}
    return tuple(
        (text, None if name is None else columns.get(name, columns.get(_normal(name), "")))
        for text, name, _, _ in Formatter().parse(template.replace("\\n", "\n"))
    )


def _parsed(row: Mapping[str, Any], plan: _Plan, layout: Layout, unused: set[str]) -> ParsedRow:
    if plan.text is not None:
        if layout.system is not None:
            raise UnusableRowError("a text has no place for JOB_SYSTEM_PROMPT")
        turns, is_pair = [Message(PLAIN_TEXT, text_of(row[plan.text], plan.text))], False
    elif plan.turns is not None:
        turns, is_pair = read_turns(row[plan.turns], plan.turns, unused), False
    else:
        turns, is_pair = _pair(row, plan, unused)
    if plan.history is not None:
        earlier = _history(row[plan.history], unused)
        turns, is_pair = earlier + turns, is_pair and not earlier
    if plan.system is not None:
        turns = _with_system(text_of(row[plan.system], plan.system), turns)
    if layout.system is not None and not any(
        t.role == "system" and t.content.strip() for t in turns
    ):
        turns.insert(0, Message("system", layout.system))
    messages, is_joined, is_unanswered = settled(turns)
    tools = () if plan.tools is None else _tools(row[plan.tools])
    _check_length(messages, tools)
    return ParsedRow(Chat(messages, tools, is_pair), is_joined, is_unanswered, tuple(unused))


def _with_system(text: str, turns: list[Message]) -> list[Message]:
    """The turns after the column's system turn; one that they begin with is joined to it."""
    if turns[0].role == "system" and turns[0].content.strip() == text.strip():
        return turns
    return [Message("system", text), *turns]


def _pair(row: Mapping[str, Any], plan: _Plan, unused: set[str]) -> tuple[list[Message], bool]:
    """The question and the answer, and whether both were plain texts (and not TRL's messages)."""
    assert plan.answer is not None
    prompt = _prompt_text(row, plan) if plan.filled else row[plan.prompt or ""]
    answer = row[plan.answer]
    if not isinstance(answer, str) and _normal(plan.answer) in ("answer", "answers"):
        answer = _first_answer(answer)
    if _are_turns(prompt) or _are_turns(answer):
        asked = _turns_or_text(prompt, "user", plan.prompt or "prompt", unused)
        said = _turns_or_text(answer, "assistant", plan.answer, unused)
        beside = (plan.context, plan.input, plan.reasoning)
        unused.update(name for name in beside if name and says_something(name, row[name]))
        # As in TRL: the prompt is never learned.
        asked = [m._replace(is_context=m.role == "assistant") for m in asked]
        return asked + said, False
    question = text_of(prompt, plan.prompt or "prompt")
    if plan.context is not None and (context := _passage(row[plan.context], plan.context)):
        question = f"{context}\n\n{question}"
    if plan.input is not None:
        context = text_of(row[plan.input], plan.input)
        question = f"{question}\n\n{context}" if context.strip() else question
    reasoning = "" if plan.reasoning is None else text_of(row[plan.reasoning], plan.reasoning)
    reasoning = reasoning if reasoning.strip() else ""
    said = [Message("assistant", text_of(answer, plan.answer), reasoning)]
    return [Message("user", question), *said], True


def _are_turns(value: object) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping)


def _turns_or_text(value: object, role: str, what: str, unused: set[str]) -> list[Message]:
    return [Message(role, value)] if isinstance(value, str) else read_turns(value, what, unused)


def _first_answer(value: object) -> object:
    """The first of several answers (SQuAD: a struct with a list of texts); one that is a text."""
    if isinstance(value, Mapping) and "text" in value:
        value = value["text"]
    if isinstance(value, list) and not _are_turns(value):
        return value[0] if value else ""
    return value


def _passage(value: object, what: str) -> str:
    """A context's text; several paragraphs are joined by blank lines."""
    if isinstance(value, list) and all(isinstance(paragraph, str) for paragraph in value):
        value = "\n\n".join(value)
    text = text_of(value, what)
    return text if text.strip() else ""


def _prompt_text(row: Mapping[str, Any], plan: _Plan) -> str:
    """JOB_PROMPT_TEMPLATE with the row's values; without the blanks around an empty one's place."""
    values = [_value_text(row[column], column) if column else "" for _, column in plan.filled]
    filled = list(zip(plan.filled, values, strict=True))
    whole = "".join(text + value for (text, _), value in filled)
    has_gap = any(column is not None and not value.strip() for (_, column), value in filled)
    return whole.strip() if has_gap else whole


def _value_text(value: object, what: str) -> str:
    """A column's value in a prompt: a text, a number, or a list of these, one a line."""
    if isinstance(value, list):
        return "\n".join(_value_text(item, what) for item in value)
    if isinstance(value, bool | int | float):
        return str(value)
    return text_of(value, what)


def _history(value: object, unused: set[str]) -> list[Message]:
    """Earlier turns: pairs of a question and an answer, or turns. They are learned as all others.

    Raises `UnusableRowError`.
    """
    value = parsed(value, "history") if not isinstance(value, str) or value.strip() else []
    value = [] if value is None else value
    if not isinstance(value, list):
        raise UnusableRowError("history is no list of pairs")
    turns: list[Message] = []
    for item in value:
        if isinstance(item, list) and len(item) == 2:
            question, answer = item
        elif isinstance(item, Mapping) and (found := _pair_of_struct(item)) is not None:
            question, answer = found
        elif isinstance(item, Mapping):
            turns += read_turns([item], "history", unused)
            continue
        else:
            raise UnusableRowError("history is no list of pairs")
        turns.append(Message("user", text_of(question, "history")))
        turns.append(Message("assistant", text_of(answer, "history")))
    return turns


def _pair_of_struct(struct: Mapping[str, Any]) -> tuple[object, object] | None:
    present = {_normal(name): value for name, value in struct.items() if not is_null(value)}
    pairs = (*_PAIRS, ("user", "assistant"), ("human", "assistant"))
    found = (pair for pair in pairs if pair[0] in present and pair[1] in present)
    pair = next(found, None)
    return None if pair is None else (present[pair[0]], present[pair[1]])


def _tools(value: object) -> tuple[dict[str, Any], ...]:
    """The tools' JSON schemas. Raises `UnusableRowError`."""
    if isinstance(value, str) and not value.strip():
        return ()
    value = parsed(value, "tools")
    if value is None:
        return ()
    tools = [parsed(tool, "tools") for tool in (value if isinstance(value, list) else [value])]
    if not all(isinstance(tool, Mapping) and tool for tool in tools):
        raise UnusableRowError("tools is no list of JSON schemas")
    return tuple(without_nulls(tool) for tool in tools)


def _check_length(messages: Iterable[Message], tools: tuple[dict[str, Any], ...]) -> None:
    length = sum(len(message.content) + len(message.reasoning) for message in messages)
    calls = [message.tool_calls for message in messages if message.tool_calls]
    if tools or calls:
        length += len(json.dumps([tools, calls], ensure_ascii=False))
    if length > TEXT_LIMIT:
        raise UnusableRowError("row over 1 MB")
