"""A sample is shown as the model reads it. `pytest tests/data/test_preview.py`"""

from __future__ import annotations

import numpy as np
import pytest

from job.data.chat import Message
from job.data.preview import bracketed, coloured, preview
from tests.data.chat_templates import FAMILIES, family_tokenizer
from tests.data.test_control_tokens import rebuilt
from tests.data.test_targets import CHAT, LEARNED, sample_of


@pytest.mark.parametrize("name", FAMILIES)
def test_the_marks_stand_around_what_is_learned(name: str) -> None:
    found, _ = sample_of(name, *CHAT)
    tokenizer = family_tokenizer(name)
    pieces = preview(found.input_ids, found.is_target, tokenizer)
    assert [piece.text for piece in pieces if piece.is_learned] == LEARNED[name]
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(found.input_ids.tolist())
    text = bracketed(pieces)
    assert text.count("[[") == text.count("]]") == len(LEARNED[name])
    for answer in LEARNED[name]:
        assert f"[[{answer}]]" in text
        assert f"\x1b[32m{answer}\x1b[0m" in coloured(pieces)


def test_a_long_sample_loses_its_middle() -> None:
    question = Message("user", "first " + "so " * 400)
    answer = Message("assistant", "no " * 400 + "last")
    found, _ = sample_of("chatml", question, answer)
    text = bracketed(preview(found.input_ids, found.is_target, family_tokenizer("chatml")))
    assert text.startswith("<|im_start|>user\nfirst so")
    assert text.endswith(" last<|im_end|>]]")
    assert f" ... {len(found.input_ids) - 400} tokens left out ... [[" in text
    short = preview(
        found.input_ids,
        found.is_target,
        family_tokenizer("chatml"),
        max_tokens=len(found.input_ids),
    )
    assert "left out" not in bracketed(short)


def test_nothing_in_a_sample_steers_a_terminal() -> None:
    found, _ = sample_of(
        "chatml", Message("user", "\x1b[31mred\r\u202e\x00 ça 🙂"), Message("assistant", "\x07")
    )
    text = bracketed(preview(found.input_ids, found.is_target, family_tokenizer("chatml")))
    assert "\\x1b[31mred\\r\\u202e\\x00 ça 🙂" in text
    assert "[[\\x07<|im_end|>]]" in text


def test_a_character_cut_by_a_mark_is_no_error() -> None:
    tokenizer = family_tokenizer("chatml")
    ids = np.asarray(tokenizer("🙂", add_special_tokens=False)["input_ids"], dtype=np.int32)
    is_target = np.zeros(len(ids), dtype=np.bool_)
    is_target[1:] = True
    pieces = preview(ids, is_target, tokenizer)
    assert [piece.is_learned for piece in pieces] == [False, True]


def test_the_first_space_of_a_piece_is_shown_where_the_decoder_strips_that_of_a_text() -> None:
    tokenizer = family_tokenizer("llama 2")
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    stripping = rebuilt(tokenizer, decoder={"type": "Sequence", "decoders": decoders})
    found, _ = sample_of("llama 2", *CHAT)
    assert stripping.decode(found.input_ids[found.is_target].tolist()).startswith("Paris.")
    text = bracketed(preview(found.input_ids, found.is_target, stripping))
    assert "[/INST][[ Paris. </s>]]" in text
