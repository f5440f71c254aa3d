"""`job answers`: what the untuned base and the best adapters say to held-out prompts."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from job.base_model import BaseModel
from job.data.samples import SampleTable
from job.data.tokens import load_tokenizer
from job.errors import CredentialsError, SettingsError, SlotError
from job.ledger.accounts import now
from job.ledger.ledger import Ledger
from job.ledger.records import AnsweringModel, AnswerRow, Answers, Result
from job.log import log
from job.progress import CountProgress
from job.settings import Settings
from job.store.base import Store
from job.store.documents import create_document, read_document, swap_document
from job.winner.adapter import download
from job.winner.base import base_of
from job.winner.held_out import held_out_data
from job.winner.intervals import Interval, share

if TYPE_CHECKING:
    import torch

BASE = "base"  # the untuned model among the answering ones, its weights in 4 bits
MAX_ROWS = 1000  # of a document, which is read as a whole
BATCH_ROWS = 8  # answered at once, and kept in the bucket before the next ones
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def base_name(quantization: str) -> str:
    """The name of the untuned base among the answering models, by how its weights are held."""
    return BASE if quantization == "nf4" else f"{BASE}-{quantization}"


def quantization_of(name: str) -> str | None:
    """How the weights of an answering base are held; None for an adapter."""
    first, _, mode = name.partition("-")
    return (mode or "nf4") if first == BASE else None


@dataclass(frozen=True)
class Question:
    """The end of a held-out row: all tokens before its last answer, and that answer's."""

    row: int
    prompt: list[int]
    reference: list[int]


@dataclass(frozen=True)
class Score:
    """How many of the answers match their references, with Wilson's interval."""

    hits: int
    num: int
    interval: Interval


def questions(table: SampleTable, num_rows: int) -> list[Question]:
    """The first rows of the table, each cut before the last run of targets."""
    found = []
    for row in range(min(num_rows, len(table))):
        part = slice(table.offsets[row], table.offsets[row + 1])
        ids, is_target = table.input_ids[part].tolist(), table.is_target[part]
        last = int(np.flatnonzero(is_target)[-1])
        context = np.flatnonzero(~is_target[: last + 1])
        first = int(context[-1]) + 1 if len(context) else 0
        found.append(Question(row, ids[:first], ids[first : last + 1]))
    return found


def answer(
    ledger: Ledger,
    trials: Mapping[int, Result],
    *,
    settings: Settings,
    num_rows: int,
    max_new_tokens: int,
    match: str | None = None,
) -> tuple[str, Answers]:
    """Have the base and the adapters of `trials` (by slot) answer; return the key and the document.

    What an earlier call has answered is not asked again: rows are kept in the bucket batch by
    batch. Raises `SettingsError`, and what `load_base` raises.
    """
    if match is not None:
        matches(match, "", "")  # a rule that cannot be read is told before anything is loaded
    data = held_out_data(ledger, settings.work_dir)
    result = next(iter(trials.values()))
    content: dict[str, Any] = {
        "data_digest": data.digest,
        "base_model": result.base_model,
        "base_model_revision": result.base_model_revision,
        "max_new_tokens": max_new_tokens,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    kept = _Kept(ledger.store, f"{ledger.folder}/answers-{digest}.json", content, match)
    by_name = {str(found.adapter_sha256): (slot, found) for slot, found in trials.items()}
    base = base_name(result.quantization)
    kept.add_models({
        base: AnsweringModel(),
        **{
            name: AnsweringModel(slot=slot, eval_loss=found.eval_loss)
            for name, (slot, found) in by_name.items()
        },
    })  # fmt: skip
    asked = questions(data.eval, num_rows)
    missing = {name: kept.missing(name, asked) for name in (base, *by_name)}
    if any(missing.values()):
        _generate(kept, by_name, missing, settings)
    return kept.key, kept.document


def _generate(
    kept: _Kept,
    by_name: Mapping[str, tuple[int, Result]],
    missing: Mapping[str, list[Question]],
    settings: Settings,
) -> None:
    """Load base and adapters, and answer what is missing, model by model.

    Each adapter answers on the base as it was trained on it; the untuned base as the best was.
    """
    from job.training.device import any_device

    result = next(iter(by_name.values()))[1]
    base = base_of(kept.store, result, settings)
    tokenizer = load_tokenizer(base.location, base.hub_revision)
    device = any_device(settings.device, gpu_memory_gb=settings.gpu_memory_gb)
    modes = {name: quantization_of(name) or by_name[name][1].quantization for name in missing}
    total = sum(map(len, missing.values()))
    with CountProgress("answering", "rows", total=total) as progress:
        for mode in dict.fromkeys(modes[name] for name, asked in missing.items() if asked):
            part = {name: asked for name, asked in missing.items() if modes[name] == mode}
            _answer_all(
                kept,
                _load(kept, by_name, part, base, device, settings=settings, mode=mode),
                part,
                tokenizer,
                progress,
            )


def _load(
    kept: _Kept,
    by_name: Mapping[str, tuple[int, Result]],
    missing: Mapping[str, list[Question]],
    base: BaseModel,
    device: torch.device,
    *,
    settings: Settings,
    mode: str,
) -> Any:
    """The base in one precision, beside it the adapters of those that have something to answer."""
    from job.training.device import weight_memory_bytes
    from job.training.generation import load_models

    memory_bytes = weight_memory_bytes(device, gpu_memory_gb=settings.gpu_memory_gb)
    with tempfile.TemporaryDirectory(prefix="adapters-") as folder:
        paths = {}
        for name, asked in missing.items():
            if asked and quantization_of(name) is None:
                slot, found = by_name[name]
                paths[name] = Path(folder) / name
                download(kept.store, slot, found, paths[name], option="answers")
        return load_models(
            base.location,
            base.hub_revision,
            paths,
            device,
            memory_bytes=memory_bytes,
            quantization=mode,
        )


def _answer_all(
    kept: _Kept,
    model: Any,
    missing: Mapping[str, list[Question]],
    tokenizer: Any,
    progress: CountProgress,
) -> None:
    """Have the loaded models answer, and keep what they say batch by batch."""
    from job.training.generation import generate

    end_ids = _end_ids(tokenizer, model.generation_config, missing)
    for name, batch in _batches(missing):
        said = generate(
            model,
            name if quantization_of(name) is None else None,
            [question.prompt for question in batch],
            max_new_tokens=kept.document.max_new_tokens,
            end_ids=end_ids,
        )
        kept.add_answers(name, batch, said, tokenizer)
        progress.advance(len(batch))


def _batches(
    missing: Mapping[str, list[Question]],
) -> Iterator[tuple[str, list[Question]]]:
    """Batches of prompts of about one length, so that little is padded."""
    for name, asked in missing.items():
        ordered = sorted(asked, key=lambda question: (len(question.prompt), question.row))
        for start in range(0, len(ordered), BATCH_ROWS):
            yield name, ordered[start : start + BATCH_ROWS]


def _end_ids(
    tokenizer: Any, generation_config: Any, missing: Mapping[str, list[Question]]
) -> list[int]:
    """The tokens that end an answer: the model's, the tokenizer's, and those that end the rows'."""
    own = generation_config.eos_token_id
    special = set(tokenizer.all_special_ids)
    in_rows = {q.reference[-1] for asked in missing.values() for q in asked} & special
    listed = own if isinstance(own, list) else [own]
    known = {token for token in (*listed, tokenizer.eos_token_id, *in_rows) if token is not None}
    if not known:
        raise SettingsError("answers: neither the base nor its tokenizer says what ends an answer")
    return sorted(known)


class _Kept:
    """The document in the bucket; what others write into it meanwhile stays."""

    def __init__(self, store: Store, key: str, content: dict[str, Any], match: str | None) -> None:
        self.key = key
        self.store, self._new, self._match = store, content, match
        self.document = self._read()[0]

    def missing(self, name: str, asked: Sequence[Question]) -> list[Question]:
        """The questions that a model has not answered yet."""
        done = {row.row for row in self.document.rows if name in row.answers}
        return [question for question in asked if question.row not in done]

    def add_models(self, models: Mapping[str, AnsweringModel]) -> None:
        """Say who answers from now on, and by which rule answers are judged."""
        self._write(models, {})

    def add_answers(
        self, name: str, batch: Sequence[Question], said: Sequence[list[int]], tokenizer: Any
    ) -> None:
        """Keep a model's answers to a batch of questions."""

        def words(ids: list[int], *, whole: bool = False) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=not whole)).strip()

        self._write({}, {
            q.row: AnswerRow(
                row=q.row, prompt=words(q.prompt, whole=True), reference=words(q.reference),
                answers={name: words(ids)},
            )
            for q, ids in zip(batch, said, strict=True)
        })  # fmt: skip

    def _write(self, models: Mapping[str, AnsweringModel], rows: Mapping[int, AnswerRow]) -> None:
        while True:
            document, version = self._read()
            known = {row.row: row for row in document.rows}
            for number, row in rows.items():
                earlier = known.get(number)
                answers = {**(earlier.answers if earlier else {}), **row.answers}
                known[number] = row.changed(answers=answers)
            changed = document.changed(
                models={n: m.to_json() for n, m in {**document.models, **models}.items()},
                rows=[known[number].to_json() for number in sorted(known)],
                match=self._match or document.match,
                written_at=now(),
            )
            content = changed.to_json()
            if version is None:
                written = create_document(self.store, self.key, content)
            else:
                written = swap_document(self.store, self.key, content, version)
            if written.ours:
                self.document = changed
                return

    def _read(self) -> tuple[Answers, str | None]:
        stored = read_document(self.store, self.key)
        if stored is None:
            return Answers(**self._new, written_at=now()), None
        try:
            return Answers.model_validate(stored.content), stored.version
        except ValidationError:
            log.warning("%s/%s is damaged: begun anew", self.store.uri, self.key)
            return Answers(**self._new, written_at=now()), stored.version


def newest_answers(ledger: Ledger) -> Answers | None:
    """The answers written last, for people; None where nobody asked for any."""
    found = []
    try:
        keys = list(ledger.store.list(f"{ledger.folder}/answers-"))
    except CredentialsError as error:  # whoever may read documents need not be let list them
        log.warning("answers are not looked for: %s", error)
        return None
    for key in keys:
        try:
            stored = read_document(ledger.store, key)
            if stored is not None:
                found.append(Answers.model_validate(stored.content))
        except (SlotError, ValidationError) as error:
            log.warning(
                "%s/%s is not shown: %s", ledger.store.uri, key, str(error).partition("\n")[0]
            )
    return max(found, key=lambda answers: answers.written_at, default=None)


def that_count(answers: Answers, judged: Iterable[Result], num_rows: int | None = None) -> Answers:
    """Leave out what no longer counts: only adapters of `judged` trials stay, and their bases.

    A slot that was excluded or begun again since has answered, too. With `num_rows` only the first
    rows stay.
    """
    modes = {str(result.adapter_sha256): result.quantization for result in judged}
    names = answers.models.keys() & modes.keys()
    bases = answers.models.keys() & {base_name(modes[name]) for name in names}
    names |= bases or {BASE}  # by earlier versions the only base, in whatever precision
    rows = [
        row.changed(answers={name: said for name, said in row.answers.items() if name in names})
        for row in answers.rows
        if num_rows is None or row.row < num_rows
    ]
    return answers.changed(
        models={n: model.to_json() for n, model in answers.models.items() if n in names},
        rows=[row.to_json() for row in rows if row.answers],
    )


def scores(answers: Answers, match: str) -> dict[str, Score]:
    """How often each model's answers match the references, by the rule."""
    found = {}
    for name in answers.models:
        rows = [row for row in answers.rows if name in row.answers]
        if rows:
            hits = sum(matches(match, row.reference, row.answers[name]) for row in rows)
            found[name] = Score(hits, len(rows), share(hits, len(rows)))
    return found


def matches(rule: str, reference: str, said: str) -> bool:
    """Whether an answer says what the reference says: `exact`, `number` or `regex:PATTERN`.

    `number` compares the last number of both, as GSM8K's answers end with theirs; a pattern
    compares the last of what its first group, or the whole of it, finds in both. Raises
    `SettingsError` for another rule.
    """
    if rule == "exact":
        return reference.strip() == said.strip()
    if rule == "number":
        wanted, found = (_last_number(text) for text in (reference, said))
        return wanted is not None and wanted == found
    if not rule.startswith("regex:"):
        raise SettingsError(f"--match: is {rule!r}; allowed: exact, number, regex:PATTERN")
    try:
        pattern = re.compile(rule.removeprefix("regex:"))
    except re.error as error:
        raise SettingsError(f"--match: {rule!r} is no regular expression: {error}") from error
    wanted_text, found_text = (_last_match(pattern, text) for text in (reference, said))
    return wanted_text is not None and wanted_text == found_text


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def _last_match(pattern: re.Pattern[str], text: str) -> str | None:
    # A pattern that may be empty (\\d*) is so at every text's end.
    found = [m[min(1, pattern.groups)] for m in pattern.finditer(text) if m[0].strip()]
    return (found[-1] or "").strip() if found else None
