"""Shows a sample as the model reads it, with what it learns marked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TOKENS = 400  # of a longer sample the middle is left out
_MARKS = ("[[", "]]")
_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"


class Piece(NamedTuple):
    """A stretch of a sample."""

    text: str
    is_learned: bool


def preview(
    input_ids: NDArray[np.int32],  # (tokens,)
    is_target: NDArray[np.bool_],  # (tokens,)
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int = MAX_TOKENS,
) -> list[Piece]:
    """The sample's text, decoded from its tokens, by what is learned; control tokens are shown.

    Characters that would steer a terminal or that nobody sees are spelled as escapes.
    """
    left_out = len(input_ids) - max_tokens
    if left_out <= 0:
        return list(_pieces(input_ids, is_target, tokenizer))
    head, tail = max_tokens - max_tokens // 2, len(input_ids) - max_tokens // 2
    return [
        *_pieces(input_ids[:head], is_target[:head], tokenizer),
        Piece(f" ... {left_out} tokens left out ... ", False),
        *_pieces(input_ids[tail:], is_target[tail:], tokenizer),
    ]


def bracketed(pieces: list[Piece]) -> str:
    """The text with what is learned between `[[` and `]]`, for a log or a program."""
    return _marked(pieces, *_MARKS)


def coloured(pieces: list[Piece]) -> str:
    """The text with what is learned in green, for a terminal."""
    return _marked(pieces, _GREEN, _PLAIN)


def _marked(pieces: list[Piece], before: str, after: str) -> str:
    return "".join(f"{before}{p.text}{after}" if p.is_learned else p.text for p in pieces)


def _pieces(
    input_ids: NDArray[np.int32], is_target: NDArray[np.bool_], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Piece]:
    changes = np.flatnonzero(np.diff(is_target)) + 1
    shown = ""
    for start, end in zip([0, *changes], [*changes, len(input_ids)], strict=True):
        # A piece decoded alone may lose its first space: decoders strip that of a whole text.
        whole = _decoded(input_ids[:end], tokenizer)
        alone = whole.removeprefix(shown) if whole.startswith(shown) else None
        text = _decoded(input_ids[start:end], tokenizer) if alone is None else alone
        shown = whole
        yield Piece("".join(map(_visible, text)), bool(is_target[start]))


def _decoded(ids: NDArray[np.int32], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(
        ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


def _visible(character: str) -> str:
    if character.isprintable() or character in "\n\t":
        return character
    return character.encode("unicode_escape").decode()
