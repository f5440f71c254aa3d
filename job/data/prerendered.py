"""Finds the prompts that a chat template, or a person in its way, has rendered already."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from job.data.control_tokens import THOUGHT_MARKS
from job.data.formats import UnusableRowError
from job.data.turn_marks import TurnMarks, splitter


class OpenedPair(NamedTuple):
    """A rendered prompt and its answer in parts, without the text's BOS and the answer's end."""

    prompt: str  # up to where the model speaks
    lead: str  # what the template writes before an answer's words, where the answer lacks it
    answer: str
    is_rendered: bool  # the answer is rendered as well: what it spells is what it means


@dataclass(frozen=True)
class PairReader:
    """Tells rendered prompts from questions by the words that a template writes around turns."""

    marks: TurnMarks
    tokens: tuple[str, ...]  # the tokenizer's added ones
    control: Collection[str]  # those that are control tokens

    def read(self, prompt: str, answer: str) -> OpenedPair | None:
        """The parts of a pair whose prompt is rendered; None for any other.

        After BOS and white space the prompt begins with what opens a user's or the system's turn
        (or with the token that such a turn begins with), and it ends with what stands between a
        question and its answer; the answer column may hold the rest of that. A prompt that only
        mentions a control token is therefore none. Raises `UnusableRowError` for no answer.
        """
        body = prompt.lstrip().removeprefix(self.marks.bos).lstrip()
        if not self.marks.first_turns or not body.startswith(self.marks.first_turns):
            return None
        head, answer = self._opened(body, answer)
        if not head:
            return None
        for closing in ("", self.marks.tail.strip(), self.marks.end.strip()):
            answer = answer.removesuffix(closing).rstrip()
        if not answer.strip():
            raise UnusableRowError("empty answer")
        # An answer that opens with a channel's token, say, needs no other.
        lead = self.marks.lead
        tokens = [token for token in self.tokens if token in lead]
        if any(token in answer for token in tokens):
            opening = tuple(t for t in tokens if t in self.control and t not in THOUGHT_MARKS)
            return OpenedPair(head, "", answer, answer.lstrip().startswith(opening))
        return OpenedPair(head, lead, answer.lstrip(), is_rendered=False)

    def _opened(self, body: str, answer: str) -> tuple[str, str]:
        """The prompt up to where the model speaks, and the answer; "" if it does not end so.

        White space around the template's tokens may be missing or other.
        """
        whole = body + answer
        for opening, pattern in self._openings:
            for found in pattern.finditer(whole):
                if found.start() <= len(body) and found.end() >= len(body.rstrip()):
                    blank = opening[len(opening.rstrip()) :]
                    return whole[: found.end()] + blank, whole[found.end() :].removeprefix(blank)
        return "", answer

    @cached_property
    def _openings(self) -> tuple[tuple[str, re.Pattern[str]], ...]:
        """What stands between a question and its answer, with and without a thought's opening."""
        whole = self.marks.opening
        texts = dict.fromkeys((whole, whole.removesuffix(self.marks.promise)))
        return tuple((text, self._spaced(text)) for text in texts if text.strip())

    def _spaced(self, text: str) -> re.Pattern[str]:
        """The text as a pattern, with any white space around its tokens."""
        parts = splitter([token for token in self.tokens if token in text]).split(text)
        return re.compile(r"\s*".join(re.escape(p.strip()) for p in parts if p and p.strip()))
