"""A row as a chat: its turns, and the tools that they may call."""

from __future__ import annotations

from typing import Any, NamedTuple

PLAIN_TEXT = "text"  # the role of a text without turns: no chat template, every token a target


class Message(NamedTuple):
    """One turn of a chat."""

    role: str  # system, user, assistant, tool; or PLAIN_TEXT
    content: str
    reasoning: str = ""  # what an assistant thought before its answer
    tool_calls: tuple[dict[str, Any], ...] = ()  # an assistant's calls, each as OpenAI writes it
    name: str = ""  # of the tool that a tool's turn answers for
    is_context: bool = False  # read by the model, never learned


class Chat(NamedTuple):
    """What a row says: turns in order, the last one an assistant's, or one plain text."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()  # JSON schemas, for the chat template's `tools`
    is_pair: bool = False  # of a prompt and an answer column: the prompt may be rendered already
