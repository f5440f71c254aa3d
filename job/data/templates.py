"""Renders messages as one text, and finds the spans of it that the model learns to say.

Most chat templates carry no `{% generation %}` markers, so the spans are found by rendering: what
the template writes for the messages before an answer, with its generation prompt, is the prompt
at inference; what it adds for the answer is the answer with its end of turn. Both renderings must
be beginnings of the whole chat's rendering, and the span must contain the answer; a turn for
which that does not hold is context only, and a row without any other turn is unusable.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from job.data.chat import PLAIN_TEXT, Chat, Message
from job.data.formats import UnusableRowError
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

{% else %}### Response:
{{ message['content'] | trim }}{{ eos_token }}

{% endif %}{% endfor %}\
{% if add_generation_prompt %}### Response:
{% endif %}"""

# A template that writes today's date would make other rows tomorrow: a macro hides the clock. The
# date is the one that Llama 3.1's own template falls back to.
_FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro %}"

_SYSTEM = Message("system", "Zebras only.")
_QUESTION = Message("user", "Which animals?")
_ANSWERS = (Message("assistant", "Aye."), Message("assistant", "No!"))


class Rendered(NamedTuple):
    """A row as one text; the characters `start:end` of each span are targets."""

    text: str
    spans: tuple[tuple[int, int], ...]  # in order, not overlapping, not empty
    num_context_answers: int  # answers that are not targets because no span is certain


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template with what a trial rendering has shown about it."""

    source: str
    tokenizer: PreTrainedTokenizerBase
    bos: str = ""  # opens a plain text
    end_tokens: tuple[str, ...] = ()  # after one of these generation stops
    has_generation_prompt: bool = False
    header: str = ""  # what opens an answer, where the template has no usable generation prompt
    folds_system: bool = False  # the template knows no system role: its text opens the first turn

    def render(self, row: Chat) -> Rendered:
        """The text and its targets. Raises `UnusableRowError`."""
        messages = row.messages
        if messages[0].role == PLAIN_TEXT:
            return self._plain(messages[0].content)
        if self.folds_system:
            messages = _folded(messages)
        try:
            return self._chat(messages)
        except UnusableRowError:
            raise
        except Exception as error:  # a template is a program of the user's: it may raise anything
            raise UnusableRowError("the chat template refuses it") from error

    def _plain(self, text: str) -> Rendered:
        eos = self.tokenizer.eos_token or ""
        start = "" if text.startswith(self.bos) else self.bos
        end = "" if eos and text.endswith(eos) else eos
        whole = f"{start}{text}{end}"
        return Rendered(whole, ((len(start), len(whole)),), 0)

    def _chat(self, messages: tuple[Message, ...]) -> Rendered:
        text = self.write(messages)
        answers = [k for k, message in enumerate(messages) if message.role == "assistant"]
        spans = []
        for k in answers:
            before = self.write(messages[:k], opened=self.has_generation_prompt) + self.header
            after = text if k + 1 == len(messages) else self.write(messages[: k + 1])
            if not (text.startswith(before) and text.startswith(after)):
                continue  # the template rewrites earlier turns (Qwen3 drops their reasoning)
            span = text[len(before) : len(after)]
            if _squeezed(messages[k].content) in _squeezed(span):
                spans.append((len(before), len(before) + self._answer_length(span)))
        if not spans:
            raise UnusableRowError("the chat template does not show where an answer stands")
        return Rendered(text, tuple(spans), len(answers) - len(spans))

    def _answer_length(self, span: str) -> int:
        """The length without line ends after an end-of-turn token, where generation has stopped."""
        spoken = span.rstrip()
        return len(spoken) if spoken.endswith(self.end_tokens) else len(span)

    def write(self, messages: tuple[Message, ...], *, opened: bool = False) -> str:
        """The rendering of `messages`, with the generation prompt if `opened`."""
        chat = [{"role": m.role, "content": m.content} for m in messages]
        text = self.tokenizer.apply_chat_template(
            chat, chat_template=self.source, add_generation_prompt=opened, tokenize=False
        )
        assert isinstance(text, str)
        return text


def load_template(chat_template: str | None, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """JOB_CHAT_TEMPLATE (Jinja or a file of it), else the tokenizer's, else `DEFAULT_TEMPLATE`.

    Raises `SettingsError` for a template that cannot render a question and an answer, or whose
    rendering does not begin as that of the question alone.
    """
    if chat_template is not None:
        source, owner = _template_text(chat_template), "JOB_CHAT_TEMPLATE"
    elif tokenizer.chat_template is not None:
        source, owner = _own_template(tokenizer), "JOB_BASE_MODEL: the tokenizer's chat template"
    else:
        source, owner = DEFAULT_TEMPLATE, "the default template"
    if "strftime_now" in source:
        source = _FIXED_DATE + source
    end_tokens = (*tokenizer.get_added_vocab(), *filter(None, [tokenizer.eos_token]))
    template = ChatTemplate(source, tokenizer, bos=_bos(tokenizer), end_tokens=end_tokens)
    try:
        has_generation_prompt, header = _opening(template)
    except Exception as error:  # Jinja's own errors, and whatever a template's expressions raise
        raise SettingsError(
            f"{owner} cannot render a question and an answer ({error}): "
            "give another one with JOB_CHAT_TEMPLATE"
        ) from error
    template = replace(template, has_generation_prompt=has_generation_prompt, header=header)
    if not _ends_turns(template):
        log.warning(
            "data: %s writes no end-of-turn token after an answer, so the model does not learn to "
            "stop: give another one with JOB_CHAT_TEMPLATE",
            owner,
        )
    return replace(template, folds_system=not _keeps_system(template))


def _template_text(chat_template: str) -> str:
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


def _opening(template: ChatTemplate) -> tuple[bool, str]:
    """Whether the generation prompt opens an answer; if not, the words that do."""
    asked = template.write((_QUESTION,))
    opened = template.write((_QUESTION,), opened=True)
    first, second = (template.write((_QUESTION, answer)) for answer in _ANSWERS)
    if opened != asked and first.startswith(opened):
        return True, ""
    if not (first.startswith(asked) and second.startswith(asked)):
        raise ValueError("a chat does not begin as its first message does")
    # A generation prompt may also promise more than an answer holds (DeepSeek-R1's "<think>").
    pairs = enumerate(zip(first, second, strict=False))
    shared = next((first[:index] for index, (one, other) in pairs if one != other), None)
    if shared is None:
        raise ValueError("it does not write the answer")
    # The space before a word belongs to the word's token.
    return False, shared[len(asked) :].rstrip(" ")


def _ends_turns(template: ChatTemplate) -> bool:
    """Whether what the model learns to say ends with a token that stops its generation."""
    try:
        text, spans, _ = template.render(Chat((_QUESTION, _ANSWERS[0])))
    except UnusableRowError:
        return True  # another fault, which every row will tell
    start, end = spans[-1]
    return text[start:end].rstrip().endswith(template.end_tokens)


def _keeps_system(template: ChatTemplate) -> bool:
    """Whether a system turn stays: Gemma's template raises on one, Mistral's drops it later."""
    try:
        rendered = template.render(Chat((_SYSTEM, _QUESTION, _ANSWERS[0])))
    except UnusableRowError:
        return False
    return _SYSTEM.content in rendered.text


def _folded(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages with the system turn's text at the head of the first question."""
    if messages[0].role != "system":
        return messages
    first = Message("user", f"{messages[0].content}\n\n{messages[1].content}")
    return (first, *messages[2:])


def _bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that opens every text, if the tokenizer has one and puts it there by itself."""
    ids = tokenizer("a")["input_ids"]
    opens = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if opens else ""


def _squeezed(text: str) -> str:
    """The text without white space, which templates trim and rejoin."""
    return "".join(text.split())
