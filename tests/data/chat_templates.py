"""Chat templates in the documented forms of well-known families, each with a tiny tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from tests.tiny_tokenizer import CHATML, LLAMA3, tokenizer_with

LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}\
{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}\
{% for message in loop_messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}\
{% endif %}\
{% if loop.index0 == 0 and system_message != false %}\
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}\
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}\
{% endfor %}"""

# With tools: listed before the last question, calls and results in tokens of their own.
MISTRAL_V3 = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools and message == user_messages[-1] %}
            {{- "[AVAILABLE_TOOLS] " + (tools | map(attribute="function") | list | tojson)
                + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["tool_calls"] is defined and message["tool_calls"] %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in message["tool_calls"] %}
            {%- if call.id | length != 9 %}{{- raise_exception("ids have length 9") }}{%- endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
            {{- ", " if not loop.last else "]" + eos_token }}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {%- if message.tool_call_id | length != 9 %}
            {{- raise_exception("ids have length 9") }}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + message["content"] | tojson
            + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user, assistant and tool roles are supported!") }}
    {%- endif %}
{%- endfor %}"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}\
{% endif %}\
{% if message['role'] == 'assistant' %}{% set role = 'model' %}\
{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

# Its last branch ends the whole text; a generation prompt stands in that end's place.
PHI3 = """\
{% for message in messages %}\
{% if message['role'] == 'system' %}{{ '<|system|>\\n' + message['content'] + '<|end|>\\n' }}\
{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '<|end|>\\n' }}\
{% elif message['role'] == 'assistant' %}\
{{ '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

PHI4 = """\
{% for message in messages %}\
{% if message['role'] == 'system' %}\
{{ '<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>' }}\
{% elif message['role'] == 'user' %}\
{{ '<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>' }}\
{% elif message['role'] == 'assistant' %}\
{{ '<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

_QWEN3_TURNS = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" + tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=messages | length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == 'user' %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = messages | length - loop.index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content =
                content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning_content) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n')
                + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if not loop.first or content %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": '
                + call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
"""

QWEN3 = (
    _QWEN3_TURNS
    + """\
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
)

QWEN3_THINKING = (
    _QWEN3_TURNS
    + """\
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
{%- endif %}"""
)

DEEPSEEK_R1 = """\
{% set ns = namespace(system='') %}\
{%- for message in messages %}{%- if message['role'] == 'system' %}\
{%- set ns.system = message['content'] %}{%- endif %}{%- endfor %}\
{{ bos_token }}{{ ns.system }}\
{%- for message in messages %}\
{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{%- endif %}\
{%- if message['role'] == 'assistant' and message['content'] is not none %}\
{% set content = message['content'] %}\
{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}\
{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{%- endif %}\
{%- endfor -%}\
{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""  # noqa: RUF001

# Its roles are plain words to the tokenizer.
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

# Channels; another end for the last answer; earlier thoughts are left out.
GPT_OSS = """\
{{- '<|start|>system<|message|>You are a model.<|end|>' }}
{%- if tools %}
    {{- '<|start|>developer<|message|># Tools\\n' }}
    {%- for tool in tools %}
        {{- 'type ' + tool.function.name + ' = ' + tool.function.parameters | tojson + '\\n' }}
    {%- endfor %}
    {{- '<|end|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- '<|start|>developer<|message|># Instructions\\n\\n' + message.content + '<|end|>' }}
    {%- elif message.role == 'user' %}
        {{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|start|>functions.' + message.name + ' to=assistant<|channel|>commentary<|message|>'
            + message.content | tojson + '<|end|>' }}
    {%- elif message.tool_calls %}
        {%- if message.thinking %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking
                + '<|end|>' }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>'
            + call.arguments | tojson + '<|call|>' }}
    {%- elif loop.last and not add_generation_prompt %}
        {%- if message.thinking %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking
                + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}
    {%- else %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant' }}
{%- endif %}"""


class Family(NamedTuple):
    """A template and what its tokenizer is like."""

    template: str | None
    specials: tuple[str, ...]
    eos: str
    bos: str | None = None
    added: tuple[str, ...] = ()  # tokens that are not special
    swallows: tuple[str, ...] = ()  # tokens with `rstrip`, and with `lstrip` where `both` says so
    both: bool = False
    sentencepiece: bool = False
    trims: bool = False  # the template trims contents
    answer: str = "{}"  # how an answer without thoughts is written, with what ends it
    earlier: str | None = None  # how an earlier one is, if other
    learns_earlier: bool = True
    has_tools: bool = False

    def tokenizer(self) -> Any:
        """A tiny tokenizer of the family."""
        return tokenizer_with(
            self.template,
            self.specials,
            eos=self.eos,
            bos=self.bos,
            added=self.added,
            rstrip=self.swallows,
            lstrip=self.swallows if self.both else (),
            sentencepiece=self.sentencepiece,
        )


_IM = ("<|im_start|>", "<|im_end|>")
_QWEN = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_PHI3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_MISTRAL = (
    *(
        f"[{slash}{word}]"
        for word in ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS")
        for slash in ("", "/")
    ),
    "[TOOL_CALLS]",
)
_HARMONY = tuple(f"<|{word}|>" for word in ("start", "end", "message", "channel", "return", "call"))

FAMILIES: Mapping[str, Family] = {
    "chatml": Family(CHATML, _IM, "<|im_end|>", answer="{}<|im_end|>"),
    "llama 2": Family(LLAMA2, (), "</s>", "<s>", sentencepiece=True, trims=True, answer="{} </s>"),
    "llama 3": Family(
        LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        "<|begin_of_text|>",
        trims=True,
        answer="{}<|eot_id|>",
    ),
    "mistral v0.3": Family(
        MISTRAL_V3,
        _MISTRAL,
        "</s>",
        "<s>",
        sentencepiece=True,
        trims=True,
        answer="{}</s>",
        has_tools=True,
    ),
    "gemma": Family(
        GEMMA,
        ("<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        "<bos>",
        sentencepiece=True,
        trims=True,
        answer="{}<end_of_turn>",
    ),
    "phi-3": Family(
        PHI3,
        _PHI3,
        "<|endoftext|>",
        "<s>",
        swallows=_PHI3,
        sentencepiece=True,
        answer="{}<|end|>",
    ),
    "phi-4": Family(
        PHI4,
        (*_IM, "<|im_sep|>"),
        "<|im_end|>",
        swallows=(*_IM, "<|im_sep|>"),
        both=True,
        answer="{}<|im_end|>",
    ),
    "qwen3": Family(
        QWEN3,
        _IM,
        "<|im_end|>",
        added=_QWEN,
        answer="<think>\n\n</think>\n\n{}<|im_end|>",
        learns_earlier=False,
        has_tools=True,
    ),
    "qwen3 thinking": Family(
        QWEN3_THINKING,
        _IM,
        "<|im_end|>",
        added=_QWEN,
        answer="\n</think>\n\n{}<|im_end|>",
        learns_earlier=False,
        has_tools=True,
    ),
    "deepseek r1": Family(
        DEEPSEEK_R1,
        ("<｜User｜>", "<｜Assistant｜>"),  # noqa: RUF001
        "<｜end▁of▁sentence｜>",  # noqa: RUF001
        "<｜begin▁of▁sentence｜>",  # noqa: RUF001
        added=("<think>", "</think>"),
        answer="{}<｜end▁of▁sentence｜>",  # noqa: RUF001
    ),
    "zephyr": Family(ZEPHYR, (), "</s>", "<s>", sentencepiece=True, answer="{}</s>"),
    "gpt-oss": Family(
        GPT_OSS,
        _HARMONY,
        "<|return|>",
        answer="<|channel|>final<|message|>{}<|return|>",
        earlier="<|channel|>final<|message|>{}<|end|>",
        has_tools=True,
    ),
    "none": Family(None, (), "<|endoftext|>", trims=True, answer="{}<|endoftext|>"),
}


@cache
def family_tokenizer(name: str) -> Any:
    """The tokenizer of a family, made once."""
    return FAMILIES[name].tokenizer()
