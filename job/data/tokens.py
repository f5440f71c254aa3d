"""Turns rendered texts into token ids and target masks.

A text is tokenised as a whole, as training and inference libraries do, and each token is placed by
the offsets of its characters. Tokenising the pieces on their own would be simpler, but
SentencePiece vocabularies put a space before every piece, which gives tokens that the whole text
does not hold. A token is a target if its last character lies in a span: where a header ends with
the space that belongs to the answer's first word, the model has to say that word's token. The white
space that a token swallows after itself (`rstrip`) does not count: older Phi-3's "<|end|>" takes
the line end after the turn, and is still what ends the answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from job.data.templates import Rendered
from job.errors import SettingsError
from job.hub import explained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOO_LONG = "too_long"


class Sample(NamedTuple):
    """One row's tokens."""

    input_ids: NDArray[np.int32]  # (tokens,)
    is_target: NDArray[np.bool_]  # (tokens,), False at 0, True at the last
    truncated: bool  # the end of the last answer was cut off


def load_tokenizer(base_model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face id or a folder.

    Raises `SettingsError` if there is none that gives offsets, and what `job.hub.explained` says:
    `HubOutageError`, which may be waited out, if the hub cannot be reached.
    """
    from transformers import AutoTokenizer  # imports torch: 4 s

    is_folder = Path(base_model).is_dir()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base_model, revision=None if is_folder else revision, trust_remote_code=False
        )
    except Exception as error:  # every tokenizer class raises its own on damaged files
        told = None if is_folder else explained(error, "JOB_BASE_MODEL", base_model, revision)
        if told:
            raise told from error
        where = "" if is_folder or revision is None else f" at revision {revision}"
        raise SettingsError(
            f"JOB_BASE_MODEL {base_model}{where}: no usable tokenizer "
            f"({_first_line(error)}): give a Hugging Face id or a folder with tokenizer.json"
        ) from error
    if not tokenizer.is_fast:
        raise SettingsError(
            f"JOB_BASE_MODEL {base_model}: its tokenizer tells no offsets, which the target mask "
            "needs: give a model with tokenizer.json"
        )
    return tokenizer


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A sha256 of everything that decides which ids a text gets, the same on every machine.

    Taken from the loaded tokenizer, not from its files: for known model families transformers
    builds the pre-tokenizer itself, whatever tokenizer.json says.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("padding", "truncation"):  # a caller's last call, not the tokenizer
        state.pop(name, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = json.dumps([state, special], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A sha256 of the tokens and their ids, without those that were added, such as a chat's.

    Equal for a base and the models made from it, whatever their templates.
    """
    tokens = sorted(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).items())
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def encode(
    texts: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase, *, max_seq_length: int
) -> list[Sample | str]:
    """A sample for each text, or the reason why it gives none: `TOO_LONG` or a tokenizer fault.

    Tokens after the last target are left out, because no loss depends on them. All texts without
    control tokens that a row spells are tokenised in one call, each of the others by itself.
    """
    if not texts:
        return []
    plain = [rendered.text for rendered in texts if rendered.control is None]
    encoded = iter(_encodings(plain, tokenizer))
    added_tokens = _AddedTokens(tokenizer)
    samples: list[Sample | str] = []
    for rendered in texts:
        if rendered.control is None:
            ids, offsets = next(encoded)
        else:
            found = rendered.control.tokenizer.encode(rendered.text, add_special_tokens=False)
            ids, offsets = found.ids, found.offsets
        ends = added_tokens.ends(ids, offsets, rendered.text)
        samples.append(_sample(ids, ends, rendered, added_tokens.end_id(rendered), max_seq_length))
    return samples


def _encodings(
    texts: list[str], tokenizer: PreTrainedTokenizerBase
) -> Iterable[tuple[list[int], list[tuple[int, int]]]]:
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,  # the template has written them, and a second BOS would harm
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # says that texts are longer than the model's context; we cut them
    )
    return zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)


class _AddedTokens:
    """The added tokens of a tokenizer: their ids, and which swallow the white space after them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder
        self._ids = {token.content: number for number, token in added.items()}
        self._swallowing = {number for number, token in added.items() if token.rstrip}

    def ends(self, ids: list[int], offsets: list[tuple[int, int]], text: str) -> NDArray[np.int64]:
        """Where each token ends in the text, without white space that it swallows; (tokens,)."""
        ends = np.fromiter((end for _, end in offsets), dtype=np.int64, count=len(offsets))
        if self._swallowing:
            for place, number in enumerate(ids):
                if number in self._swallowing:
                    start, end = offsets[place]
                    ends[place] = start + len(text[start:end].rstrip())
        return ends

    def end_id(self, rendered: Rendered) -> int | None:
        """The id of the text's end token; None if it has none that is one token."""
        token = rendered.end_token
        return self._ids.get(rendered.control.exchanged(token) if rendered.control else token)


def _sample(
    ids: list[int],
    ends: NDArray[np.int64],
    rendered: Rendered,
    end_id: int | None,
    max_seq_length: int,
) -> Sample | str:
    if (np.diff(ends) < 0).any():
        return "the tokenizer's offsets are out of order"
    is_target = np.zeros(len(ids), dtype=np.bool_)
    for start, end in rendered.spans:
        first, last = np.searchsorted(ends, (start, end), side="right")
        is_target[first:last] = True
        is_ended = end_id is not None and rendered.text.endswith(rendered.end_token, start, end)
        if is_ended and ids[int(last) - 1] != end_id:
            return "the tokenizer does not read what ends an answer as one token"
    is_target[:1] = False  # nothing comes before the first token
    length = _used_length(is_target)
    if length == 0:
        return "no target token"
    kept = min(length, max_seq_length)
    used = _used_length(is_target[:kept])
    if used == 0:
        return TOO_LONG
    input_ids = np.asarray(ids[:used], dtype=np.int32)
    return Sample(input_ids, is_target[:used].copy(), truncated=length > max_seq_length)


def _used_length(is_target: NDArray[np.bool_]) -> int:
    """The number of tokens up to the last target, which is counted; 0 without any target."""
    (targets,) = is_target.nonzero()
    return int(targets[-1]) + 1 if len(targets) else 0
