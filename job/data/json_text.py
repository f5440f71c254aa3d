"""Reads JSON piece by piece, in the memory of one value."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any

ITEM_LIMIT_CHARACTERS = 2**24  # rows of text end at 1 MB
_BLOCK_BYTES = 2**16
_SPACE = re.compile(r"[ \t\r\n]*")


class JsonText:
    """The part of a JSON file that is decoded and not used up yet.

    Its methods raise `ValueError` or `RecursionError` where the file is no valid JSON in UTF-8, or
    a value is over 16 million characters.
    """

    def __init__(self, file: io.BufferedReader[Any]) -> None:
        self._file = file
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._ended = False

    def whole_array(self) -> Iterator[object]:
        """The items of the array that is all that the file holds."""
        yield from self.array()
        self.end()

    def array(self) -> Iterator[object]:
        """Use up the array that comes next; yield its items."""
        if self.take() != "[":
            raise ValueError("not an array")
        if self.next() == "]":
            self.take()
            return
        while True:
            yield self.item()
            if (mark := self.take()) == "]":
                return
            if mark != ",":
                raise ValueError("neither a comma nor the end after an item")

    def members(self) -> Iterator[str]:
        """Use up the object that comes next; yield each key, whose value the caller uses up."""
        if self.take() != "{":
            raise ValueError("not an object")
        if self.next() == "}":
            self.take()
            return
        while True:
            key = self.item()
            if not isinstance(key, str) or self.take() != ":":
                raise ValueError("not a key and a value")
            yield key
            if (mark := self.take()) == "}":
                return
            if mark != ",":
                raise ValueError("neither a comma nor the end after a value")

    def end(self) -> None:
        """Make sure that nothing comes next."""
        if self.next():
            raise ValueError("something after the end")

    def next(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None, "it may be empty"
            self._at = space.end()
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read_on()

    def take(self) -> str:
        """Use up the next character that is no white space; return it, "" at the end."""
        character = self.next()
        self._at += len(character)
        return character

    def item(self) -> object:
        """Use up the next JSON value and return it."""
        self.next()
        while True:
            try:
                item, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError:
                if self._ended or len(self._text) - self._at > ITEM_LIMIT_CHARACTERS:
                    raise
            else:
                if self._ended or self._is_whole(end):
                    self._at = end
                    return item
            self._read_on()

    def _is_whole(self, end: int) -> bool:
        """Whether a mark or another value follows: "1" may be the beginning of "1.5" or "12"."""
        space = _SPACE.match(self._text, end)
        assert space is not None, "it may be empty"
        if len(self._text) - self._at > ITEM_LIMIT_CHARACTERS:
            raise ValueError("the item has no end")
        return self._text[space.end() : space.end() + 1] in (",", "]", "}", ":", "{")

    def _read_on(self) -> None:
        """Read at least as much again, so that a long item is not parsed once for each block."""
        self._text = self._text[self._at :]
        self._at = 0
        data = self._file.read(max(_BLOCK_BYTES, len(self._text)))
        self._ended = not data
        self._text += self._utf8.decode(data, final=self._ended)
