"""What a chat template writes around turns, as a few trial renderings show it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from job.data.chat import Message

SYSTEM = Message("system", "Zebras only.")
QUESTION = Message("user", "Which animals?")
ANSWER = Message("assistant", "Aye.")
_OTHER_ANSWER = Message("assistant", "No!")
_NEXT_QUESTION = Message("user", "And which plants?")

_TOOL_NAME, _RESULT = "count_stripes", "26 stripes"
_CALL = {
    "id": "call00001",  # Mistral's template demands nine letters or digits
    "type": "function",
    "function": {"name": _TOOL_NAME, "arguments": {"animal": "zebra"}},
}
_TOOL = {
    "type": "function",
    "function": {
        "name": _TOOL_NAME,
        "description": "Counts them.",
        "parameters": {
            "type": "object",
            "properties": {"animal": {"type": "string", "description": "Its name."}},
            "required": ["animal"],
        },
    },
}


class Write(Protocol):
    """Renders messages with a chat template; raises whatever the template raises."""

    def __call__(
        self,
        messages: tuple[Message, ...],
        *,
        tools: tuple[dict[str, Any], ...] = (),
        opened: bool = False,
    ) -> str: ...


class TurnMarks(NamedTuple):
    """The words and tokens that a template writes around a question and an answer."""

    has_generation_prompt: bool = False
    header: str = ""  # opens an answer, where the template has no usable generation prompt
    promise: str = ""  # the generation prompt's end that an answer may lack: "<think>\n"
    opening: str = ""  # from a question's last word to where generation starts
    lead: str = ""  # from there to an answer's first word: white space, an empty thought, a channel
    end: str = ""  # ends an answer, with the white space before it
    end_token: str = ""  # the last token of `end`, "" if there is none
    tail: str = ""  # what follows `end` where the chat ends, which nobody has to say
    earlier_end: str = ""  # ends the other answers, where that is not `end`
    first_turns: tuple[str, ...] = ()  # what a rendered chat may begin with, after its BOS
    bos: str = ""  # opens a rendered chat

    def mapped(self, change: Callable[[str], str]) -> TurnMarks:
        """The marks with every text changed."""
        changed: dict[str, Any] = {
            name: change(text) for name, text in self._asdict().items() if isinstance(text, str)
        }
        return self._replace(first_turns=tuple(map(change, self.first_turns)), **changed)


@dataclass(frozen=True)
class ToolSupport:
    """What of tools a template writes."""

    tools: bool = True  # the list of those that may be called
    calls: bool = True
    turns: bool = True  # what the tools gave back

    @classmethod
    def of(cls, write: Write) -> ToolSupport:
        """Try each in a chat; a template that raises on one does not write it."""
        call = Message("assistant", "", tool_calls=(_CALL,))
        result = Message("tool", _RESULT, name=_TOOL_NAME)
        called, whole = (QUESTION, call), (QUESTION, call, result, ANSWER)
        return cls(
            tools=_shows(write, (QUESTION, ANSWER), _TOOL_NAME, tools=(_TOOL,)),
            calls=_shows(write, called, _TOOL_NAME) or _shows(write, whole, "zebra"),
            turns=_shows(write, whole, _RESULT),
        )


def _shows(
    write: Write,
    messages: tuple[Message, ...],
    words: str,
    *,
    tools: tuple[dict[str, Any], ...] = (),
) -> bool:
    try:
        return words in write(messages, tools=tools)
    except Exception:  # a template is a program of the user's: it may raise anything
        return False


def turn_marks(write: Write, tokens: tuple[str, ...], bos: str) -> TurnMarks:
    """Find the marks; `tokens` are the tokenizer's added ones, `bos` its BOS or "".

    Raises `ValueError`, or what the template raises, for one that cannot render a question and an
    answer, or whose rendering does not begin as that of the question alone.
    """
    asked = write((QUESTION,))
    opened = write((QUESTION,), opened=True)
    answered = write((QUESTION, ANSWER))
    marks = _opening(asked, opened, answered, write((QUESTION, _OTHER_ANSWER)))
    before = (opened if marks.has_generation_prompt else asked) + marks.header
    start = len(before.removesuffix(marks.promise) if marks.promise else before)
    place = answered.find(ANSWER.content, start)
    if place < 0:
        return marks  # it changes the answers' words: every row will be refused
    template_bos = bos if bos and asked.startswith(bos) else ""
    split = _splitter(tokens)
    closing, between = answered[place + len(ANSWER.content) :], _between_turns(write)
    end, earlier_end = _ends(closing, between, asked, split)
    found = [piece for piece in split.split(end) if split.fullmatch(piece)]
    return marks._replace(
        opening=before[before.find(QUESTION.content) + len(QUESTION.content) :],
        lead=answered[start:place],
        end=end,
        end_token=found[-1] if found else "",
        tail=closing[len(end) :],
        earlier_end=earlier_end,
        first_turns=_first_turns(write, between, (end, earlier_end), template_bos, split),
        bos=template_bos,
    )


def _opening(asked: str, opened: str, first: str, second: str) -> TurnMarks:
    """Whether the generation prompt opens an answer; if not, the words that do."""
    if opened != asked and first.startswith(opened):
        return TurnMarks(has_generation_prompt=True)
    shared = _common(first, second)
    if len(shared) in (len(first), len(second)):
        raise ValueError("it does not write the answer")
    # A generation prompt may promise more than an answer holds (DeepSeek-R1's "<think>").
    kept = _common(opened, first)
    if opened != asked and kept == shared.rstrip(" ") and opened[: len(kept)] != asked:
        return TurnMarks(has_generation_prompt=True, promise=opened[len(kept) :])
    if not (first.startswith(asked) and second.startswith(asked)):
        raise ValueError("a chat does not begin as its first message does")
    # The space before a word belongs to the word's token.
    return TurnMarks(header=shared[len(asked) :].rstrip(" "))


def _common(one: str, other: str) -> str:
    pairs = enumerate(zip(one, other, strict=False))
    length = next((k for k, (a, b) in pairs if a != b), min(len(one), len(other)))
    return one[:length]


def _splitter(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Splits a text at its tokens, which are kept."""
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, ordered))})" if ordered else r"((?!))")


def _between_turns(write: Write) -> str:
    """What stands between an answer and the next question; "" if that cannot be seen."""
    try:
        text = write((QUESTION, ANSWER, _NEXT_QUESTION, _OTHER_ANSWER))
    except Exception:  # every row of several turns will tell
        return ""
    _, answer, rest = text.partition(ANSWER.content)
    between, question, _ = rest.partition(_NEXT_QUESTION.content)
    return between if answer and question else ""


def _ends(closing: str, between: str, asked: str, split: re.Pattern[str]) -> tuple[str, str]:
    """What ends a chat's last answer, and what ends the others.

    The last one's closing may go on with what ends the whole text ("<|end|>\\n<|endoftext|>" in
    Phi-3's); then what it shares with the others' is the end. Where they share no token, the last
    answer's last token ends it. The others then end with the white space that follows them, and
    with the next token if that ends a question as well: it does not open the next turn.
    """
    pieces, others = split.split(closing), split.split(between)
    end, seen = "", ""
    for piece, other in zip(pieces, others if between else pieces, strict=False):
        if piece != other:
            break
        seen += piece
        if split.fullmatch(piece):
            end = seen
    if end:
        return end, end
    blank = between[: len(between) - len(between.lstrip())]
    found = split.match(between, len(blank))
    if found and asked.rstrip().endswith(found[0]):
        blank += found[0]
    found_last = [match.end() for match in split.finditer(closing)]
    return (closing[: found_last[-1]] if found_last else closing), blank


def _first_turns(
    write: Write, between: str, ends: tuple[str, str], bos: str, split: re.Pattern[str]
) -> tuple[str, ...]:
    """What opens a user's or the system's turn, and the token that such a turn begins with."""
    for end in ends:
        if end.strip() and between.startswith(end):
            between = between.removeprefix(end)
            break
    user = between.strip()
    try:
        system, found, _ = write((SYSTEM, QUESTION, ANSWER)).partition(SYSTEM.content)
    except Exception:  # it knows no system turns
        found, system = "", ""
    openings = [text.removeprefix(bos).strip() for text in (user, system if found else "")]
    tokens = [token[0] for text in openings if (token := split.match(text))]
    return tuple(dict.fromkeys(text for text in (*openings, *tokens) if text))
