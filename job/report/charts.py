"""The report's charts as SVG, each from an overview; empty where there is nothing to draw."""

from __future__ import annotations

import math
from itertools import pairwise

from job.report import svg
from job.report.importance import Importance, searched
from job.report.notation import duration, number, plain, short_name
from job.report.overview import Overview, SlotView
from job.sweep.distributions import Choice, Distribution, FloatRange, IntRange, SteppedFloats

EDGE_SHARE = 0.1  # a best trial in the outer tenth of the range asks for a wider one


def best_so_far(overview: Overview) -> str:
    """Draw every committed trial in the order of commits, and the best loss until then."""
    shown = [view for view in overview.slots if view.judged]
    judged = sorted(shown, key=lambda view: (view.committed_at or "", view.slot))
    if not judged:
        return ""
    losses = [view.eval_loss or 0.0 for view in judged]
    lowest = [min(losses[: count + 1]) for count in range(len(losses))]
    x = svg.x_scale([1, max(2, len(losses))], whole=True)
    y = svg.y_scale(losses)
    steps = [(x(k + 1), y(low)) for k, low in enumerate(lowest)]
    stairs = [steps[0]]
    for (_, before), (right, after) in pairwise(steps):
        stairs += [(right, before), (right, after)]
    marks = [*svg.axes(x, y, "committed trials", "eval/loss"), svg.line(stairs, "best")]
    for count, view in enumerate(judged, 1):
        marks.append(_trial_dot(overview, view, x(count), y(view.eval_loss or 0.0)))
    return svg.chart("best eval/loss so far", marks)


def expected_gain(gains: list[tuple[int, float]], min_gain: float) -> str:
    """Draw the expected gain of the next trial by the number of results, on a log scale."""
    if not gains:
        return ""
    floor = (min_gain or 1e-3) / 100  # a gain of nothing has no logarithm
    shown = [max(floor, gain) for _, gain in gains]
    x = svg.x_scale([gains[0][0], max(gains[0][0] + 1, gains[-1][0])], whole=True)
    lines = [min_gain] if min_gain else []
    y = svg.y_scale([*shown, *lines], log=True)
    marks = list(svg.axes(x, y, "results", "nats"))
    marks += [
        svg.line([(svg.LEFT, y(limit)), (svg.WIDTH - svg.RIGHT, y(limit))], "limit", "JOB_MIN_GAIN")
        for limit in lines
    ]
    points = [(x(count), y(height)) for (count, _), height in zip(gains, shown, strict=True)]
    marks.append(svg.line(points, "best"))
    for (across, up), (count, gain) in zip(points, gains, strict=True):
        marks.append(svg.dot(across, up, "point", f"after {count} results: {number(gain)} nats"))
    return svg.chart("expected gain of the next trial", marks)


def learning_rate(overview: Overview) -> str:
    """Draw the learning rate against eval/loss, with the edges of the range marked."""
    domain = _domain(overview, "learning_rate")
    shown = overview.comparable
    if not isinstance(domain, FloatRange) or not shown:
        return ""
    x = svg.x_scale([domain.min, domain.max], log=domain.log)
    y = svg.y_scale([view.eval_loss or 0.0 for view in shown])
    inner_low, inner_high = inner_range(domain)
    top, height = svg.TOP, svg.HEIGHT - svg.BOTTOM - svg.TOP
    tenths = [(domain.min, inner_low), (inner_high, domain.max)]
    marks = [
        svg.bar(x(a), top, width=x(b) - x(a), height=height, css="edge", tip="outer tenth")
        for a, b in tenths
    ]
    marks += svg.axes(x, y, "learning rate" + (" (log)" if domain.log else ""), "eval/loss")
    marks += [
        svg.line([(x(end), top), (x(end), top + height)], "limit", "edge of the range")
        for end in (domain.min, domain.max)
    ]
    for view in shown:
        at = x(float(view.params["learning_rate"]))
        marks.append(_trial_dot(overview, view, at, y(view.eval_loss or 0.0)))
    return svg.chart("learning rate against eval/loss", marks)


def inner_range(domain: FloatRange | IntRange) -> tuple[float, float]:
    """The range without its outer tenths, on its own scale."""
    if domain.log:
        span = math.log(domain.max / domain.min)
        return (
            domain.min * math.exp(EDGE_SHARE * span),
            domain.max * math.exp(-EDGE_SHARE * span),
        )
    span = domain.max - domain.min
    return domain.min + EDGE_SHARE * span, domain.max - EDGE_SHARE * span


def intervals(overview: Overview) -> str:
    """Draw how far every trial is behind the best, each with its interval; the best at 0."""
    found = overview.comparison
    if found is None:
        return ""
    ranked = sorted(found.behind.items(), key=lambda item: (item[1].estimate, item[0]))
    ends = [1000 * (i.estimate + sign * i.half_width) for _, i in ranked for sign in (-1, 1)]
    row, top = 22, 14
    bottom = top + row * (len(ranked) + 1)
    x = svg.x_scale([0.0, *ends])
    marks = [svg.line([(x(0), top), (x(0), bottom)], "limit", f"slot {found.best}, the best")]
    marks += [svg.text(x(value), bottom + 16, number(value), "tick") for value in x.ticks()]
    marks.append(svg.text((svg.LEFT + svg.WIDTH) / 2, bottom + 34, "mnat behind the best", "name"))
    views = {view.slot: view for view in overview.slots}
    marks.append(svg.text(svg.LEFT - 8, top + 15, f"slot {found.best}", "tick", anchor="end"))
    marks.append(_trial_dot(overview, views[found.best], x(0), top + 11))
    for place, (slot, interval) in enumerate(ranked, 1):
        y, css = top + row * (place + 0.5), "good" if interval.holds_zero else "trial"
        low, high = (1000 * (interval.estimate + s * interval.half_width) for s in (-1, 1))
        tip = describe(views[slot])
        marks.append(svg.text(svg.LEFT - 8, y + 4, f"slot {slot}", "tick", anchor="end"))
        marks.append(svg.line([(x(low), y), (x(high), y)], css, tip, slot=slot))
        marks.append(svg.dot(x(1000 * interval.estimate), y, "point", tip, slot=slot))
    return svg.chart("how far each trial is behind the best", marks, height=bottom + 42)


def loss_curves(overview: Overview) -> str:
    """Draw eval/loss by optimizer step for every committed trial."""
    shown = [view for view in overview.slots if len(view.curve) > 1]
    if not shown:
        return ""
    x = svg.x_scale([step for view in shown for step, _ in view.curve], pad=0.02, whole=True)
    y = svg.y_scale([loss for view in shown for _, loss in view.curve])
    marks = list(svg.axes(x, y, "optimizer step", "eval/loss"))
    best = overview.best
    for view in sorted(shown, key=lambda view: view is best):  # the best on top
        points = [(x(step), y(loss)) for step, loss in view.curve]
        css = "best" if view is best else "trial"
        marks.append(svg.line(points, css, describe(view), slot=view.slot))
    return svg.chart("eval/loss by step", marks)


def parallel_coordinates(overview: Overview) -> str:
    """Draw every comparable trial as a line through its parameters and its eval/loss."""
    definition, shown = overview.definition, overview.comparable
    domains = searched(definition.parameters) if definition else {}
    if len(shown) < 2 or not domains:
        return ""
    top, bottom = svg.TOP + 26, svg.HEIGHT - 26
    losses = svg.scale([view.eval_loss or 0.0 for view in shown], bottom, top, pad=0)
    width = svg.WIDTH - 80
    spots = [40 + width * k / len(domains) for k in range(len(domains) + 1)]
    marks = []
    for spot, (name, domain) in zip(spots, domains.items(), strict=False):
        low, high = _ends(domain)
        marks += _upright(spot, short_name(name), (low, high), top=top, bottom=bottom)
    ends = (number(losses.low), number(losses.high))
    marks += _upright(spots[-1], "eval/loss", ends, top=top, bottom=bottom)
    ranked = sorted(shown, key=lambda view: (view.eval_loss, view.slot))
    good = ranked[: max(1, len(ranked) // 4)]
    for view in reversed(ranked):  # the best on top
        heights = [
            bottom - (bottom - top) * share(domain, view.params[name])
            for name, domain in domains.items()
        ]
        points = list(zip(spots, [*heights, losses(view.eval_loss or 0.0)], strict=True))
        css = "best" if view is overview.best else "good" if view in good else "trial"
        marks.append(svg.line(points, css, describe(view), slot=view.slot))
    return svg.chart("parameters of every trial", marks)


def importance_bars(found: list[Importance]) -> str:
    """Draw one bar for each parameter."""
    if not found:
        return ""
    row, left = 30, 170
    x = svg.Scale(0, 1, left, svg.WIDTH - 50)
    marks = []
    for place, importance in enumerate(found):
        y = 10 + row * place
        width = x(importance.share) - left
        marks.append(svg.text(left - 8, y + 15, short_name(importance.name), "tick", anchor="end"))
        marks.append(svg.bar(left, y, width=width, height=row - 10, css="fill"))
        percent = f"{importance.share:.0%}"
        marks.append(svg.text(x(importance.share) + 6, y + 15, percent, "tick", anchor="start"))
    return svg.chart("importance of parameters", marks, height=row * len(found) + 10)


def gpu_time(overview: Overview) -> str:
    """Draw the GPU time of every slot: what counted, and what preemptions and restarts cost."""
    shown = [view for view in overview.slots if view.gpu_seconds > 0]
    if not shown:
        return ""
    x = svg.x_scale([-0.5, len(overview.slots) - 0.5], pad=0, whole=True)
    longest = max(view.gpu_seconds for view in shown)
    unit, unit_seconds = ("hours", 3600) if longest >= 1200 else ("minutes", 60)
    y = svg.Scale(0, longest / unit_seconds * 1.05, svg.HEIGHT - svg.BOTTOM, svg.TOP)
    width = min(40.0, (x(1) - x(0)) * 0.7)
    marks = list(svg.axes(x, y, "slot", f"GPU-{unit}"))
    for view in shown:
        spent, wasted = view.gpu_seconds / unit_seconds, view.wasted_gpu_seconds / unit_seconds
        left = x(view.slot) - width / 2
        tip = (
            f"slot {view.slot}: {duration(view.gpu_seconds)} of GPU, of them"
            f" {duration(view.wasted_gpu_seconds)} wasted, attempts: {view.attempts}"
        )
        for css, top, amount in (
            ("waste", spent, wasted),
            ("fill", spent - wasted, spent - wasted),
        ):
            height = y(0) - y(amount)
            bar = svg.bar(
                left, y(top), width=width, height=height, css=css, tip=tip, slot=view.slot
            )
            marks.append(bar)
    return svg.chart("GPU time by slot", marks)


def describe(view: SlotView) -> str:
    """Describe a trial in a line, which is shown when a reader points at it."""
    params = ", ".join(f"{name} {plain(value)}" for name, value in view.params.items())
    loss = "" if view.eval_loss is None else f", eval/loss {view.eval_loss:.4f}"
    return f"slot {view.slot} ({view.state}){loss}: {params}"


def share(domain: Distribution, value: float | str) -> float:
    """Where a value lies in its domain, from 0 to 1."""
    if isinstance(domain, Choice):
        return domain.values.index(value) / max(1, len(domain.values) - 1)
    assert isinstance(domain, FloatRange | IntRange | SteppedFloats), domain
    at = svg.Scale(domain.min, domain.max, 0, 1, log=getattr(domain, "log", False))
    return min(1.0, max(0.0, at(float(value)))) if domain.max > domain.min else 0.5


def _domain(overview: Overview, name: str) -> Distribution | None:
    return overview.definition.parameters.get(name) if overview.definition else None


def _trial_dot(overview: Overview, view: SlotView, x: float, y: float) -> str:
    css = "winner" if view is overview.best else "point"
    return svg.dot(x, y, css, describe(view), slot=view.slot)


def _upright(
    spot: float, name: str, ends: tuple[str, str], *, top: float, bottom: float
) -> list[str]:
    return [
        svg.line([(spot, top), (spot, bottom)], "axis"),
        svg.text(spot, top - 18, name, "tick"),
        svg.text(spot, top - 5, ends[1], "small"),
        svg.text(spot, bottom + 14, ends[0], "small"),
    ]


def _ends(domain: Distribution) -> tuple[str, str]:
    if isinstance(domain, Choice):
        return plain(domain.values[0]), plain(domain.values[-1])
    assert isinstance(domain, FloatRange | IntRange | SteppedFloats), domain
    return number(domain.min), number(domain.max)
