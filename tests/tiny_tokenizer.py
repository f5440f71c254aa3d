"""Tiny real tokenizers, trained on the spot, with chat templates in the styles of real models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

TEXTS = (
    "How many clips did Natalia sell altogether in April and May?",
    "She sold 48 clips in April and 24 in May, which makes 72 altogether.",
    "What is the capital of France? Paris is the capital of France.",
    "### Instruction:\nsystem user assistant\n\n### Response:\n",
)

# Mistral 7B v0.3: no generation prompt, the answer opens with a space, and a system text is written
# into the last message if that is the user's, that is, never once an answer follows.
MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system_message is defined %}
            {{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content']|trim + eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}"""

CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] \
+ '<|im_end|>' + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""


def sentencepiece_tokenizer(chat_template: str | None = MISTRAL) -> Any:
    """Like Llama 2 and Mistral: spaces are part of words, a space before the first one, a BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    tokens = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokens.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokens.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    _train(tokens, trainers, [*specials, *bytes_], [])
    tokens.post_processor = _opens_with("<s>", 1)
    return _wrapped(tokens, chat_template, bos="<s>", eos="</s>", extra=["[INST]", "[/INST]"])


def byte_level_tokenizer(chat_template: str | None = CHATML, *, bos: bool = False) -> Any:
    """Like Qwen (without BOS) and Llama 3 (with `bos`): bytes, words split before their spaces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    turns = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokens, trainers, ["<|begin|>", "<|end|>", *turns], alphabet)
    if bos:
        tokens.post_processor = _opens_with("<|begin|>", 0)
    eos = "<|im_end|>" if chat_template == CHATML else "<|end|>"
    opening = "<|begin|>" if bos else None
    return _wrapped(tokens, chat_template, bos=opening, eos=eos, extra=turns)


def tokenizer_with(
    chat_template: str | None,
    specials: Sequence[str],
    *,
    eos: str,
    bos: str | None = None,
    added: Sequence[str] = (),
    rstrip: Sequence[str] = (),
    lstrip: Sequence[str] = (),
    sentencepiece: bool = False,
) -> Any:
    """A tokenizer with these control tokens, byte-level or SentencePiece-like.

    `added` are tokens that are not special; those in `rstrip` and `lstrip` swallow the white space
    after and before them.
    """
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    source = (sentencepiece_tokenizer if sentencepiece else byte_level_tokenizer)(None)
    state = json.loads(source.backend_tokenizer.to_str())
    state["added_tokens"], state["post_processor"] = [], None
    tokens = Tokenizer.from_str(json.dumps(state))
    names = dict.fromkeys([*filter(None, [bos, eos]), *specials, *added])
    tokens.add_tokens(
        [
            AddedToken(
                name,
                special=name not in added,
                normalized=False,
                rstrip=name in rstrip,
                lstrip=name in lstrip,
            )
            for name in names
        ]
    )
    if bos is not None:
        tokens.post_processor = _opens_with(bos, tokens.token_to_id(bos))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = chat_template
    return tokenizer


def bare_tokenizer() -> Any:
    """A vocabulary without BOS, EOS, padding or chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    _train(tokens, trainers, [], pre_tokenizers.ByteLevel.alphabet())
    return PreTrainedTokenizerFast(tokenizer_object=tokens)


def _opens_with(bos: str, number: int) -> Any:
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, number)]
    )


def _train(tokens: Any, trainers: Any, specials: list[str], alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=specials,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokens.train_from_iterator(TEXTS * 4, trainer)


def _wrapped(
    tokens: Any, chat_template: str | None, *, bos: str | None, eos: str, extra: list[str]
) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens=extra,
    )
    tokenizer.chat_template = chat_template
    return tokenizer
