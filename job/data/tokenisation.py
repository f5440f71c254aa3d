"""`Tokenisation`: how a base's chats become tokens.

A vocabulary of 128,000 tokens takes 1.9 s of CPU to load and to hash (2026-11-26), and a trial
whose rows are prepared encodes nothing. So the first trial on a disk keeps in the work folder what
it found, under the sha256 of the files that it was found in; later ones load no tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import job
from job.data.templates import ChatTemplate, load_template, template_text
from job.data.tokens import tokenizer_fingerprint, vocabulary_digest
from job.errors import OutageError
from job.store.base import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A folder's files that a tokenizer is made of are among these. Of a hub's model the other small
# ones come to this disk later, with the weights.
_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".vocab", ".bpe"}
_NOT_READ = {"generation_config.json", "model.safetensors.index.json"}
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Facts:
    """What decides the tokens of a chat, as far as other machines have to agree on it."""

    fingerprint: str  # a sha256 of the tokenizer
    vocabulary: str  # a sha256 of its own tokens and their ids
    template: str  # the chat template, Jinja


@dataclass(frozen=True)
class Tokenisation:
    """The facts, and the template with its tokenizer, which are loaded where rows are built."""

    facts: Facts
    load: Callable[[], ChatTemplate]


def tokenisation_of(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> Tokenisation:
    """The tokenisation by a loaded tokenizer. Raises what `load_template` raises."""
    template = load_template(chat_template, tokenizer)
    facts = Facts(tokenizer_fingerprint(tokenizer), vocabulary_digest(tokenizer), template.source)
    return Tokenisation(facts, lambda: template)


def find_tokenisation(
    chat_template: str | None,
    *,
    folder: Callable[[], Path | None],
    load: Callable[[], PreTrainedTokenizerBase],
    work_dir: Path,
) -> Tokenisation:
    """The tokenisation that an earlier trial found in the same files, else by loading them.

    `folder` tells where the base's files lie on this disk, None before the hub's are fetched; what
    `load` loads is in it. Raises what `load` and `load_template` raise.
    """
    before = _files(folder())
    path = _path(work_dir, chat_template, before)
    if (facts := _read(path)) is not None:
        return Tokenisation(facts, partial(_loaded_as, facts, path, chat_template, load))
    found = tokenisation_of(load(), chat_template)
    after = _files(folder())
    if before.items() <= after.items():  # not of files that were replaced meanwhile
        _keep(found.facts, _path(work_dir, chat_template, after))
    return found


def _files(folder: Path | None) -> dict[str, str]:
    """The sha256 of every file that may be part of a tokenizer, by name."""
    if folder is None:
        return {}
    paths = [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]
    return {
        str(path.relative_to(folder)): _sha256(path)
        for path in sorted(paths)
        if path.suffix in _SUFFIXES and path.name not in _NOT_READ and path.is_file()
    }


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError:  # if it is the tokenizer's, loading will tell
        return "unreadable"


def _path(work_dir: Path, chat_template: str | None, files: dict[str, str]) -> Path:
    """The place of the facts of these files, as this code and these libraries read them."""
    given = None if chat_template is None else template_text(chat_template)
    versions = [job.__version__, *map(version, ("transformers", "tokenizers"))]
    identity = json.dumps([given, versions, files], sort_keys=True)
    return work_dir / "tokenizers" / f"{hashlib.sha256(identity.encode()).hexdigest()}.json"


def _read(path: Path) -> Facts | None:
    with suppress(OSError, ValueError, TypeError):
        facts = Facts(**json.loads(path.read_bytes()))
        if _DIGEST.fullmatch(facts.fingerprint) and _DIGEST.fullmatch(facts.vocabulary):
            return facts
    return None


def _keep(facts: Facts, path: Path) -> None:
    """Write the facts; a work folder that cannot be written costs the next trial two seconds."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(asdict(facts)))
        draft.replace(path)


def _loaded_as(
    facts: Facts,
    path: Path,
    chat_template: str | None,
    load: Callable[[], PreTrainedTokenizerBase],
) -> ChatTemplate:
    """Load the template and its tokenizer after all. Raises `OutageError` if the facts differ."""
    found = tokenisation_of(load(), chat_template)
    if found.facts != facts:  # no rows may be published under a digest that is not theirs
        path.unlink(missing_ok=True)
        raise OutageError(
            f"JOB_BASE_MODEL: its tokenizer is not what {path} says; that file is removed, run"
            " again"
        )
    return found.load()
