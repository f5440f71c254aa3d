"""Renders messages as one text, and finds the spans of it that the model learns to say.

Most chat templates carry no `{% generation %}` markers, so the spans are found by rendering: what
the template writes for the messages before an answer, with its generation prompt, is the prompt
at inference; what it adds for the answer is the answer with its end of turn. Both renderings must
be beginnings of the whole chat's rendering, and the span must contain the answer; a turn for
which that does not hold is context only, and a row without any other turn is unusable.

An answer ends with the token that the template ends it with. Where a template ends only the last
one with a token, an earlier one ends as the template ends it: with its last word and the white
space after it. A generation prompt that opens a thought ("<think>") is not learned: the model
starts to speak after it.

Control tokens that a row spells are text (`job/data/control_tokens.py`), with two exceptions: a
plain text, and a prompt that is rendered already, hold the control tokens that they spell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from job.data.chat import PLAIN_TEXT, Chat, Message
from job.data.control_tokens import THOUGHT_MARKS, ControlTokens
from job.data.formats import UnusableRowError
from job.data.prerendered import PairReader
from job.data.turn_marks import ANSWER, QUESTION, SYSTEM, ToolSupport, TurnMarks, turn_marks
from job.errors import SettingsError
from job.log import log

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For base models, which have no template: plain words, because such a model has no turn tokens.
DEFAULT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'system' %}{{ message['content'] | trim }}

{% elif message['role'] == 'user' %}### Instruction:
{{ message['content'] | trim }}

{% elif message['role'] == 'assistant' %}### Response:
{{ message['content'] | trim }}{{ eos_token }}

{% endif %}{% endfor %}\
{% if add_generation_prompt %}### Response:
{% endif %}"""

# A template that writes today's date would make other rows tomorrow: a macro hides the clock. The
# date is the one that Llama 3.1's own template falls back to.
_FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro %}"


class Rendered(NamedTuple):
    """A row as one text; the characters `start:end` of each span are targets."""

    text: str
    spans: tuple[tuple[int, int], ...]  # in order, not overlapping, not empty
    num_context_answers: int = 0  # answers that are not targets because no span is certain
    num_dropped_thoughts: int = 0  # answers learned without the reasoning that belongs to them
    is_prerendered: bool = False  # the prompt held the template's tokens already
    end_token: str = ""  # where a span's text ends with it, the token is its last target
    control: ControlTokens | None = None  # the text's control tokens stand under private names


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template with what trial renderings have shown about it."""

    source: str
    tokenizer: PreTrainedTokenizerBase
    bos: str = ""  # opens a plain text
    end_tokens: tuple[str, ...] = ()  # after one of these generation stops
    marks: TurnMarks = field(default_factory=TurnMarks)
    tool_support: ToolSupport = field(default_factory=ToolSupport)
    folds_system: bool = False  # the template knows no system role: its text opens the first turn

    def render(self, row: Chat) -> Rendered:
        """The text and its targets. Raises `UnusableRowError`."""
        messages = row.messages
        if messages[0].role == PLAIN_TEXT:
            return self._plain(messages[0].content)
        if row.is_pair and (found := self._prerendered(row)):
            return found
        self._check_tools(row)
        if self.folds_system:
            messages = _folded(messages)
        control = self.control if self._spells_control(row) else None
        try:
            marks = self.marks if control is None else self.renamed_marks
            ends = self.end_tokens if control is None else self.renamed_end_tokens
            return _Rendering(self, messages, row.tools, control, marks, ends).result()
        except UnusableRowError:
            raise
        except Exception as error:  # a template is a program of the user's: it may raise anything
            raise UnusableRowError("the chat template refuses it") from error

    @cached_property
    def control(self) -> ControlTokens:
        """The special tokens, and the added ones that the template writes around turns."""
        tried = self.write((QUESTION, ANSWER)) + self.write((QUESTION,), opened=True)
        # Words, line ends and runs of spaces may be added tokens too, and are read as ever.
        marks = (token for token in self.end_tokens if token[0] in "<[" and token[-1] in ">]")
        turn_tokens = {token for token in marks if token in tried}
        return ControlTokens(self.tokenizer, turn_tokens - set(THOUGHT_MARKS))

    @cached_property
    def renamed_marks(self) -> TurnMarks:
        """The marks with private names for control tokens."""
        return self.marks.mapped(self.control.exchanged)

    @cached_property
    def renamed_end_tokens(self) -> tuple[str, ...]:
        """The end tokens, under private names where they are control tokens."""
        return tuple(map(self.control.exchanged, self.end_tokens))

    def write(
        self,
        messages: tuple[Message, ...],
        *,
        tools: tuple[dict[str, Any], ...] = (),
        opened: bool = False,
        control: ControlTokens | None = None,
    ) -> str:
        """The rendering of `messages`, with the generation prompt if `opened`.

        With `control`, control tokens that the messages spell stand in it as they are spelled,
        and those that the template writes under private names.
        """
        chat = _template_messages(messages)
        if control is not None:
            chat = [
                control.hidden(turn, keep=THOUGHT_MARKS if turn["role"] == "assistant" else ())
                for turn in chat
            ]
            tools = tuple(control.hidden(tools))
        text = self.tokenizer.apply_chat_template(
            chat,
            tools=list(tools) or None,
            chat_template=self.source,
            add_generation_prompt=opened,
            tokenize=False,
        )
        assert isinstance(text, str)
        return text if control is None else control.exchanged(text)

    def _plain(self, text: str) -> Rendered:
        """A text without turns; one that ends with an end token, and white space, gets no other."""
        eos = self.tokenizer.eos_token or ""
        start = "" if text.startswith(self.bos) else self.bos
        spoken = text.rstrip()
        ends = next((e for e in (eos, self.marks.end_token) if e and spoken.endswith(e)), "")
        whole = f"{start}{spoken if ends else text + eos}"
        return Rendered(whole, ((len(start), len(whole)),), end_token=ends or eos)

    def _spells_control(self, row: Chat) -> bool:
        control = self.control
        for turn in row.messages:
            texts = (turn.content, turn.reasoning, turn.name)
            if any(text and control.in_text(text) for text in texts):
                return True
            if turn.tool_calls and control.in_value(turn.tool_calls):
                return True
        return bool(row.tools) and control.in_value(row.tools)

    def _check_tools(self, row: Chat) -> None:
        """Refuse a row with a part of a tool's use that the template drops: half teaches wrong."""
        has = self.tool_support
        if row.tools and not has.tools:
            raise UnusableRowError("the chat template does not render tools")
        if not has.calls and any(turn.tool_calls for turn in row.messages):
            raise UnusableRowError("the chat template does not render tool calls")
        if not has.turns and any(turn.role == "tool" for turn in row.messages):
            raise UnusableRowError("the chat template does not render tool turns")

    @cached_property
    def _pairs(self) -> PairReader:
        return PairReader(self.marks, self.end_tokens, self.control.names)

    def _prerendered(self, row: Chat) -> Rendered | None:
        """A pair whose prompt is rendered already, with one BOS and one end of the answer."""
        *others, prompt, answer_turn = row.messages
        pair = self._pairs.read(prompt.content, answer_turn.content)
        if pair is None:
            return None
        if others or row.tools:
            raise UnusableRowError("turns or tools beside a prompt that is rendered already")
        head, lead, answer = self.marks.bos + pair.prompt, pair.lead, pair.answer
        control, marks = None, self.marks
        if not pair.is_rendered and self.control.in_text(answer):
            control, marks = self.control, self.renamed_marks
            head, lead = control.exchanged(head), control.exchanged(lead)
            answer = control.read(answer, keep=THOUGHT_MARKS)
        text = f"{head}{lead}{answer}{marks.end}"
        return Rendered(
            text,
            ((len(head), len(text)),),
            is_prerendered=True,
            end_token=marks.end_token,
            control=control,
        )


@dataclass(frozen=True)
class _Rendering:
    """One row going through a template."""

    template: ChatTemplate
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    control: ControlTokens | None
    marks: TurnMarks
    end_tokens: tuple[str, ...]

    def result(self) -> Rendered:
        """The text and its targets. Raises `UnusableRowError`, and what the template raises."""
        text = self._write(len(self.messages))
        wanted = [
            k for k, turn in enumerate(self.messages)
            if turn.role == "assistant" and not turn.is_context
        ]  # fmt: skip
        if not wanted:
            raise UnusableRowError("no answer to learn")
        spans = []
        num_dropped_thoughts = 0
        for k in wanted:
            start = self._start(text, k)
            end = None if start is None else self._end(text, k, start)
            if start is None or end is None:
                continue  # the template rewrites earlier turns (Qwen3 drops their reasoning)
            # A generation prompt may have said how an answer begins: "<think>".
            spoken = _squeezed(self.marks.opening + text[start:end])
            thought, *answer = self._parts(self.messages[k])
            if all(part in spoken for part in answer):
                spans.append((start, end))
                num_dropped_thoughts += thought not in spoken
        if not spans:
            raise UnusableRowError("the chat template does not show where an answer stands")
        self._check_end(text, spans[-1], is_last=wanted[-1] + 1 == len(self.messages))
        return Rendered(
            text,
            tuple(spans),
            num_context_answers=len(wanted) - len(spans),
            num_dropped_thoughts=num_dropped_thoughts,
            end_token=self.marks.end_token,
            control=self.control,
        )

    def _write(self, num_messages: int, *, opened: bool = False) -> str:
        return self.template.write(
            self.messages[:num_messages], tools=self.tools, opened=opened, control=self.control
        )

    def _start(self, text: str, k: int) -> int | None:
        """Where message k begins to be the model's to say."""
        marks = self.marks
        before = self._write(k, opened=marks.has_generation_prompt) + marks.header
        if not text.startswith(before) and marks.promise:
            before = before.removesuffix(marks.promise)
        return len(before) if text.startswith(before) else None

    def _end(self, text: str, k: int, start: int) -> int | None:
        """Where message k ends, with what ends its turn and without what ends the chat."""
        marks = self.marks
        is_last = k + 1 == len(self.messages)
        after = (text if is_last else self._write(k + 1)).removesuffix(marks.tail)
        if not text.startswith(after):
            # Only the last answer of a chat ends so.
            after = after.removesuffix(marks.end) + marks.earlier_end
        if not text.startswith(after) and self.messages[k].tool_calls and marks.end_token:
            # Qwen3's opens a thought in an answer that ends the chat; a call never does.
            after = text[: text.find(marks.end_token, start)] + marks.end_token
        if not text.startswith(after):
            return None
        spoken = after.rstrip()
        return len(spoken) if self._is_ended(spoken) else len(after)

    def _is_ended(self, spoken: str) -> bool:
        """Whether the text ends with a token, in nearly all rows the one that ends a turn."""
        end = self.marks.end_token
        return bool(end and spoken.endswith(end)) or spoken.endswith(self.end_tokens)

    def _parts(self, message: Message) -> Iterator[str]:
        """The reasoning, the answer and the names of the calls, as the rendering holds them."""
        thought, mark, answer = message.content.rpartition("</think>")
        calls = map(_called, message.tool_calls)
        for part in (thought + mark + message.reasoning, answer, *calls):
            read = self.control.read(part, keep=THOUGHT_MARKS) if self.control else part
            yield _squeezed(read)

    def _check_end(self, text: str, span: tuple[int, int], *, is_last: bool) -> None:
        spoken = text[span[0] : span[1]]
        if is_last and self.marks.end_token and not self._is_ended(spoken):
            raise UnusableRowError("the chat template does not end the answer with a token")


def load_template(chat_template: str | None, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """JOB_CHAT_TEMPLATE (Jinja or a file of it), else the tokenizer's, else `DEFAULT_TEMPLATE`.

    Raises `SettingsError` for a template that cannot render a question and an answer, or whose
    rendering does not begin as that of the question alone.
    """
    if chat_template is not None:
        source, owner = template_text(chat_template), "JOB_CHAT_TEMPLATE"
    elif tokenizer.chat_template is not None:
        source, owner = _own_template(tokenizer), "JOB_BASE_MODEL: the tokenizer's chat template"
    else:
        source, owner = DEFAULT_TEMPLATE, "the default template"
    if "strftime_now" in source:
        source = _FIXED_DATE + source
    added = (*tokenizer.get_added_vocab(), tokenizer.eos_token or "")
    end_tokens = tuple(token for token in added if token.strip())  # Gemma adds line ends
    template = ChatTemplate(source, tokenizer, bos=_bos(tokenizer), end_tokens=end_tokens)
    try:
        marks = turn_marks(template.write, end_tokens, tokenizer.bos_token or "")
    except Exception as error:  # Jinja's own errors, and whatever a template's expressions raise
        raise SettingsError(
            f"{owner} cannot render a question and an answer ({error}): "
            "give another one with JOB_CHAT_TEMPLATE"
        ) from error
    template = replace(template, marks=marks, tool_support=ToolSupport.of(template.write))
    if not _ends_turns(template):
        log.warning(
            "data: %s writes no end-of-turn token after an answer, so the model does not learn to "
            "stop: give another one with JOB_CHAT_TEMPLATE",
            owner,
        )
    return replace(template, folds_system=not _keeps_system(template))


def template_text(chat_template: str) -> str:
    """JOB_CHAT_TEMPLATE itself, or what its file holds. Raises `SettingsError`."""
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"JOB_CHAT_TEMPLATE {chat_template[:200]!r} is neither a Jinja template nor a readable "
            "file of one"
        ) from error


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        source = tokenizer.get_chat_template()
    except ValueError as error:  # several named templates, none of them "default"
        raise SettingsError(
            "JOB_BASE_MODEL: the tokenizer has several chat templates and no default: "
            "choose one with JOB_CHAT_TEMPLATE"
        ) from error
    assert isinstance(source, str)
    return source


def _ends_turns(template: ChatTemplate) -> bool:
    """Whether what the model learns to say ends with a token that stops its generation."""
    try:
        rendered = template.render(Chat((QUESTION, ANSWER)))
    except UnusableRowError:
        return True  # another fault, which every row will tell
    start, end = rendered.spans[-1]
    return rendered.text[start:end].rstrip().endswith(template.end_tokens)


def _keeps_system(template: ChatTemplate) -> bool:
    """Whether a system turn stays: Gemma's template raises on one, Mistral's drops it later."""
    try:
        rendered = template.render(Chat((SYSTEM, QUESTION, ANSWER)))
    except UnusableRowError:
        return False
    return SYSTEM.content in rendered.text


def _folded(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages with each system turn's text at the head of the next question."""
    folded: list[Message] = []
    system = ""
    for message in messages:
        if message.role == "system":
            system += f"{message.content}\n\n"
        elif message.role == "user":
            folded.append(message._replace(content=system + message.content))
            system = ""
        else:
            folded.append(message)
    return tuple(folded)


def _template_messages(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    """The messages as templates read them: with those keys only that say something."""
    turns = []
    open_calls: list[dict[str, Any]] = []  # those that no tool has answered yet
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning:  # the two names that templates know it by
            turn |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
        if message.tool_calls:
            turn["tool_calls"] = list(message.tool_calls)
            open_calls = list(message.tool_calls)
        if message.name:
            turn["name"] = message.name
        if message.role == "tool" and open_calls:
            named = [k for k, call in enumerate(open_calls) if _called(call) == message.name]
            call = open_calls.pop(named[0] if named else 0)
            turn |= {"tool_call_id": call["id"]} if "id" in call else {}
        turns.append(turn)
    return turns


def _called(call: dict[str, Any]) -> str:
    """The name of the function that is called."""
    return str(call.get("function", {}).get("name", ""))


def _bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that opens every text, if the tokenizer has one and puts it there by itself."""
    ids = tokenizer("a")["input_ids"]
    opens = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if opens else ""


def _squeezed(text: str) -> str:
    """The text without white space, which templates trim and rejoin."""
    return "".join(text.split())
