"""Committed trials that W&B has not confirmed yet: sent again by a later pod, or by a person."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from job.errors import CredentialsError, OutageError, SettingsError
from job.ledger.ledger import Ledger
from job.ledger.records import Result, Spec
from job.ledger.slot import Slot
from job.log import log
from job.settings import Settings
from job.store.documents import read_document
from job.wandb.client import call, check_reachable, is_wanted, prepare
from job.wandb.rows import Rows
from job.wandb.run import (
    MIRROR_FILE,
    confirm,
    end_run,
    open_run,
    place_of,
    upload_seconds,
)

CATCH_UP_SECONDS = 60.0  # a pod spends so long on mirroring the slots of earlier pods
FAILURES = 3  # so many slots that fail in a row mean that W&B itself is down
SLOT_SECONDS = 25.0  # with less time left no further slot is begun


class Unconfirmed(NamedTuple):
    """A committed slot that W&B has not confirmed."""

    slot: Slot  # in one generation: a redo in between must not get the old run
    spec: Spec
    result: Result


def unconfirmed(ledger: Ledger, num_trials: int) -> list[Unconfirmed]:
    """The committed slots that W&B has not confirmed."""

    def read(slot: Slot) -> Unconfirmed | None:
        spec, result = slot.spec(), slot.result()
        if spec is None or result is None:
            return None
        is_confirmed = read_document(slot.store, slot.key(MIRROR_FILE)) is not None
        return None if is_confirmed else Unconfirmed(slot, spec, result)

    found = (each for _, each in ledger.read_slots(range(num_trials), read))
    # A damaged slot is told by `status`.
    return [each for each in found if isinstance(each, Unconfirmed)]


def mirror_slot(settings: Settings, slot: Slot, spec: Spec, result: Result) -> bool:
    """Tell W&B all of a committed trial; return whether it confirmed. Raises any client error."""
    rows = Rows()
    with tempfile.TemporaryDirectory(dir=settings.work_dir, prefix="mirror-") as folder:
        history = Path(folder) / "history.jsonl"
        slot.store.download(result.history_key, history)
        rows.read(history)
        rows.is_whole = True
    run = open_run(place_of(settings, slot, spec), upload_seconds=upload_seconds(settings))
    is_taken = end_run(
        run,
        slot,
        result,
        artifact=settings.wandb_artifact,
        work_dir=settings.work_dir,
        after=run.starting_step - 1,
        rows=rows,
    )
    return is_taken and confirm(run, slot, result, len(rows))


def catch_up(settings: Settings, ledger: Ledger, should_stop: Callable[[], None]) -> None:
    """Mirror what earlier pods could not, at most a minute; a failing W&B is only a warning."""
    if not is_wanted(settings):
        return
    missing = unconfirmed(ledger, settings.num_trials)
    if not missing:
        return
    prepare(settings)
    deadline = time.monotonic() + CATCH_UP_SECONDS
    try:
        check_reachable(should_stop)
    except OutageError as error:
        log.warning("%s; %d trials are left to be mirrored", error, len(missing))
        return
    for found in missing:
        left = deadline - time.monotonic()
        if left < SLOT_SECONDS:
            log.warning("W&B: slots are left to be mirrored: job report --mirror")
            return
        try:
            _mirror_and_say(settings, found, should_stop=should_stop, seconds=left)
        except OutageError as error:  # perhaps this slot's alone, so the next one is tried, too
            log.warning("%s; later: job report --mirror", error)
        except (CredentialsError, SettingsError) as error:
            log.warning("%s; later: job report --mirror", error)
            return


def mirror_all(settings: Settings, ledger: Ledger) -> tuple[int, int]:
    """Mirror every committed slot that W&B has not confirmed; return how many it did, of how many.

    Raises `CredentialsError`, `SettingsError`, and `OutageError` after `FAILURES` slots in a row.
    """
    prepare(settings)
    missing = unconfirmed(ledger, ledger.num_slots(settings.num_trials))
    if missing:
        check_reachable()
    seconds = 2 * upload_seconds(settings)
    done = failures = 0
    for found in missing:
        try:
            done += _mirror_and_say(settings, found, should_stop=lambda: None, seconds=seconds)
            failures = 0
        except OutageError as error:
            failures += 1
            if failures == FAILURES:
                raise
            log.warning("%s", error)
    return done, len(missing)


def _mirror_and_say(
    settings: Settings, found: Unconfirmed, *, should_stop: Callable[[], None], seconds: float
) -> bool:
    number = found.slot.number
    confirmed = call(
        f"mirroring slot {number}",
        lambda: mirror_slot(settings, *found),
        should_stop=should_stop,
        seconds=seconds,
    )
    if confirmed:
        log.info("slot %d: mirrored to W&B", number)
    else:
        log.warning("slot %d: W&B did not confirm all; later: job report --mirror", number)
    return confirmed
