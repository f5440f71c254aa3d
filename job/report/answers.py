"""`job answers` on a terminal, and its answers in the report."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape

from job.errors import SettingsError, SlotError
from job.ledger.ledger import Ledger, check_sweep
from job.ledger.records import Answers
from job.report.overview import read_overview
from job.settings import Settings
from job.training.quantization import in_short
from job.winner.answers import MAX_ROWS, Score, answer, quantization_of, scores, that_count

SHOWN_ROWS = 3  # on a terminal
REPORTED_ROWS = 12
CUT = 600  # characters of a text in the report


@dataclass(frozen=True)
class AnswersView:
    """The answers as the report shows them: a column for each model, a line for each row."""

    models: list[str]
    scores: list[str]  # one for each model; empty without a rule
    rows: list[tuple[str, str, list[str]]]  # prompt, reference, answers
    num_rows: int
    match: str | None


def show_answers(options: Namespace, settings: Settings, ledger: Ledger) -> None:
    """Answer, and print some of the answers and the scores, or all of it as JSON."""
    num_rows = read_count(options.rows, "--rows", MAX_ROWS)
    num_best = read_count(options.best, "--best", 20)
    max_new_tokens = read_count(options.max_new_tokens, "--max-new-tokens", 4096)
    check_sweep(ledger)
    overview = read_overview(ledger, settings.num_trials)
    judged = sorted(
        (view for view in overview.slots if view.judged and view.adapter_key),
        key=lambda view: (view.eval_loss, view.slot),
    )
    if not judged:
        raise SlotError(f"sweep {ledger.sweep}: no committed trial has an adapter yet")
    trials = {view.slot: view.result for view in judged[:num_best] if view.result}
    key, answers = answer(
        ledger,
        trials,
        settings=settings,
        num_rows=num_rows,
        max_new_tokens=max_new_tokens,
        match=options.match,
    )
    answers = that_count(answers, [view.result for view in judged if view.result], num_rows)
    uri = f"{ledger.store.uri}/{key}"
    if options.json:
        print(json.dumps(answers_json(answers, uri, options.match), indent=1))
    else:
        _print(answers, uri, options.match)
    sys.stdout.flush()


def answers_json(answers: Answers, uri: str, match: str | None) -> dict[str, Any]:
    """The document for a program, with the scores by model where there is a rule."""
    content = {"uri": uri, **answers.to_json()}
    if match is not None:
        content["scores"] = {
            name: {
                "hits": score.hits,
                "num": score.num,
                "low": score.interval.estimate - score.interval.half_width,
                "high": score.interval.estimate + score.interval.half_width,
            }
            for name, score in scores(answers, match).items()
        }
    return content


def answers_view(answers: Answers | None) -> AnswersView | None:
    """What the report shows of the answers; None without any."""
    if answers is None or not answers.rows:
        return None
    names = _ordered(answers)
    found = scores(answers, answers.match) if answers.match else {}
    rows = [
        (_cut(row.prompt), _cut(row.reference), [_cut(row.answers.get(n, "")) for n in names])
        for row in answers.rows[:REPORTED_ROWS]
    ]
    told = [score_words(found[name]) if name in found else "" for name in names]
    return AnswersView(
        [_title(answers, name) for name in names], told, rows, len(answers.rows), answers.match
    )


def score_words(score: Score) -> str:
    """A score with its 95 % interval: 12 of 64, 11 to 30 %."""
    low = max(0.0, score.interval.estimate - score.interval.half_width)
    high = min(1.0, score.interval.estimate + score.interval.half_width)
    return f"{score.hits} of {score.num}, {100 * low:.0f} to {high:.0%}"


def read_count(text: str, option: str, highest: int) -> int:
    """A whole number from 1 to `highest` that a person gave. Raises `SettingsError`."""
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= highest:
        raise SettingsError(f"answers: {option} is {text!r}; allowed: 1 to {highest}")
    return int(text)


def _ordered(answers: Answers) -> list[str]:
    """The models that answered, the untuned base first, then by eval/loss."""

    def rank(name: str) -> tuple[bool, float]:
        return quantization_of(name) is None, answers.models[name].eval_loss or 0.0

    return sorted(answers.models, key=rank)


def _title(answers: Answers, name: str) -> str:
    mode = quantization_of(name)
    if mode is None:
        return f"slot {answers.models[name].slot}"
    num_bases = sum(quantization_of(model) is not None for model in answers.models)
    return "untuned" if mode == "nf4" and num_bases == 1 else f"untuned, {in_short(mode)}"


def _print(answers: Answers, uri: str, match: str | None) -> None:
    console = Console(highlight=False, soft_wrap=True)
    names = _ordered(answers)
    for row in answers.rows[:SHOWN_ROWS]:
        console.print(f"[bold]{escape(row.prompt)}[/]")
        console.print(f"  [dim]the row:[/] {escape(row.reference)!s}")
        for name in names:
            said = row.answers.get(name)
            if said is not None:
                console.print(f"  [dim]{_title(answers, name)}:[/] {escape(said)!s}")
    if match is not None:
        found = scores(answers, match)
        for name in names:
            if name in found:
                words = f"{_title(answers, name)}: {score_words(found[name])} match ({match})"
                console.print(words, markup=False)
    console.print(f"{len(answers.rows)} rows: {uri}", markup=False)


def _cut(text: str) -> str:
    return text if len(text) <= CUT else f"{text[:CUT]} …"
