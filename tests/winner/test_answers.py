"""What base and adapters answer, kept row by row. `pytest tests/winner/test_answers.py`"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.data.samples import SampleTable
from job.errors import SettingsError
from job.ledger.ledger import Ledger
from job.ledger.records import AnsweringModel, AnswerRow, Answers, Result
from job.report.answers import answers_view, read_count, show_answers
from job.winner.answers import answer, matches, newest_answers, questions, scores, that_count
from tests.ledger.documents import NOW, make_result
from tests.winner.tuned import make_tuned_sweep, result_of, settings_of


@pytest.mark.parametrize(
    ("rule", "reference", "said", "equal"),
    [
        ("exact", "Paris.", " Paris.\n", True),
        ("exact", "Paris.", "paris.", False),
        ("number", "48+24 = 72\n#### 72", "The answer is 72.", True),
        ("number", "#### 1,234", "so it is 1234", True),
        ("number", "#### 0.50", "half: .5 or 0.5", True),
        ("number", "#### 72", "72, no: 71", False),
        ("number", "#### -3", "-3", True),
        ("number", "none", "none", False),
        ("regex:####\\s*(\\S+)", "#### 72", "#### 7 or #### 72", True),
        ("regex:####\\s*(\\S+)", "#### 72", "72", False),
        ("regex:yes|no", "yes", "no, yes", True),
        ("regex:(a)|b", "a", "b", False),
        ("regex:\\d*", "#### 72", "the answer is 71.", False),
        ("regex:\\d*", "#### 72", "72, I say", True),
        ("regex:\\d*", "none", "none", False),
        ("regex:\\s*", "a b", "c d", False),
        ("regex:yes( please)?", "yes", "oh yes", True),
    ],
)
def test_a_rule_compares_the_last_of_both(
    rule: str, reference: str, said: str, equal: bool
) -> None:
    assert matches(rule, reference, said) == equal


@pytest.mark.parametrize("rule", ["numbers", "", "regex:("])
def test_another_rule_is_refused(rule: str) -> None:
    with pytest.raises(SettingsError, match="--match"):
        matches(rule, "", "")


def test_a_prompt_ends_before_the_last_answer() -> None:
    ids = [np.arange(8, dtype=np.int32), np.arange(10, 14, dtype=np.int32)]
    targets = [np.array([0, 0, 1, 1, 0, 1, 1, 0], bool), np.array([0, 1, 1, 1], bool)]
    found = questions(SampleTable.concatenate(ids, targets), 5)
    assert [(q.row, q.prompt, q.reference) for q in found] == [
        (0, [0, 1, 2, 3, 4], [5, 6]), (1, [10], [11, 12, 13]),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["0", "-1", "x", "1001", "1.5", "²"])
def test_a_count_is_read_or_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="allowed: 1 to 1000"):
        read_count(text, "--rows", 1000)


def test_scores_have_intervals_and_the_report_shows_the_untuned_first() -> None:
    rows = tuple(
        AnswerRow(row=row, prompt="1+1?", reference="2",
                  answers={"base": "3", "b" * 64: "2" if row < 12 else "4"})
        for row in range(16)
    )  # fmt: skip
    answers = Answers(
        data_digest="d", base_model="b", base_model_revision="r", max_new_tokens=8, match="number",
        models={"b" * 64: AnsweringModel(slot=3, eval_loss=1.0), "base": AnsweringModel()},
        rows=rows, written_at=NOW,
    )  # fmt: skip
    found = scores(answers, "number")
    assert (found["base"].hits, found["b" * 64].hits, found["base"].num) == (0, 12, 16)
    view = answers_view(answers)
    assert view is not None
    assert view.models == ["untuned", "slot 3"]
    assert view.scores == ["0 of 16, 0 to 19%", "12 of 16, 51 to 90%"]


def _document(said: dict[str, str], *, num_rows: int = 4) -> Answers:
    """All models but the bases are adapters of slots 0, 1, …."""
    rows = [AnswerRow(row=row, prompt="p", reference="2", answers=said) for row in range(num_rows)]
    adapters = [name for name in said if not name.startswith("base")]
    models = {
        name: AnsweringModel(slot=adapters.index(name)) if name in adapters else AnsweringModel()
        for name in said
    }
    return Answers(
        data_digest="d", base_model="b", base_model_revision="r", max_new_tokens=8, match="number",
        models=models, rows=tuple(rows), written_at=NOW, a_later_key=1,
    )  # fmt: skip


def _judged(**quantizations: str) -> list[Result]:
    return [
        make_result(adapter_sha256=name, quantization=mode) for name, mode in quantizations.items()
    ]


def test_what_is_not_judged_any_more_does_not_count() -> None:
    answers = _document({"base": "3", "a": "2", "b": "4"})
    found = that_count(answers, _judged(a="nf4", c="nf4"), num_rows=3)
    assert list(found.models) == ["base", "a"]
    assert [row.answers for row in found.rows] == [{"base": "3", "a": "2"}] * 3
    assert {name: score.num for name, score in scores(found, "number").items()} == {
        "base": 3, "a": 3,
    }  # fmt: skip
    assert found.to_json()["a_later_key"] == 1
    only = that_count(_document({"b": "4"}), _judged(a="nf4"))
    assert only.rows == (), "nobody that counts has answered them"


@pytest.mark.parametrize(
    ("judged", "bases", "titles"),
    [
        ({"a": "nf4", "b": "nf4"}, ["base"], ["untuned", "slot 0", "slot 1"]),
        ({"a": "none"}, ["base-none"], ["untuned, 16 bits", "slot 0"]),
        (
            {"a": "nf4", "b": "none"},
            ["base", "base-none"],
            ["untuned, 4 bits", "untuned, 16 bits", "slot 0", "slot 1"],
        ),
        # Answered by an earlier version, which knew one base.
        ({"a": "mixed:v_proj"}, ["base"], ["untuned", "slot 0"]),
    ],
)
def test_the_base_is_shown_in_the_precisions_of_the_adapters(
    judged: dict[str, str], bases: list[str], titles: list[str]
) -> None:
    answers = _document({"a": "2", "b": "2", "base": "3", "base-none": "4"})
    found = that_count(answers, _judged(**judged))
    assert [name for name in found.models if name.startswith("base")] == bases
    view = answers_view(found)
    assert view is not None
    assert view.models == titles
    assert [answer for answer in view.rows[0][2] if answer == "4"] == ["4"] * ("base-none" in bases)


def _answer(ledger: Ledger, folder: Path, **given: Any) -> tuple[str, Answers]:
    asked: dict[str, Any] = {"num_rows": 6, "max_new_tokens": 5} | given
    slots = asked.pop("slots", (0, 1))
    trials = {slot: result_of(ledger, slot) for slot in slots}
    return answer(ledger, trials, settings=settings_of(folder), **asked)


@pytest.mark.slow
def test_each_adapter_answers_on_the_base_that_it_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.training import generation

    ledger, loaded = make_tuned_sweep(tmp_path, num_slots=2), []
    load_models = generation.load_models

    def noted(location: str, revision: str | None, adapters: Any, *rest: Any, **given: Any) -> Any:
        loaded.append((given["quantization"], len(adapters)))
        return load_models(location, revision, adapters, *rest, **given)

    monkeypatch.setattr(generation, "load_models", noted)
    trials = {
        0: result_of(ledger, 0).changed(quantization="none"),
        1: result_of(ledger, 1),
    }
    settings = settings_of(tmp_path)
    _, answers = answer(ledger, trials, settings=settings, num_rows=2, max_new_tokens=3)
    assert loaded == [("none", 1), ("nf4", 1)], "the untuned base answers as the best was trained"
    assert all(len(row.answers) == 3 for row in answers.rows)
    assert "base-none" in answers.models
    _, more = answer(ledger, {1: trials[1]}, settings=settings, num_rows=3, max_new_tokens=3)
    assert loaded[2:] == [("nf4", 1)]
    said = [list(row.answers) for row in more.rows]
    tuned = [str(result.adapter_sha256) for result in trials.values()]
    assert said[0] == said[1] == ["base-none", *tuned, "base"], "no base is of two precisions"
    assert sorted(said[2]) == sorted([tuned[1], "base"])


@pytest.mark.slow
def test_the_verb_tells_the_rows_that_were_asked_for_and_trials_that_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = make_tuned_sweep(tmp_path, num_slots=2)
    key, answers = _answer(ledger, tmp_path)
    assert (len(answers.models), len(answers.rows)) == (3, 6)
    ledger.slot(0).exclude("its rows were wrong")
    asked = Namespace(rows="2", best="3", max_new_tokens="5", match="exact", json=True)
    show_answers(asked, settings_of(tmp_path), ledger)
    told = json.loads(capsys.readouterr().out)
    tuned = str(result_of(ledger, 1).adapter_sha256)
    assert list(told["models"]) == list(told["scores"]) == ["base", tuned]
    assert [row["row"] for row in told["rows"]] == [0, 1]
    assert {name: score["num"] for name, score in told["scores"].items()} == {"base": 2, tuned: 2}
    asked.json = False
    show_answers(asked, settings_of(tmp_path), ledger)
    shown = capsys.readouterr().out
    assert "slot 1: " in shown
    assert "slot 0" not in shown
    assert f"2 rows: {tmp_path}/out/{key}" in shown
    stored = ledger.store.get(key)
    assert stored is not None
    assert len(json.loads(stored.data)["rows"]) == 6, "the bucket keeps them all"


@pytest.mark.slow
def test_batched_answers_are_those_of_each_model_alone(tmp_path: Path) -> None:
    import torch
    from peft import PeftModel

    from job.data.tokens import load_tokenizer
    from job.training.model import load_base
    from job.winner.held_out import held_out_data

    ledger = make_tuned_sweep(tmp_path, num_slots=2, std=0.4)
    _, answers = _answer(ledger, tmp_path)
    asked = questions(held_out_data(ledger, tmp_path / "work").eval, 6)
    tokenizer = load_tokenizer(str(tmp_path / "base"), None)
    assert len({len(q.prompt) for q in asked}) > 1, "something was padded"
    for slot in (None, 0, 1):
        model = load_base(str(tmp_path / "base"), None, torch.device("cpu"))
        name = "base"
        if slot is not None:
            model = PeftModel.from_pretrained(model, str(tmp_path / f"adapter-{slot}"))
            name = str(result_of(ledger, slot).adapter_sha256)
        for q, row in zip(asked, answers.rows, strict=True):
            prompt = torch.tensor([q.prompt])
            tokens = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                max_new_tokens=5, eos_token_id=[2], pad_token_id=2, use_cache=True,
            )  # fmt: skip
            alone = tokenizer.decode(tokens[0, len(q.prompt) :], skip_special_tokens=True).strip()
            assert row.answers[name] == alone, (slot, q.row)
            assert row.reference == tokenizer.decode(q.reference, skip_special_tokens=True).strip()
    said = [tuple(row.answers.values()) for row in answers.rows]
    assert any(len(set(texts)) == 3 for texts in said), "adapters were swapped"


@pytest.mark.slow
def test_what_was_answered_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.training import generation

    ledger = make_tuned_sweep(tmp_path, num_slots=2)
    calls: list[tuple[str | None, int]] = []
    generate = generation.generate

    class KilledError(Exception):
        pass

    def counted(model: Any, adapter: str | None, prompts: Any, **given: Any) -> Any:
        if len(calls) == 2:
            calls.append((None, 0))
            raise KilledError
        calls.append((adapter, len(prompts)))
        return generate(model, adapter, prompts, **given)

    monkeypatch.setattr(generation, "generate", counted)
    monkeypatch.setattr("job.winner.answers.BATCH_ROWS", 4)
    with pytest.raises(KilledError):
        _answer(ledger, tmp_path)
    assert sum(num for _, num in calls) == 6, "the base has answered"
    key, answers = _answer(ledger, tmp_path)
    asked = [call for call in calls if call[1]]
    assert sum(num for name, num in asked if name is None) == 6, "and is not asked again"
    assert sum(num for _, num in asked) == 18
    before = len(calls)
    assert _answer(ledger, tmp_path)[1].rows == answers.rows
    assert len(calls) == before, "nothing is left to ask, and nothing is loaded"
    more_key, more = _answer(ledger, tmp_path, num_rows=8, slots=(1,))
    assert more_key == key
    assert more.rows[:6] == answers.rows
    assert sum(num for _, num in calls[before:]) == 4
    other, _ = _answer(ledger, tmp_path, max_new_tokens=3, slots=(0,))
    assert other != key, "shorter answers are other answers"
    assert newest_answers(ledger) is not None


@pytest.mark.slow
def test_a_damaged_document_is_begun_anew_and_hides_no_report(tmp_path: Path) -> None:
    ledger = make_tuned_sweep(tmp_path)
    key, answers = _answer(ledger, tmp_path, slots=(0,))
    stored = ledger.store.get(key)
    assert stored is not None
    content = {**json.loads(stored.data), "rows": "none"}
    ledger.store.put_if_version(key, json.dumps(content).encode(), stored.version)
    assert newest_answers(ledger) is None
    assert _answer(ledger, tmp_path, slots=(0,))[1].rows == answers.rows


@pytest.mark.slow
def test_rows_that_are_gone_are_named(tmp_path: Path) -> None:
    ledger = make_tuned_sweep(tmp_path)
    for path in (tmp_path / "out/prepared").rglob("manifest*"):
        path.unlink()
    with pytest.raises(SettingsError, match="is gone or damaged: nothing can be measured"):
        _answer(ledger, tmp_path, slots=(0,))
