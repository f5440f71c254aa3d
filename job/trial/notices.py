"""Word to people, once each: the sweep is done, a slot is given up, a budget is reached.

A notice is a create-once document in the sweep's folder, so that of all workers one sends it. It
is written before it is sent: a notice may get lost with its worker, and is never sent twice. None
of it is ever a trial's failure. The URLs (`JOB_NOTIFY_URLS`, https://github.com/caronc/apprise)
hold secrets and reach no log.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from job.errors import JobError, SlotError
from job.ledger.accounts import NOTHING, cost_of_slot, dollars
from job.ledger.lease import HeldLease
from job.ledger.ledger import Ledger
from job.log import log
from job.settings import Settings
from job.store.documents import create_document, read_document

if TYPE_CHECKING:
    import apprise

SEND_SECONDS = 10.0  # for all services together; what takes longer is left alone
# Attempts in a row without progress after which a person hears of a slot, before it is given up.
FRUITLESS_TOLD, STARTLESS_TOLD = 2, 5


def urls_of(settings: Settings) -> list[str]:
    """The URLs of `JOB_NOTIFY_URLS`, which white space or a comma parts."""
    text = settings.notify_urls.get_secret_value() if settings.notify_urls else ""
    return [url for url in re.split(r"[\s,]+(?=[a-zA-Z][\w+.-]*://)", text.strip()) if url]


def not_understood(settings: Settings) -> list[int]:
    """The positions, from 1, of the URLs that apprise does not understand."""
    found = []
    for number, url in enumerate(urls_of(settings), 1):
        try:
            _service(url)
        except ValueError:
            found.append(number)
    return found


def tell_if_done(settings: Settings, ledger: Ledger, *, ended: str | None = None) -> None:
    """Tell that no slot is open any more; `ended` says why those never drawn need not be."""
    _tell(settings, ledger, lambda: _done(settings, ledger, ended))


def tell_of_budget(settings: Settings, ledger: Ledger, spent: str) -> None:
    """Tell that the sweep's budget lets no new trial begin; a raised one is another notice."""

    def notice() -> tuple[str, str, str] | None:
        name = _name_of_budget(settings, ledger)
        if name is None:
            return None
        return name, "its budget is reached", f"{spent}; {_best(ledger, settings)}"

    _tell(settings, ledger, notice)


def _name_of_budget(settings: Settings, ledger: Ledger) -> str | None:
    """The name of the budget's notice; None where an earlier version sent it by another one.

    Earlier versions called a budget in dollars alone as if it were in GPU-hours.
    """
    limits = settings.sweep_budget_gpu_hours, settings.sweep_budget_usd
    name = "budget-" + "-".join(f"{limit:g}" for limit in limits if limit is not None)
    if settings.sweep_budget_gpu_hours is not None or settings.sweep_budget_usd is None:
        return name
    sent = read_document(ledger.store, _key(ledger, name))
    words = str(sent.content.get("words")) if sent is not None else ""
    return None if "JOB_SWEEP_BUDGET_USD" in words else f"{name}-usd"


def tell_of_slot(settings: Settings, lease: HeldLease, *, given_up: str | None = None) -> None:
    """Tell that a slot is given up and why; without that, that it may be soon."""
    slot, record = lease.slot, lease.record
    where = f"slot-{slot.number:04d}-{slot.generation}"
    if given_up is not None:
        name, title, words = f"{where}-given-up", f"slot {slot.number} is given up", given_up
    elif record.fruitless >= FRUITLESS_TOLD or record.startless >= STARTLESS_TOLD:
        name, title = f"{where}-no-progress", f"slot {slot.number} makes no progress"
        words = (
            f"{record.fruitless} attempts in a row trained and saved nothing, {record.startless}"
            " ended before their first step: `job status --attempts` shows their last lines"
        )
    else:
        return
    _tell(settings, slot.ledger, lambda: (name, title, words))


def _done(settings: Settings, ledger: Ledger, ended: str | None) -> tuple[str, str, str] | None:
    """The notice of a sweep in which nothing is left to do; None if something is."""
    states = Counter(_state(ledger, number) for number in range(settings.num_trials))
    if states["specified"] or (states["empty"] and ended is None):
        return None
    listing = ", ".join(f"{count} {state}" for state, count in states.most_common())
    why = f"{ended}; " if ended else ""
    words = f"{why}{settings.num_trials} slots: {listing}; {_best(ledger, settings)}"
    return f"done-{settings.num_trials}", "done", words


def _state(ledger: Ledger, number: int) -> str:
    try:
        return ledger.slot(number).state()
    except SlotError:
        return "damaged"


def _best(ledger: Ledger, settings: Settings) -> str:
    """The best trial and the price of the sweep in words."""
    committed = ledger.committed(settings.num_trials)
    judged = [
        (result.eval_loss, slot.number)
        for slot, _, result in committed
        if result.eval_loss is not None and result.status != "diverged"
    ]
    best = "no adapter yet"
    if judged:
        loss, number = min(judged)
        best = f"best: slot {number}, eval/loss {loss:.4f}"
    costs = (cost_of_slot(ledger, number) for number in range(settings.num_trials))
    cost = sum(costs, NOTHING)
    usd = cost.dollars(settings.gpu_hourly_usd)
    money = f", {dollars(usd)}" if usd else ""
    return f"{best}; {cost.gpu_seconds / 3600:.1f} GPU-hours{money}"


def _key(ledger: Ledger, name: str) -> str:
    return f"{ledger.folder}/notices/{name}.json"


def _tell(
    settings: Settings, ledger: Ledger, notice: Callable[[], tuple[str, str, str] | None]
) -> None:
    """Send a notice (name, title, words) that no worker has sent yet."""
    if settings.notify_urls is None:
        return
    try:
        found = notice()
        if found is None:
            return
        name, title, words = found
        content = {"title": title, "words": words}
        if not create_document(ledger.store, _key(ledger, name), content).ours:
            return
    except JobError as error:
        log.warning("no notice is sent: %s", error)
        return
    send(urls_of(settings), f"Sweep {ledger.sweep}: {title}", words)


def send(urls: list[str], title: str, words: str, *, seconds: float = SEND_SECONDS) -> None:
    """Send to every service, all within `seconds`; a failure is a line of the log."""
    sent: set[int] = set()

    def run(number: int, url: str) -> None:
        try:
            if _service(url).notify(body=words, title=title):
                sent.add(number)
        except Exception as error:  # whatever a service's code raises: never a trial's failure
            log.debug("notice: %s", type(error).__name__)

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(urls, 1)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if sent:
        log.info("notice: %s: %s", title, words)
    if failed := [str(number) for number in range(1, len(urls) + 1) if number not in sent]:
        log.warning(
            "JOB_NOTIFY_URLS: URL %s of %d sent nothing: %s", ", ".join(failed), len(urls), title
        )


def _service(url: str) -> apprise.Apprise:
    """The service behind a URL. Raises `ValueError` for one that apprise does not understand."""
    import apprise  # 0.14 s

    logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)  # its lines may hold the URL
    service = apprise.Apprise()
    if not service.add(url):
        raise ValueError("not understood")
    return service
