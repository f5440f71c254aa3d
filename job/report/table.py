"""The slots of a sweep for a terminal, for a program (JSON), and for Prometheus."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Group
from rich.table import Table

from job.report import costs
from job.report.comparison import comparison_json
from job.report.gain import outlook_of
from job.report.notation import duration, plain, short_name
from job.report.overview import COMMITTED, Overview, SlotView

# Renewals come every third of JOB_LEASE_SECONDS, and clocks of two machines may differ a little.
STUCK_LEASES = 3
_Column = tuple[str, list[str]]  # a name, and a cell of each slot
# The columns that a narrow terminal leaves out: the first set, else the second, else the third.
_DROPPED = (
    frozenset({"lease"}),
    frozenset({"lease", "attempts", "GPU"}),
    frozenset({"lease", "attempts", "GPU", "node"}),
)
_PROMETHEUS = (
    ("trials", "gauge", "Slots of the sweep by state."),
    ("best_eval_loss", "gauge", "Lowest eval/loss of a committed trial."),
    ("expected_gain_nats", "gauge", "Nats of eval/loss that another trial is expected to gain."),
    ("gpu_seconds_total", "counter", "GPU-seconds of all attempts."),
    (
        "wasted_gpu_seconds_total",
        "counter",
        "GPU-seconds spent on steps done twice, restarts and waiting.",
    ),
    ("spent_usd_total", "counter", "Dollars for the GPU time of all attempts."),
    ("slot_step", "gauge", "Optimizer steps done in a slot."),
    ("slot_eval_loss", "gauge", "eval/loss of a slot's last known evaluation."),
    ("slot_attempts_total", "counter", "Attempts at a slot."),
    ("slot_lease_age_seconds", "gauge", "Seconds since the holder last renewed a slot's lease."),
)


def slot_table(overview: Overview, width: int | None = None) -> Group:
    """The slots as a table, the best one marked; columns that say nothing are left out.

    What does not fit `width` goes whole, never cut: the lease's age first, then the cost. If the
    parameters leave no room for what changes, they get a table of their own below it.
    """
    views = overview.slots
    names = list(dict.fromkeys(name for view in views for name in view.params))
    params = [
        (short_name(name), [plain(view.params.get(name)) for view in views]) for name in names
    ]
    slot: _Column = ("slot", [str(view.slot) for view in views])
    progress: list[_Column] = [
        ("state", [view.state for view in views]),
        ("steps", [_steps(v) for v in views]),
    ]
    rest: list[_Column] = [
        ("eval/loss", [_form(view.eval_loss, "{:.4f}") for view in views]),
        ("tokens/s", [_form(view.tokens_per_second, "{:.0f}") for view in views]),
        ("attempts", [str(view.attempts or "") for view in views]),
        ("GPU", [duration(view.gpu_seconds) if view.gpu_seconds else "" for view in views]),
        ("node", [view.node or "" for view in views]),
        ("lease", [_lease(view) for view in views]),
        ("", [_note(overview, view) for view in views]),
    ]
    one = _fitting([slot, *progress, *params, *rest], width)
    if one is not None or not params:
        return Group(_table(one or [slot, *progress, *rest[:2]]))
    # Below 65 columns not even `few` fits; then cells are folded.
    few = _fitting([slot, *progress, *rest], width) or [slot, *progress, *rest[:2]]
    drawn = [number for number, view in enumerate(views) if view.params]
    below = [(name, [cells[number] for number in drawn]) for name, cells in [slot, *params]]
    return Group(_table(few), _table(below))


def _fitting(columns: list[_Column], width: int | None) -> list[_Column] | None:
    """The columns that say something, less as many of `_DROPPED` as it takes; None: too many."""
    shown = [(name, cells) for name, cells in columns if any(cells)]
    for names in (frozenset[str](), *_DROPPED):
        left = [(name, cells) for name, cells in shown if name not in names]
        # box.SIMPLE puts three blanks between two columns, and two at either side.
        taken = 1 + sum(max(map(cell_len, [name, *cells])) + 3 for name, cells in left)
        if width is None or taken <= width:
            return left
    return None


def _table(columns: list[_Column]) -> Table:
    table = Table(box=box.SIMPLE)
    for name, _ in columns:
        is_text = name in ("state", "node", "")
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*row)
    return table


def stuck_slots(overview: Overview, *, lease_seconds: float) -> list[str]:
    """A line for each slot whose holder went silent, with the command that is safe to run."""
    return [
        f"slot {view.slot}: {view.node or 'its holder'} has not renewed the lease for"
        f" {duration(view.lease_age_seconds)}. Another attempt takes it over by itself; if the pod"
        " hangs in Terminating and its machine is gone, find its NODE with"
        f" kubectl get pods -o wide -l batch.kubernetes.io/job-completion-index={view.slot} and"
        " kubectl taint nodes NODE node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"
        for view in overview.slots
        if view.lease_age_seconds is not None
        and view.lease_age_seconds > STUCK_LEASES * lease_seconds
    ]


def to_json(
    overview: Overview,
    usd_per_hour: float | None = None,
    *,
    attempts: list[dict[str, Any]] | None = None,
) -> str:
    """The sweep as a JSON object: its numbers, every slot, and every attempt where asked for."""
    best, outlook = overview.best, outlook_of(overview)
    content = {
        "sweep": overview.sweep,
        "uri": overview.uri,
        "base_model": overview.base_model,
        "best_slot": best.slot if best else None,
        "gpu_seconds": round(overview.gpu_seconds, 1),
        "wasted_gpu_seconds": round(overview.wasted_gpu_seconds, 1),
        "usd": _usd(overview, usd_per_hour),
        "usd_by_place": costs.by_place(overview, usd_per_hour),
        "usd_wasted_by_cause": costs.wasted_by_cause(overview, usd_per_hour),
        "expected_gain_nats": outlook.gain,
        "trial_gpu_seconds": outlook.trial_gpu_seconds,
        "trial_usd": outlook.trial_usd(usd_per_hour),
        "ended": overview.ended.to_json() if overview.ended else None,
        "untuned": {
            "num_rows": overview.eval_rows,
            "eval_loss": overview.untuned,
            "price_of_4_bits": overview.prices_of_4_bits,
        },
        "merges": {str(slot): losses.to_json() for slot, losses in overview.merges.items()},
        "comparison": comparison_json(overview),
        "slots": [_as_dict(view) for view in overview.slots],
        **({} if attempts is None else {"attempts": attempts}),
    }
    return json.dumps(content, indent=1)


def to_prometheus(overview: Overview, usd_per_hour: float | None = None) -> str:
    """The text that node_exporter's textfile collector reads, a family of samples after another."""
    samples: dict[str, list[tuple[dict[str, str], float]]] = {name: [] for name, *_ in _PROMETHEUS}
    for state, count in sorted(Counter(view.state for view in overview.slots).items()):
        samples["trials"].append(({"state": state}, count))
    if (best := overview.best) is not None and best.eval_loss is not None:
        samples["best_eval_loss"].append(({}, best.eval_loss))
    if (gain := outlook_of(overview).gain) is not None:
        samples["expected_gain_nats"].append(({}, gain))
    samples["gpu_seconds_total"].append(({}, overview.gpu_seconds))
    samples["wasted_gpu_seconds_total"].append(({}, overview.wasted_gpu_seconds))
    if (usd := _usd(overview, usd_per_hour)) is not None:
        samples["spent_usd_total"].append(({}, usd))
    for view in overview.slots:
        for name, value in (
            ("slot_step", view.step),
            ("slot_eval_loss", view.eval_loss),
            ("slot_attempts_total", view.attempts or None),
            ("slot_lease_age_seconds", view.lease_age_seconds),
        ):
            if value is not None:
                samples[name].append(({"slot": str(view.slot)}, value))
    return "".join(_families(overview.sweep, samples))


def _usd(overview: Overview, usd_per_hour: float | None) -> float | None:
    """The sweep's cost in dollars, where a price is known."""
    if not costs.is_priced(overview, usd_per_hour):
        return None
    return round(overview.cost.dollars(usd_per_hour), 4)


def _families(sweep: str, samples: dict[str, list[tuple[dict[str, str], float]]]) -> Iterator[str]:
    for name, kind, meaning in _PROMETHEUS:
        if samples[name]:
            yield f"# HELP qlora_sweep_{name} {meaning}\n# TYPE qlora_sweep_{name} {kind}\n"
        for labels, value in samples[name]:
            pairs = ",".join(f'{key}="{text}"' for key, text in {"sweep": sweep, **labels}.items())
            yield f"qlora_sweep_{name}{{{pairs}}} {value:.10g}\n"


def _as_dict(view: SlotView) -> dict[str, Any]:
    left_out = ("result", "curve", "wandb_sweep", "cost", "trial_cost", "charges", "gpu")
    shown = {key: value for key, value in vars(view).items() if key not in left_out}
    return {
        **shown,
        "gpu_seconds": view.gpu_seconds,
        "params": dict(view.params),
        "curve": [list(point) for point in view.curve],
    }


def _note(overview: Overview, view: SlotView) -> str:
    redone = f"redo {view.generation}" if view.generation else ""
    return " ".join(word for word in ("best" if view is overview.best else "", redone) if word)


def _steps(view: SlotView) -> str:
    return "" if view.step is None else f"{view.step}/{view.planned_steps}"


def _lease(view: SlotView) -> str:
    age = view.lease_age_seconds
    return "" if age is None or view.state in COMMITTED else f"{duration(age)} ago"


def _form(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
