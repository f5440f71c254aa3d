"""The verbs that look at a sweep: `status`, `report`, `best`. None of them changes it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from job.errors import VOLUME_FULL, OutageError, SettingsError, SlotError
from job.ledger.ledger import Ledger, check_sweep
from job.ledger.redo import read_slot
from job.log import log
from job.report.attempts_table import attempts_json, attempts_table
from job.report.comparison import read_compared
from job.report.costs import cost_lines
from job.report.gain import gain_lines, has_ended, outlook_of
from job.report.overview import Overview, SlotView, read_overview
from job.report.page import html_page, markdown
from job.report.table import slot_table, stuck_slots, to_json, to_prometheus
from job.settings import Settings
from job.store import open_store
from job.trial.identity import sweep_name
from job.winner.adapter import download, unwritable
from job.winner.merge import merge, merge_table
from job.winner.push import check_repository, push

WATCH_SECONDS = 10.0
PIPE_SECONDS = 60.0  # between two tables of `--watch` in a pipe, if no state changes
PIPE_COLUMNS = 160  # the width where no terminal says one


def show_status(
    options: Namespace,
    settings: Settings,
    ledger: Ledger,
    *,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Print the slots of the sweep; `wait` passes the time between two looks of `--watch`."""
    other = "--watch" if options.watch else "--prometheus"
    if options.attempts and (options.watch or options.prometheus is not None):
        what = f"--attempts belongs to the table or to --json, and {other} does not show them"
        raise SettingsError(f"status: {what}; leave one of the two out")
    with _printing():
        _show_status(options, settings, ledger, wait)


def _show_status(
    options: Namespace, settings: Settings, ledger: Ledger, wait: Callable[[float], None]
) -> None:
    if options.json:
        compared = read_compared(ledger, settings.num_trials)
        attempts = attempts_json(ledger, len(compared.slots)) if options.attempts else None
        print(to_json(compared, settings.gpu_hourly_usd, attempts=attempts))
    elif options.prometheus is not None:
        samples = to_prometheus(read_overview(ledger, settings.num_trials), settings.gpu_hourly_usd)
        _write_samples(options.prometheus, samples)
    elif options.watch:
        _watch(ledger, settings, wait)
    else:
        overview = read_overview(ledger, settings.num_trials)
        _print_status(_console(), overview, settings)
        if options.attempts:
            _console().print(attempts_table(ledger, len(overview.slots)))


def write_report(options: Namespace, settings: Settings, ledger: Ledger) -> None:
    """Write the page and the summary; print where they are."""
    check_sweep(ledger)
    overview = read_compared(ledger, settings.num_trials)
    given: Any = {
        "usd_per_hour": settings.gpu_hourly_usd,
        "budget_usd": settings.sweep_budget_usd,
        "min_gain": settings.min_gain,
    }
    files = {
        "report.html": html_page(overview, **given),
        "report.md": markdown(overview, **given),
    }
    written: list[str] = []
    with tempfile.TemporaryDirectory() as name, _printing():
        folder: Path = options.output or Path(name)
        for file_name, text in files.items():
            path = folder / file_name
            try:
                folder.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            except OSError as error:
                option = "report" if options.output is None else "report --output"
                raise unwritable(option, folder, error) from error
            if options.output is None:
                key = ledger.report_key(file_name)
                ledger.store.upload(key, path)
                written.append(f"{ledger.store.uri}/{key}")
            else:
                written.append(str(path))
        print(json.dumps({"files": written}, indent=1) if options.json else "\n".join(written))


def show_best(options: Namespace, settings: Settings, ledger: Ledger) -> None:
    """Print the best trial as JSON, or fetch, merge or push its adapter."""
    is_merge = options.merge is not None or options.merged
    if not is_merge and (options.onto or options.base):
        raise SettingsError("best: --onto and --base belong to --merge DIR or --push --merged")
    if options.push is None and (options.merged or options.public):
        raise SettingsError("best: --merged and --public belong to --push OWNER/NAME")
    if options.push is not None:
        check_repository(options.push)
    check_sweep(ledger)
    overview = read_overview(ledger, settings.num_trials)
    best = best_of(overview) if options.slot is None else _chosen(overview, options.slot)
    assert best.result is not None
    told = describe_best(overview, best)
    if options.download is not None:
        download(ledger.store, best.slot, best.result, options.download)
    elif options.merge is not None:
        told["merge"] = _merged(options, settings, ledger, best, options.merge)
    elif options.push is not None:
        told |= _pushed(options, settings, ledger, best)
    with _printing():
        print(json.dumps(told, indent=1))


def _merged(
    options: Namespace, settings: Settings, ledger: Ledger, view: SlotView, folder: Path
) -> dict[str, Any]:
    """Write the better merge to the folder, print what was measured, and return it as JSON."""
    assert view.result is not None
    losses = merge(
        ledger,
        view.slot,
        view.result,
        folder,
        settings=settings,
        onto=options.onto,
        original=options.base,
    )
    Console(stderr=True, highlight=False).print(merge_table(losses))
    return losses.to_json()


def _pushed(
    options: Namespace, settings: Settings, ledger: Ledger, view: SlotView
) -> dict[str, Any]:
    """Upload the adapter, or its merge, to the hub; say where it stands."""
    assert view.result is not None
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="push-") as name:
        folder = Path(name) / "model"
        if options.merged:
            told["merge"] = _merged(options, settings, ledger, view, folder)
        else:
            download(ledger.store, view.slot, view.result, folder, option="best --push")
        message = f"slot {view.slot} of sweep {ledger.sweep}"
        told["pushed"] = push(folder, options.push, public=options.public, message=message)
    return told


def best_of(overview: Overview) -> SlotView:
    """The best committed trial. Raises `SlotError` if none has an adapter yet."""
    if (best := overview.best) is None or best.adapter_key is None:
        raise SlotError(
            f"sweep {overview.sweep} in {overview.uri}: no committed trial has an adapter yet;"
            " `job status` shows its slots"
        )
    return best


def _chosen(overview: Overview, text: str) -> SlotView:
    """The trial of the slot that a person named. Raises `SettingsError`, `SlotError`."""
    number = read_slot(text, "best --slot", len(overview.slots))
    view = overview.slots[number]
    if view.adapter_key is None:
        raise SlotError(f"slot {number} is {view.state} and has no adapter; `job status` shows all")
    return view


def describe_best(overview: Overview, best: SlotView) -> dict[str, Any]:
    """The JSON object that `job best` prints."""
    assert best.result is not None
    return {
        "slot": best.slot,
        "eval_loss": best.eval_loss,
        "params": dict(best.params),
        "adapter": f"{overview.uri}/{best.adapter_key}",
        "adapter_sha256": best.result.adapter_sha256,
        "base_model": best.result.base_model,
        "base_model_revision": best.result.base_model_revision,
    }


def open_ledger(settings: Settings) -> Ledger:
    """The ledger that the settings name."""
    store = open_store(settings.output_uri, outage_seconds=60 * settings.outage_minutes)
    return Ledger(store, sweep_name(settings))


@contextlib.contextmanager
def _printing() -> Iterator[None]:
    """Flush stdout, and name it where the disk behind it is full."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in VOLUME_FULL or error.filename is not None:
            raise
        raise OutageError("stdout: no space left: free it, or print elsewhere") from error


def _console() -> Console:
    """A console with colours and the full width only on a terminal; rich obeys NO_COLOR."""
    return Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS, highlight=False)


def _print_status(
    console: Console, overview: Overview, settings: Settings, *, time_of_look: str = ""
) -> None:
    console.print(_head(overview) + time_of_look, soft_wrap=True)
    console.print(slot_table(overview, console.width))
    for line in stuck_slots(overview, lease_seconds=settings.lease_seconds):
        console.print(line, soft_wrap=True)
    price, budget = settings.gpu_hourly_usd, settings.sweep_budget_usd
    outlook, min_gain = outlook_of(overview), settings.min_gain
    for line in (
        *overview.prices_of_4_bits,
        *cost_lines(overview, price, budget),
        *gain_lines(overview, outlook, min_gain=min_gain, usd_per_hour=price),
    ):
        console.print(line, soft_wrap=True)
    if (best := overview.best) is not None:
        console.print(f"best: slot {best.slot}, {overview.uri}/{best.adapter_key}", soft_wrap=True)


def _head(overview: Overview) -> str:
    begun = "" if overview.identity else ": not begun, or another name or place"
    return f"sweep {overview.sweep} in {overview.uri}{begun}"


def _watch(ledger: Ledger, settings: Settings, wait: Callable[[float], None]) -> None:
    """Show the table again and again; the store itself waits for a bucket that fails for a while.

    Ends once no slot can change any more, or at Ctrl-C.
    """
    console = _console()
    view = _in_place if console.is_terminal else _one_below_the_other
    with contextlib.suppress(KeyboardInterrupt), view(console, settings) as show:
        while True:
            overview = read_overview(ledger, settings.num_trials)
            is_last = not any(_may_change(overview, view, settings) for view in overview.slots)
            show(overview, is_last)
            if is_last:
                return
            wait(WATCH_SECONDS)


def _may_change(overview: Overview, view: SlotView, settings: Settings) -> bool:
    """Whether a worker may still come to the slot: in a sweep that has ended to no new one."""
    is_new = view.state == "empty" and view.generation == 0
    return (
        view.state in ("empty", "running", "waiting")
        and not (is_new and has_ended(overview, settings.min_gain))
    )  # fmt: skip


@contextlib.contextmanager
def _in_place(console: Console, _settings: Settings) -> Iterator[Callable[[Overview, bool], None]]:
    with Live(console=console, auto_refresh=False) as live:

        def show(overview: Overview, _is_last: bool) -> None:
            head = Text(_head(overview) + _time_of_look(), overflow="fold")
            live.update(Group(head, slot_table(overview, console.width)), refresh=True)

        yield show


@contextlib.contextmanager
def _one_below_the_other(
    console: Console, settings: Settings
) -> Iterator[Callable[[Overview, bool], None]]:
    """Print into a pipe or file: at once when a state changes, once a minute when only steps do."""
    states: list[object] = []
    steps: list[object] = []
    looks = 0  # since the last table

    def show(overview: Overview, is_last: bool) -> None:
        nonlocal states, steps, looks
        looks += 1
        now = [view.state for view in overview.slots]
        done = [(v.step, v.eval_loss, v.attempts, v.generation) for v in overview.slots]
        is_due = looks * WATCH_SECONDS >= PIPE_SECONDS and done != steps
        if now != states or is_due or is_last:
            _print_status(console, overview, settings, time_of_look=_time_of_look())
            console.file.flush()
            states, steps, looks = list(now), list(done), 0

    yield show


def _time_of_look() -> str:
    return f", {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _write_samples(path: Path, samples: str) -> None:
    if path == Path("-"):
        sys.stdout.write(samples)
        return
    if path.is_dir():
        folder = IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        raise unwritable("status --prometheus", path, folder)
    temporary = path.with_name(f"{path.name}.tmp")  # the collector reads *.prom only
    try:
        temporary.write_text(samples, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise unwritable("status --prometheus", path, error) from error
    log.info("%s: written", path)
