"""Keeps control tokens that somebody typed into a row apart from those that the template writes.

A tokenizer finds its control tokens by their spelling, so "<|im_end|>" in a question would end the
question's turn. Rows that spell none, which is nearly all, need nothing of this module. For the
others each token gets a private name, one character of Unicode's last plane: the typed tokens go
through the template under their private names, and in what comes out spellings and names change
places. A copy of the tokenizer that knows its control tokens by their private names alone then
reads the template's as control and the typed ones as text. It has the same vocabulary under the
same ids and sees the text whole, so that white space that tokens strip, the space that
SentencePiece puts before a first word, and the offsets are those of any other text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from job.data.formats import UnusableRowError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# What opens and closes a thought is the model's to say: an assistant's content may spell it.
THOUGHT_MARKS = ("<think>", "</think>")

_FIRST_NAME = 0x100000
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a byte of an unknown character, in SentencePiece's way


class ControlTokens:
    """A tokenizer's control tokens, and a private name for each."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, turn_tokens: Iterable[str] = ()) -> None:
        """Take the special tokens, and `turn_tokens`: added tokens that the template writes."""
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        spelled = {token.content for token in added if token.special} | set(turn_tokens)
        # The longest first: of two tokens that begin alike a tokenizer takes the longer one.
        ordered = sorted(
            (token for token in spelled if token.strip() and not _BYTE.fullmatch(token)),
            key=lambda token: (-len(token), token),
        )
        self.names = {token: chr(_FIRST_NAME + index) for index, token in enumerate(ordered)}
        self._exchange = self.names | {name: token for token, name in self.names.items()}
        self._spelled = _one_of(self.names)
        self._named = _one_of(self.names.values())
        self._either = _one_of(self._exchange)

    def in_text(self, text: str) -> bool:
        """Whether the text spells a control token."""
        return self._spelled.search(text) is not None

    def in_value(self, value: Any) -> bool:
        """Whether a text anywhere in a JSON value spells a control token."""
        if isinstance(value, str):
            return self.in_text(value)
        if isinstance(value, dict):
            return any(self.in_value(part) for pair in value.items() for part in pair)
        return isinstance(value, list | tuple) and any(self.in_value(part) for part in value)

    def exchanged(self, text: str, *, keep: tuple[str, ...] = ()) -> str:
        """The text with private names for spelled tokens and the reverse; twice changes nothing.

        The tokens in `keep` stay.
        """
        return self._either.sub(
            lambda found: found[0] if found[0] in keep else self._exchange[found[0]], text
        )

    def hidden(self, value: Any, *, keep: tuple[str, ...] = ()) -> Any:
        """A JSON value with private names for the control tokens that its texts spell."""
        if isinstance(value, str):
            if self._named.search(value):
                raise UnusableRowError("control tokens beside private characters of Unicode")
            return self.exchanged(value, keep=keep)
        if isinstance(value, dict):
            return {self.hidden(key): self.hidden(part, keep=keep) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self.hidden(part, keep=keep) for part in value]
        return value

    def read(self, text: str, *, keep: tuple[str, ...] = ()) -> str:
        """A row's text as the private tokenizer reads it: all text but the tokens in `keep`."""
        return self.exchanged(str(self.hidden(text, keep=keep)))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The copy of the tokenizer that knows control tokens by their private names alone."""
        from tokenizers import Tokenizer

        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        state |= {"padding": None, "truncation": None}
        for token in state["added_tokens"]:
            token["content"] = self.names.get(token["content"], token["content"])
        model = state["model"]
        if model.get("unk_token") in self.names:
            model["unk_token"] = self.names[model["unk_token"]]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self.names.get(t, t): index for t, index in model["vocab"].items()}
        else:  # Unigram's pieces with their scores
            model["vocab"] = [[self.names.get(t, t), score] for t, score in model["vocab"]]
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if not self._makes_token(pair)]
        return Tokenizer.from_str(json.dumps(state))

    def _makes_token(self, pair: str | list[str]) -> bool:
        """Whether a merge needs or gives a control token, which then is no word of the model."""
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        return any(part in self.names for part in (left, right, left + right))


def _one_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the texts, and of two that begin alike the one that comes first here."""
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")
