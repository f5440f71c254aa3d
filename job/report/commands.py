"""The verbs that look at a sweep: `status`, `report`, `best`. None of them changes it."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.live import Live

from job.identity import sweep_name
from job.ledger import Ledger, check_sweep
from job.log import log
from job.report.attempts_table import attempts_table
from job.report.best import as_json, best_of, describe_best, download, merge, unwritable
from job.report.overview import Overview, read_overview
from job.report.page import html_page, markdown
from job.report.table import slot_table, stuck_slots, to_json, to_prometheus
from job.settings import Settings
from job.store import open_store

WATCH_SECONDS = 10.0
PIPE_COLUMNS = 160  # where no terminal says how wide it is


def show_status(
    options: Namespace,
    settings: Settings,
    ledger: Ledger,
    *,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Print the slots of the sweep; `wait` passes the time between two looks of `--watch`."""
    if options.json:
        print(to_json(read_overview(ledger, settings.num_trials)))
    elif options.prometheus is not None:
        samples = to_prometheus(read_overview(ledger, settings.num_trials))
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
    overview = read_overview(ledger, settings.num_trials)
    price = settings.gpu_hourly_usd
    files = {
        "report.html": html_page(overview, usd_per_hour=price),
        "report.md": markdown(overview, usd_per_hour=price),
    }
    with tempfile.TemporaryDirectory() as name:
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
                print(f"{ledger.store.uri}/{key}")
            else:
                print(path)


def show_best(options: Namespace, settings: Settings, ledger: Ledger) -> None:
    """Print the best trial as JSON, or fetch or merge its adapter."""
    check_sweep(ledger)
    overview = read_overview(ledger, settings.num_trials)
    best = best_of(overview)
    if options.download is not None:
        download(ledger.store, best, options.download)
    elif options.merge is not None:
        merge(ledger.store, best, options.merge, work_dir=settings.work_dir)
    print(as_json(describe_best(overview, best)))


def open_ledger(settings: Settings) -> Ledger:
    """The ledger that the settings name."""
    store = open_store(settings.output_uri, outage_seconds=60 * settings.outage_minutes)
    return Ledger(store, sweep_name(settings))


def _console() -> Console:
    """Colours and the full width only on a terminal; rich minds NO_COLOR."""
    return Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS, highlight=False)


def _print_status(console: Console, overview: Overview, settings: Settings) -> None:
    begun = "" if overview.identity else ": not begun, or another name or place"
    console.print(f"sweep {overview.sweep} in {overview.uri}{begun}", soft_wrap=True)
    console.print(slot_table(overview, console.width))
    for line in stuck_slots(overview, lease_seconds=settings.lease_seconds):
        console.print(line, soft_wrap=True)
    if (best := overview.best) is not None:
        console.print(f"best: slot {best.slot}, {overview.uri}/{best.adapter_key}", soft_wrap=True)


def _watch(ledger: Ledger, settings: Settings, wait: Callable[[float], None]) -> None:
    """The table again and again; a bucket that fails for a while is waited for by the store."""
    console = _console()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            overview = read_overview(ledger, settings.num_trials)
            live.update(slot_table(overview, console.width), refresh=True)
            if not any(view.state in ("empty", "running", "waiting") for view in overview.slots):
                return
            wait(WATCH_SECONDS)


def _write_samples(path: Path, samples: str) -> None:
    if path == Path("-"):
        sys.stdout.write(samples)
        return
    temporary = path.with_name(f"{path.name}.tmp")  # the collector reads *.prom only
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary.write_text(samples)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable("status --prometheus", path, error) from error
    log.info("%s: written", path)
