"""`job report`: a sweep as one self-contained HTML page, and as a Markdown summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from job.report import charts, costs
from job.report.answers import answers_view
from job.report.comparison import in_millinats, recommendation
from job.report.costs import cost_lines
from job.report.findings import findings
from job.report.gain import Outlook, gain_lines, gains, outlook_of
from job.report.importance import WEAK_BELOW_TRIALS, importances
from job.report.notation import duration, number, short_name
from job.report.overview import COMMITTED, Overview, SlotView
from job.settings import Settings
from job.training.quantization import in_short
from job.trial.end import nats

DEFAULT_MIN_GAIN: float = Settings.model_fields["min_gain"].default
Facts = list[tuple[str, str]]

DOWNLOAD = "job best --download adapter"
# Loads the adapter that DOWNLOAD fetched.
LOAD_SNIPPET = """\
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("adapter", device_map="auto")"""


@dataclass(frozen=True)
class Cell:
    """A cell of the table: its text, and the key that it is sorted by; empty keys come last."""

    text: str
    key: str


@dataclass(frozen=True)
class TableRow:
    """A slot's row in the table."""

    cells: list[Cell]
    is_best: bool
    slot: int
    name: str  # the trial in a line


def html_page(
    overview: Overview,
    *,
    usd_per_hour: float | None,
    budget_usd: float | None = None,
    min_gain: float = DEFAULT_MIN_GAIN,
) -> str:
    """The report as an HTML page that fetches nothing, so that it can be mailed or put anywhere."""
    # Jinja escapes whatever the bucket holds; the drawings escape their own words.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    columns, rows = _table(overview)
    outlook = outlook_of(overview)
    return environment.get_template("page.html.j2").render(
        overview=overview,
        made_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        facts=_facts(overview, outlook, usd_per_hour),
        states=_states(overview),
        notes=[
            _code(note) for note in _notes(overview, outlook, usd_per_hour, budget_usd, min_gain)
        ],
        best=overview.best,
        recommendation=_code(_sentence(recommendation(overview) or "")),
        answers=answers_view(overview.answers),
        download=DOWNLOAD,
        snippet=LOAD_SNIPPET,
        charts=_charts(overview, min_gain),
        columns=columns,
        rows=rows,
    )


def markdown(
    overview: Overview,
    *,
    usd_per_hour: float | None,
    budget_usd: float | None = None,
    min_gain: float = DEFAULT_MIN_GAIN,
) -> str:
    """The report in short, as Markdown for a pull request or a chat."""
    outlook = outlook_of(overview)
    lines = [f"# Sweep {overview.sweep}", "", f"{overview.base_model}, `{overview.uri}`"]
    lines += [_states(overview), ""]
    lines += [f"- {name}: **{value}**" for name, value in _facts(overview, outlook, usd_per_hour)]
    notes = _notes(overview, outlook, usd_per_hour, budget_usd, min_gain)
    lines += ["", *(f"> {note}" for note in notes)]
    if (best := overview.best) is not None:
        lines += ["", f"Best: slot {best.slot}, eval/loss {best.eval_loss:.4f}"]
        if (advice := recommendation(overview)) is not None:
            lines += ["", _sentence(advice)]
        lines += ["", "```", DOWNLOAD, "```", "", "```python", LOAD_SNIPPET, "```"]
    if (answers := answers_view(overview.answers)) is not None and answers.match:
        lines += ["", f"Answers that match ({answers.match}), with 95 % intervals:", ""]
        lines += [
            f"- {name}: {score}" for name, score in zip(answers.models, answers.scores, strict=True)
        ]
    columns, rows = _table(overview)
    lines += ["", _pipes(columns), _pipes(["---"] * len(columns))]
    lines += [_pipes([cell.text for cell in row.cells]) for row in rows]
    return "\n".join(lines) + "\n"


def _notes(
    overview: Overview,
    outlook: Outlook,
    usd_per_hour: float | None,
    budget_usd: float | None,
    min_gain: float,
) -> list[str]:
    """What a person should know beside the numbers: findings, money, and whether to go on."""
    money = cost_lines(overview, usd_per_hour, budget_usd)
    told = gain_lines(overview, outlook, min_gain=min_gain, usd_per_hour=usd_per_hour)
    return [*findings(overview), *money, *told]


def _facts(overview: Overview, outlook: Outlook, usd_per_hour: float | None) -> Facts:
    committed = sum(view.state in COMMITTED for view in overview.slots)
    facts = [("committed", f"{committed} of {len(overview.slots)}")]
    if (best := overview.best) is not None:
        facts.append(("best eval/loss", f"{best.eval_loss:.4f}"))
    untuned = overview.untuned
    for mode, loss in sorted(untuned.items(), reverse=True):
        name = f"untuned, {in_short(mode)}" if len(untuned) > 1 else "untuned eval/loss"
        facts.append((name, f"{loss:.4f}"))
    spent, wasted = overview.gpu_seconds, overview.wasted_gpu_seconds
    facts.append(("of GPU", duration(spent)))
    if spent:
        facts.append(("of it wasted", f"{wasted / spent:.0%}"))
    if costs.is_priced(overview, usd_per_hour):
        facts.append(("spent", costs.spent(overview, usd_per_hour)))
    if outlook.gain is not None:
        facts.append(("expected of another trial", nats(outlook.gain)))
    if (told := outlook.price(usd_per_hour)) is not None:
        facts.append(("price of a trial", told))
    return facts


def _states(overview: Overview) -> str:
    counts = Counter(view.state for view in overview.slots)
    return ", ".join(f"{count} {state}" for state, count in counts.most_common())


def _charts(overview: Overview, min_gain: float) -> list[tuple[str, str, str]]:
    found = importances(overview)
    weak = sum(view.judged for view in overview.slots) < WEAK_BELOW_TRIALS
    drawn = [
        ("Best so far", "Trials in the order of their commits.", charts.best_so_far(overview)),
        (
            "Expected gain of the next trial",
            "How much another trial was expected to lower eval/loss. Dashed: JOB_MIN_GAIN.",
            charts.expected_gain(gains(overview), min_gain),
        ),
        (
            "Learning rate",
            "Dashed: the range that was searched; shaded: its outer tenths.",
            charts.learning_rate(overview),
        ),
        (
            "Told apart or not",
            "On the same rows; 95 % for all together. What crosses the dashed line is tied.",
            charts.intervals(overview),
        ),
        ("Loss curves", "The best trial is highlighted.", charts.loss_curves(overview)),
        (
            "All parameters",
            "A line a trial; where lines of low loss meet is a good value.",
            charts.parallel_coordinates(overview),
        ),
        (
            "Importance" + (" (weak evidence)" if weak else ""),
            "Share of eval/loss's ranks that the parameter alone explains"
            + (f"; below {WEAK_BELOW_TRIALS} trials this can be chance." if weak else "."),
            charts.importance_bars(found),
        ),
        (
            "GPU time",
            "Yellow: lost to preemptions, restarts and waiting.",
            charts.gpu_time(overview),
        ),
    ]
    return [entry for entry in drawn if entry[2]]


def _table(overview: Overview) -> tuple[list[str], list[TableRow]]:
    names = list(dict.fromkeys(name for view in overview.slots for name in view.params))
    columns = [
        "slot",
        "state",
        "eval/loss",
        *map(short_name, names),
        "steps",
        "best step",
        "tokens/s",
    ]
    columns += ["peak GB", "attempts", "GPU time", "wasted"]
    rows = [
        TableRow(_cells(view, names), view is overview.best, view.slot, charts.describe(view))
        for view in overview.slots
    ]
    if (found := overview.comparison) is not None:
        columns.insert(3, "mnat behind")
        for view, row in zip(overview.slots, rows, strict=True):
            behind = found.behind.get(view.slot)
            shown = (
                Cell(in_millinats(behind).removesuffix(" mnat"), repr(behind.estimate))
                if behind
                else Cell("", "")
            )
            row.cells.insert(3, shown)
    return columns, rows


def _cells(view: SlotView, names: list[str]) -> list[Cell]:
    params: Mapping[str, Any] = view.params
    peak = view.peak_memory_bytes / 1e9 if view.peak_memory_bytes else None
    steps = "" if view.step is None else f"{view.step}/{view.planned_steps}"
    drawn = view.state != "empty"
    return [
        Cell(str(view.slot), str(view.slot)),
        Cell(view.state, view.state),
        _number(view.eval_loss, "{:.4f}"),
        *(_value(params.get(name)) for name in names),
        Cell(steps, "" if view.step is None else str(view.step)),
        _number(view.best_step, "{:d}"),
        _number(view.tokens_per_second, "{:.0f}"),
        _number(peak, "{:.1f}"),
        _number(view.attempts if drawn else None, "{:d}"),
        _seconds(view.gpu_seconds if drawn else None),
        _seconds(view.wasted_gpu_seconds if drawn else None),
    ]


def _value(value: object) -> Cell:
    if value is None:
        return Cell("", "")
    if isinstance(value, int | float):
        return Cell(number(value), repr(float(value)))
    return Cell(str(value), str(value))


def _number(value: float | None, form: str) -> Cell:
    return Cell("", "") if value is None else Cell(form.format(value), repr(value))


def _seconds(value: float | None) -> Cell:
    return Cell("", "") if value is None else Cell(duration(value), repr(value))


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}." if words else ""


def _code(note: str) -> Markup:
    """Mark what stands between backticks as code."""
    parts = note.split("`")
    return Markup().join(
        Markup("<code>{}</code>").format(part) if number % 2 else part
        for number, part in enumerate(parts)
    )


def _pipes(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
