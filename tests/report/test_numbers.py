"""Table, page, charts and samples show the numbers of the slots; overviews made by hand.

`pytest tests/report/test_numbers.py`
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console, RenderableType

from job.ledger.accounts import Cost, dollars
from job.ledger.lease import acquire
from job.ledger.ledger import Ledger
from job.ledger.records import AttemptProgress, Ended
from job.report import charts
from job.report.attempts_table import attempts_table
from job.report.commands import describe_best
from job.report.findings import findings
from job.report.gain import gain_lines, observations, outlook_of
from job.report.overview import Overview, SlotView, read_overview
from job.report.page import html_page, markdown
from job.report.table import slot_table, to_json, to_prometheus
from job.store.local import LocalStore
from job.sweep.distributions import Choice, FloatRange
from job.trial.draw import observe
from job.trial.end import nats, price
from tests.ledger.documents import make_identity, make_result, make_spec

SWEEP = {
    "method": "random",
    "metric": {"name": "eval/loss", "goal": "minimize"},
    "parameters": {
        "learning_rate": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-3},
        "lora_r": {"values": [8, 16]},
    },
}
RESULT = make_result()


def _trial(slot: int, loss: float, rate: float, *, rank: int = 8, **given: Any) -> SlotView:
    seconds = given.pop("gpu_seconds", 0.0)
    return SlotView(
        slot, given.pop("state", "completed"), params={"learning_rate": rate, "lora_r": rank},
        eval_loss=loss, cost=Cost(seconds, 0.0, seconds),
        **{"step": 10, "planned_steps": 10, "result": RESULT, **given},
    )  # fmt: skip


# Slot 1 was committed first, slot 2 is the best, slot 3 was begun again and is at work.
OVERVIEW = Overview(
    "s",
    "/out",
    make_identity(JOB_SWEEP_FILE=SWEEP),
    (
        _trial(0, 2.0, 1e-5, gpu_seconds=1800.0, wasted_gpu_seconds=900.0, committed_at="2"),
        _trial(
            1, 2.2, 1e-4, gpu_seconds=1800.0, committed_at="1",
            curve=((0, 2.5), (1, 2.4), (10, 2.2)), peak_memory_bytes=11_800_000_000,
        ),
        _trial(2, 1.75, 1e-3, rank=16, adapter_key="a", gpu_seconds=3600.0, committed_at="3"),
        _trial(
            3, 2.1, 1e-4, state="running", step=4, generation=1, lease_age_seconds=90.0, node="n",
        ),
    ),
)  # fmt: skip


def _shown(table: RenderableType) -> list[str]:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def _drawn(drawing: str) -> ElementTree.Element:
    return ElementTree.fromstring(drawing)  # noqa: S314  # our own


def _marks(drawing: str, css: str) -> list[ElementTree.Element]:
    return [mark for mark in _drawn(drawing) if mark.get("class") == css]


def _points(mark: ElementTree.Element) -> list[tuple[float, float]]:
    return [
        (float(x), float(y)) for x, y in re.findall(r"([\d.]+),([\d.]+)", mark.get("points", ""))
    ]


def test_the_summary_counts_and_prices_what_was_spent() -> None:
    lines = markdown(OVERVIEW, usd_per_hour=0.5).splitlines()
    for fact in (
        "committed: **3 of 4**",
        "best eval/loss: **1.7500**",
        "untuned eval/loss: **2.5000**",
        "of GPU: **2.0 h**",
        "of it wasted: **12%**",
        "spent: **$1.00**",
    ):
        assert f"- {fact}" in lines
    assert any(
        line.startswith("| 1 | completed | 2.2000 |") and "| 11.8 |" in line for line in lines
    )


def test_a_pipe_in_a_value_makes_no_further_column() -> None:
    view = SlotView(0, "running", params={"schedule": "a|b"})
    text = markdown(Overview("s", "/out", None, (view,)), usd_per_hour=None)
    assert "| a\\|b |" in text


def test_the_page_marks_the_best_row_alone() -> None:
    rows = html_page(OVERVIEW, usd_per_hour=None).partition("<tbody>")[2].split("<tr")[1:]
    best = [number for number, row in enumerate(rows) if "best" in row.partition(">")[0]]
    assert best == [2]


def test_the_table_marks_the_best_and_shows_a_lease_only_while_it_counts() -> None:
    rows = {line.split()[0]: line for line in _shown(slot_table(OVERVIEW)) if line[:6].strip()}
    assert [slot for slot, line in rows.items() if "best" in line] == ["2"]
    assert "redo 1" in rows["3"]
    assert "90 s ago" in rows["3"]
    assert "4/10" in rows["3"]
    assert "ago" not in rows["0"]


def test_samples_are_the_numbers_of_the_sweep() -> None:
    lines = to_prometheus(OVERVIEW).splitlines()
    for line in (
        'qlora_sweep_trials{sweep="s",state="completed"} 3',
        'qlora_sweep_best_eval_loss{sweep="s"} 1.75',
        'qlora_sweep_gpu_seconds_total{sweep="s"} 7200',
        'qlora_sweep_wasted_gpu_seconds_total{sweep="s"} 900',
        'qlora_sweep_slot_step{sweep="s",slot="3"} 4',
        'qlora_sweep_slot_lease_age_seconds{sweep="s",slot="3"} 90',
    ):
        assert line in lines


def test_best_so_far_never_rises_and_follows_the_commits() -> None:
    drawing = charts.best_so_far(OVERVIEW)
    (stairs,) = _marks(drawing, "best")
    heights = [y for _, y in _points(stairs)]
    assert heights == sorted(heights), "pixels count downwards"
    assert len(set(heights)) == 3, "slots 1, 0 and 2, each better than before"
    (winner,) = _marks(drawing, "winner")
    assert winner[0].text == "slot 2 (completed), eval/loss 1.7500: learning_rate 1e-3, lora_r 16"


def test_wasted_time_stands_on_the_time_that_counted() -> None:
    drawing = charts.gpu_time(OVERVIEW)
    waste, fill = (
        next({k: float(v) for k, v in bar.items() if k != "class"} for bar in _marks(drawing, css))
        for css in ("waste", "fill")
    )
    assert waste["height"] == pytest.approx(fill["height"], abs=0.2), "half of slot 0 was wasted"
    assert waste["height"] > 20
    assert waste["y"] + waste["height"] == pytest.approx(fill["y"], abs=0.2)


def test_a_line_of_all_parameters_goes_through_a_trials_values() -> None:
    drawing = charts.parallel_coordinates(OVERVIEW)
    (best,) = _marks(drawing, "best")
    (_, rate), (_, rank), (_, loss) = _points(best)
    top, bottom = (y for _, y in _points(_marks(drawing, "axis")[0]))
    assert (rate, rank) == (top, top), "its rate and its rank are the highest"
    assert loss == bottom, "and its loss the lowest"
    assert _drawn(drawing)[-1].get("class") == "best", "on top"


@pytest.mark.parametrize(
    ("domain", "value", "place"),
    [
        (FloatRange(1e-5, 1e-3, log=True), 1e-4, 0.5),
        (FloatRange(0, 10), 2.5, 0.25),
        (FloatRange(0, 10), 11, 1),
        (FloatRange(0, 10), -1, 0),
        (Choice((8, 16, 32)), 16, 0.5),
    ],
)
def test_a_value_has_its_place_in_its_range(domain: Any, value: float, place: float) -> None:
    assert charts.share(domain, value) == pytest.approx(place)


def _untuned(*trials: tuple[str, float | None, float | None], rows: int | None = 192) -> Overview:
    """Trials of a `quantization`, an eval/loss at step 0, and one in 16 bits beside it."""
    views = []
    for slot, (mode, start, in_16) in enumerate(trials):
        curve: Any = ((9, 1.2),) if start is None else ((0, start), (9, 1.2))
        result = make_result(quantization=mode, untuned_16bit=in_16, eval_rows=rows)
        views.append(_trial(slot, 1.2, 1e-4, curve=curve, result=result))
    return Overview("s", "/out", make_identity(JOB_SWEEP_FILE=SWEEP), tuple(views))


PRICE = "4 bits cost the untuned base 0.267 nats on these 192 rows (1.594 against 1.327)"
FOUR, BESIDE = ("nf4", 1.594, None), ("nf4", 1.594, 1.327)
SOME, WHOLE = ("mixed:down_proj", 1.469, None), ("none", 1.327, None)


@pytest.mark.parametrize(
    ("trials", "told"),
    [
        ((FOUR, ("none", None, None)), []),
        ((FOUR, SOME), []),
        ((WHOLE,), []),
        ((FOUR, WHOLE), [PRICE]),
        ((BESIDE, ("nf4", None, None)), [PRICE]),
        (
            (SOME, FOUR, WHOLE),
            [
                PRICE,
                (
                    "4 bits, down_proj in 16 bits, cost the untuned base 0.142 nats on these"
                    " 192 rows (1.469 against 1.327)"
                ),
            ],
        ),
    ],
)
def test_the_price_of_4_bits_is_told_where_16_were_measured(trials: Any, told: list[str]) -> None:
    overview = _untuned(*trials)
    assert [note for note in findings(overview) if "cost the untuned base" in note] == told
    content = json.loads(to_json(overview))["untuned"]
    assert content["price_of_4_bits"] == told
    assert content["eval_loss"].get("none") == (1.327 if told or trials == (WHOLE,) else None)
    page = markdown(overview, usd_per_hour=None)
    assert ("- untuned, 4 bits: **1.5940**" in page) == (len(content["eval_loss"]) > 1)


def test_a_bucket_that_says_no_number_of_rows_is_told_without(tmp_path: Path) -> None:
    (told,) = _untuned(BESIDE, rows=None).prices_of_4_bits
    assert told.startswith("4 bits cost the untuned base 0.267 nats on the held-out rows (1.594")


def test_a_price_that_rounds_to_nothing_has_no_sign() -> None:
    (told,) = _untuned(("nf4", 1.3268, 1.327)).prices_of_4_bits
    assert told.startswith("4 bits cost the untuned base 0.000 nats")
    (told,) = _untuned(("nf4", 1.325, 1.327)).prices_of_4_bits
    assert told.startswith("4 bits cost the untuned base -0.002 nats"), (
        "16 bits are not always better"
    )


def test_trials_that_broke_are_told_with_the_way_out() -> None:
    views = [
        _trial(0, 2.0, 1e-4),
        SlotView(1, "given up", "10 attempts in a row ended"),
        SlotView(2, "infeasible", "one sample alone does not fit"),
        SlotView(3, "diverged", "loss at step 5"),
    ]
    notes = findings(Overview("s", "/out", make_identity(JOB_SWEEP_FILE=SWEEP), tuple(views)))
    assert notes[0] == "slot 1 is given up: 10 attempts in a row ended; `job redo 1` begins it anew"
    assert "1 of 3 trials could not run: one sample alone does not fit" in notes
    assert any(note.startswith("1 of 3 trials diverged: lower") for note in notes)
    assert "<code>job redo 1</code> begins" in html_page(
        Overview("s", "/out", None, tuple(views)), usd_per_hour=None
    )


def test_what_best_prints_is_where_the_adapter_is() -> None:
    assert OVERVIEW.best is not None
    told = describe_best(OVERVIEW, OVERVIEW.best)
    assert (told["slot"], told["adapter"], told["eval_loss"]) == (2, "/out/a", 1.75)


def _at_work(folder: Path) -> Ledger:
    """A slot whose first attempt ended and whose second one is at work."""
    ledger = Ledger(LocalStore(folder), "s")
    ledger.slot(0).specify(make_spec())
    for step in (3, 7):
        lease = acquire(ledger, [0], lease_seconds=60, should_stop=lambda: None)
        assert lease is not None
        lease.open_account()
        lease.report(first_step=0, step=step, gpu_seconds=50.0 * step)
        lease.renew()
        if step == 3:
            lease.release()
    return ledger


def test_every_attempt_is_a_line_with_its_end(tmp_path: Path) -> None:
    lines = _shown(attempts_table(_at_work(tmp_path), 1))
    (first,), (second,) = ([line for line in lines if line.split()[:2] == ["0", n]] for n in "12")
    assert "0-3" in first
    assert "150" in first
    assert "running" not in first
    assert len(re.findall(r"\d\d:\d\d:\d\d", first)) == 2, "from and to"
    assert "0-7" in second
    assert "running" in second


def test_a_holder_is_shown_while_it_holds_and_no_clock_runs_backwards(tmp_path: Path) -> None:
    ledger, now = _at_work(tmp_path), datetime.now(UTC)
    (ahead,) = read_overview(ledger, 1, now=now - timedelta(hours=1)).slots
    assert ahead.lease_age_seconds == 0, "another machine's clock is ahead"
    (view,) = read_overview(ledger, 1, now=now + timedelta(hours=1)).slots
    assert view.lease_age_seconds == pytest.approx(3600, abs=30)
    assert view.node
    assert view.gpu_seconds == pytest.approx(500)
    assert view.wasted_gpu_seconds == pytest.approx(150), "the first attempt saved nothing"
    stored = ledger.slot(0).lease()
    assert stored is not None
    ledger.slot(0).swap_lease(stored.lease.changed(state="released"), stored.version)
    (waiting,) = read_overview(ledger, 1).slots
    assert (waiting.state, waiting.node, waiting.lease_age_seconds) == ("waiting", None, None)


def _ended(min_gain: float = 1e-3, **changes: Any) -> Ended:
    values = {"gain": 3e-4, "gain_before": 5e-4, "results": 7, "trial_gpu_seconds": 8640.0}
    return Ended(**values | {"min_gain": min_gain} | changes)


def test_an_ended_sweep_says_gain_price_and_the_way_on() -> None:
    ended = replace(OVERVIEW, ended=_ended())
    (line,) = gain_lines(ended, outlook_of(ended), min_gain=1e-3, usd_per_hour=0.35)
    assert line == (
        "the sweep ended after 7 results: another one was expected to gain 0.0003 nats of eval/loss"
        " (0.0005 nats before the last result, the limit is 0.001), for 2.4 GPU-hours ($0.84 at"
        " $0.35 an hour); JOB_MIN_GAIN=0 goes on"
    )
    overruled = gain_lines(ended, outlook_of(ended), min_gain=0, usd_per_hour=None)
    assert not any("ended" in words for words in overruled)
    unpriced = replace(OVERVIEW, ended=_ended(trial_gpu_seconds=None))
    (line,) = gain_lines(unpriced, outlook_of(unpriced), min_gain=1e-3, usd_per_hour=0.35)
    assert "the limit is 0.001); JOB_MIN_GAIN=0" in line


def test_a_price_says_nothing_of_seconds() -> None:
    assert price(3.0, 0.35) == "under 0.001 GPU-hours (under a cent at $0.35 an hour)"
    assert price(3.0, 0.35, paid_usd=0.001) == "under 0.001 GPU-hours (under a cent)"
    assert price(7920, None) == "2.2 GPU-hours"
    assert (nats(0.00312), nats(0.0)) == ("0.0031 nats", "0 nats")


def _paid(hours: float, hourly_usd: float | None, **given: Any) -> SlotView:
    seconds = 3600 * hours
    priced = (
        Cost(seconds, 0.0, seconds) if hourly_usd is None else Cost(seconds, hours * hourly_usd)
    )
    view = _trial(0, 1.8, 1e-4, trial_cost=priced, result=make_result(gpu_seconds=seconds), **given)
    return replace(view, cost=priced + Cost(36000, 9e3))  # before a redo it was dear


@pytest.mark.parametrize("own", [None, 5.0])
def test_the_price_of_a_trial_is_what_was_paid_for_it(own: float | None) -> None:
    """Whatever an hour costs where one looks; of three the median, of dollars and of hours."""
    trials = (_paid(6, 0.35), _paid(1, 1000), _paid(2, 0.5), _paid(9, 7, state="excluded"))
    overview = replace(OVERVIEW, slots=trials, ended=_ended(trial_gpu_seconds=3600.0))
    assert "- price of a trial: **2 GPU-hours ($2.10)**" in markdown(overview, usd_per_hour=own)
    assert json.loads(to_json(overview, own))["trial_usd"] == 2.1
    (line,) = gain_lines(overview, outlook_of(overview), min_gain=1e-3, usd_per_hour=own)
    assert "for 1 GPU-hours ($1.05); " in line, "as of the end, at the same dollars an hour"
    goes_on = replace(outlook_of(overview), gain=0.0031)
    assert goes_on.words(own) == "0.0031 nats for 2 GPU-hours ($2.10)"


def test_where_an_account_tells_no_price_a_trial_has_the_readers() -> None:
    overview = replace(OVERVIEW, slots=(_paid(2, 1000), _paid(2, None)))
    page = markdown(overview, usd_per_hour=5)
    assert "- price of a trial: **2 GPU-hours ($10.00 at $5.00 an hour)**" in page
    assert json.loads(to_json(overview, 5))["trial_usd"] == 10
    assert "- price of a trial: **2 GPU-hours**" in markdown(overview, usd_per_hour=None)
    assert json.loads(to_json(overview, None))["trial_usd"] is None


def test_the_gain_falls_from_left_to_right_with_the_limit_as_a_line() -> None:
    drawing = charts.expected_gain([(5, 0.02), (6, 0.004), (7, 0.0)], 1e-3)
    (line,) = _marks(drawing, "best")
    heights = [y for _, y in _points(line)]
    assert heights == sorted(heights), "pixels count downwards"
    (limit,) = _marks(drawing, "limit")
    assert heights[1] < _points(limit)[0][1] < heights[2]
    assert "after 7 results: 0 nats" in drawing
    assert not _marks(charts.expected_gain([(5, 0.02)], 0.0), "limit"), "switched off"
    assert charts.expected_gain([], 1e-3) == ""


def test_the_page_is_told_of_the_slots_what_the_engine_is_told(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    for number, status in enumerate(["completed", "diverged", "truncated", "completed"]):
        slot = ledger.slot(number)
        slot.specify(make_spec(params={"learning_rate": 1e-4 * (number + 1)}))
        curve = ((0, 2.0), (9, 1.5)) if number == 0 else ()
        slot.commit(make_result(slot.folder, status=status, eval_loss=1.5 - number, curve=curve))
    ledger.slot(3).exclude("its rows were wrong")
    ledger.slot(4).specify(make_spec(params={"learning_rate": 1e-5}))
    ledger.slot(5).specify(make_spec())
    ledger.slot(5).give_up("no progress")
    told, _ = observe(ledger, 7)
    assert observations(read_overview(ledger, 7)) == told


def test_a_worker_of_several_is_told_behind_its_nodes_name(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    opening = AttemptProgress(worker=2, hourly_usd=0.5)
    lease = acquire(ledger, [0], lease_seconds=60, should_stop=lambda: None, opening=opening)
    assert lease is not None
    lease.slot.specify(make_spec())
    lease.open_account()
    lease.report(node="kaggle-1", gpu="Tesla T4", gpu_seconds=7200.0)
    lease.renew()
    overview = read_overview(ledger, 1)
    assert overview.slots[0].node == "kaggle-1 [2]"
    assert overview.slots[0].gpu == "Tesla T4"
    assert "kaggle-1 [2]" in "".join(_shown(attempts_table(ledger, 1)))
    assert 'qlora_sweep_spent_usd_total{sweep="s"} 1\n' in to_prometheus(overview)
    page = markdown(overview, usd_per_hour=None, budget_usd=4)
    assert "- spent: **$1.00**" in page
    assert "> spent: $1.00 of $4.00 (JOB_SWEEP_BUDGET_USD): $1.00 on kaggle-1\n" in page


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0.0, "$0.00"), (4.9e-5, "under $0.0001"), (1e-4, "$0.0001"), (0.0049, "$0.0049"),
     (0.01, "$0.01"), (4.125, "$4.12"), (12345.6, "$12,345.60")],
)  # fmt: skip
def test_dollars_are_read_at_a_glance(amount: float, text: str) -> None:
    assert dollars(amount) == text
