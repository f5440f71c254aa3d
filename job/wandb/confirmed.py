"""`mirror.json`: written once W&B has confirmed that it has all of a committed trial.

sweeps/<sweep>/slots/<NNNN>/mirror.json   create-once: run, url
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from job.errors import CredentialsError, OutageError, SlotError
from job.ledger.ledger import Ledger
from job.log import log
from job.settings import Settings
from job.store.documents import Json, read_document
from job.wandb.client import call, check_reachable, is_wanted, prepare
from job.wandb.rows import Rows
from job.wandb.run import confirm, end_run, mirror_key, open_run, place_of, upload_seconds

CATCH_UP_SECONDS = 60.0  # at a pod's start, for what earlier pods could not tell W&B
FAILURES = 3  # slots in a row, after which W&B itself is taken to be down
SLOT_SECONDS = 25.0  # a slot is not begun with less than that left


@dataclass(frozen=True)
class Unconfirmed:
    """A committed slot that W&B has not confirmed, in the generation in which it was found."""

    ledger: Ledger  # pinned: a redo in between must not get the old run
    slot: int
    spec: Json
    result: Json


def unconfirmed(ledger: Ledger, num_trials: int) -> list[Unconfirmed]:
    """The committed slots that W&B has not confirmed."""
    found = []
    for slot in range(num_trials):
        with contextlib.suppress(SlotError):  # a damaged slot is told by `status`
            view = ledger.pin(slot)
            spec, result = view.spec(slot), view.result(slot)
            if spec is None or result is None:
                continue
            if read_document(view.store, mirror_key(view, slot)) is None:
                found.append(Unconfirmed(view, slot, spec, result))
    return found


def mirror_slot(settings: Settings, ledger: Ledger, slot: int, spec: Json, result: Json) -> bool:
    """Tell W&B all of a committed trial; whether it confirmed. Raises what the client raises."""
    rows = Rows()
    with tempfile.TemporaryDirectory(dir=settings.work_dir, prefix="mirror-") as folder:
        history = Path(folder) / "history.jsonl"
        ledger.store.download(result["history_key"], history)
        rows.read(history)
        rows.is_whole = True
    place = place_of(settings, ledger.sweep, slot, spec)
    run = open_run(place, upload_seconds=upload_seconds(settings))
    is_taken = end_run(
        run,
        result,
        artifact=settings.wandb_artifact,
        ledger=ledger,
        work_dir=settings.work_dir,
        after=run.starting_step - 1,
        rows=rows,
    )
    return is_taken and confirm(ledger, slot, run, result, len(rows))


def catch_up(settings: Settings, ledger: Ledger, check: Callable[[], None]) -> None:
    """Mirror what earlier pods could not, at most a minute; a failing W&B is only a warning."""
    if not is_wanted(settings):
        return
    missing = unconfirmed(ledger, settings.num_trials)
    if not missing:
        return
    prepare(settings)
    deadline = time.monotonic() + CATCH_UP_SECONDS
    try:
        check_reachable(check)
    except OutageError as error:
        log.warning("%s; %d trials are left to be mirrored", error, len(missing))
        return
    for found in missing:
        left = deadline - time.monotonic()
        if left < SLOT_SECONDS:
            log.warning("W&B: slots are left to be mirrored: job report --mirror")
            return
        try:
            _mirror_and_say(settings, found, check=check, seconds=left)
        except OutageError as error:  # perhaps of this slot alone: the next one is tried, too
            log.warning("%s; later: job report --mirror", error)
        except CredentialsError as error:
            log.warning("%s; later: job report --mirror", error)
            return


def mirror_all(settings: Settings, ledger: Ledger) -> tuple[int, int]:
    """Mirror every committed slot that W&B has not confirmed; how many it has now, of how many.

    Raises `CredentialsError`, and `OutageError` after `FAILURES` slots in a row.
    """
    prepare(settings)
    missing = unconfirmed(ledger, ledger.num_slots(settings.num_trials))
    if missing:
        check_reachable()
    seconds = 2 * upload_seconds(settings)
    done = failures = 0
    for found in missing:
        try:
            done += _mirror_and_say(settings, found, check=lambda: None, seconds=seconds)
            failures = 0
        except OutageError as error:
            failures += 1
            if failures == FAILURES:
                raise
            log.warning("%s", error)
    return done, len(missing)


def _mirror_and_say(
    settings: Settings, found: Unconfirmed, *, check: Callable[[], None], seconds: float
) -> bool:
    confirmed = call(
        f"mirroring slot {found.slot}",
        lambda: mirror_slot(settings, found.ledger, found.slot, found.spec, found.result),
        should_stop=check,
        seconds=seconds,
    )
    if confirmed:
        log.info("slot %d: mirrored to W&B", found.slot)
    else:
        log.warning("slot %d: W&B did not confirm all; later: job report --mirror", found.slot)
    return confirmed
