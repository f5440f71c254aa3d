"""Decides by hashes of what rows say which of them a sweep uses, and on which side.

The hash is taken over a row's messages, not over its bytes in a file, so the same rows are chosen
whatever the shard order, the file format or the machine. Sorted by that hash, the rows stand in a
random but fixed order, and the choice of a smaller fraction is the beginning of a larger one's.

Rows that say the same have the same hash, so that a repeated row is taken with all its copies or
with none, and they lie on one side of the split: whoever repeats a row gives it more weight.
"""

from __future__ import annotations

import hashlib
import json

from job.data.chat import Chat, Message

HASH_BYTES = 16


def row_hash(chat: Chat, *, seed: int) -> bytes:
    """Hash a row: 16 bytes that depend on the seed and on what the row says only."""
    turns: list[object] = [list(message) for message in map(_said, chat.messages)]
    if chat.tools:
        turns.append({"tools": chat.tools})
    text = json.dumps(turns, ensure_ascii=False)  # keys as they stand: templates write them so
    seeded = f"{seed}\n{text}".encode()
    return hashlib.blake2b(seeded, digest_size=HASH_BYTES, person=b"job row").digest()


def _said(message: Message) -> tuple[object, ...]:
    """A turn's role and content; whatever else it has only where it has it."""
    plain = Message(message.role, message.content)
    return message[:2] if message == plain else message


def is_selected(row: bytes, *, fraction: float) -> bool:
    """Whether the row with this hash belongs to a subsample of about `fraction` of all rows."""
    return _unit(row) < fraction


def is_eval(row: bytes, *, fraction: float) -> bool:
    """Whether the row with this hash is held out for evaluation; independent of `is_selected`."""
    side = hashlib.blake2b(row, digest_size=HASH_BYTES, person=b"job side").digest()
    return _unit(side) < fraction


def _unit(digest: bytes) -> float:
    """A number in [0, 1), from 53 bits: all that a float holds below 1."""
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53
