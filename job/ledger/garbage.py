"""`job gc`: deletes what nothing refers to any more, beside running workers.

Why no live attempt loses anything, whatever it does meanwhile:
- A checkpoint counts only once the lease names it, and only the lease's own epoch, or a later one,
  can still name it. So an unnamed one of an *earlier* epoch is garbage for ever; one of the lease's
  epoch is left alone, even if the lease is released: its last upload may still be on its way.
- A best adapter is named by its content: a resumed attempt computes and refers to the very bytes
  that a killed one left. So adapters and histories are touched in committed slots only, where
  result.json says which one counts, and nobody can commit any more.
- Prepared data and a staged base are there before a first trial freezes the sweep that names them,
  and a probe lives for seconds under no name. No store here tells the age of an object, so they go
  only if an earlier gc, a day ago, found them unused as well (`gc.json` remembers).
Documents are never deleted, and what is under a name that we do not know is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import NamedTuple

from pydantic import Field, ValidationError

from job.errors import SettingsError, SlotError
from job.ledger.folders import delete_folder
from job.ledger.ledger import Ledger
from job.ledger.records import Moment, Record, damage
from job.ledger.slot import Slot
from job.log import log
from job.staged_base import staged_key
from job.store.base import Store
from job.store.documents import create_document, read_document, swap_document

MEMORY_KEY = "gc.json"
_UPLOAD = re.compile(
    r"sweeps/[^/]+/slots/(?P<slot>\d{4})/(redo-(?P<generation>\d+)/)?"
    r"(checkpoints/(?P<epoch>\d+)-\d+-[0-9a-f]{64}|adapter-[0-9a-f]{64}|history-[0-9a-f]{64}\.jsonl|rows-[0-9a-f]{64}\.json)"
    r"(?=/|$)"
)
_UNOWNED = re.compile(r"((?:prepared|bases)/[0-9a-f]{64})/|(probe-[0-9a-f]{32})$")


class Memory(Record):
    """`gc.json`: what an earlier gc found unused, by key, and since when."""

    unused_since: dict[str, Moment] = Field(default={})


class Garbage(NamedTuple):
    """A folder or an object, and why nothing needs it."""

    key: str
    reason: str


class Collected(NamedTuple):
    """What a gc found: what went, or would go, and what waits to go, by key since when."""

    garbage: list[Garbage]
    waiting: dict[str, str]
    dry_run: bool

    @property
    def summary(self) -> str:
        """All of it in a line."""
        done = "would be deleted" if self.dry_run else "deleted"
        return f"gc: {len(self.garbage)} {done}, {len(self.waiting)} unused but not long enough"

    def to_json(self) -> dict[str, object]:
        """All of it for a program."""
        return {
            "dry_run": self.dry_run,
            "deleted": [garbage._asdict() for garbage in self.garbage],
            "waiting": [{"key": key, "since": since} for key, since in self.waiting.items()],
        }


def collect(
    ledger: Ledger,
    *,
    dry_run: bool,
    old_generations: bool,
    unused_hours: float,
    say: Callable[[str], None],
) -> Collected:
    """Delete the garbage of the sweep and of the bucket's shared folders; `say` hears of each."""
    waiting: dict[str, str] = {}
    doomed = [
        *_unneeded_uploads(ledger, old_generations=old_generations),
        *_unused_shared(ledger.store, unused_hours, waiting),
    ]
    for key, reason in doomed:
        say(f"{'would delete' if dry_run else 'deleting'} {key}: {reason}")
        if not dry_run:
            _delete(ledger.store, key)
    for key, since in waiting.items():
        say(f"kept for now {key}: unused since {since}, goes after {unused_hours:g} h")
    if not dry_run:
        _remember(ledger.store, waiting)
    return Collected(doomed, waiting, dry_run)


def _unneeded_uploads(ledger: Ledger, *, old_generations: bool) -> Iterator[Garbage]:
    """Find the uploads of the sweep's slots that nothing needs any more."""
    uploads: dict[tuple[int, int], dict[str, int | None]] = {}
    for key in ledger.store.list(f"{ledger.folder}/slots/"):
        if (match := _UPLOAD.match(key)) is not None:
            where = int(match["slot"]), int(match["generation"] or 0)
            epoch = int(match["epoch"]) if match["epoch"] else None
            uploads.setdefault(where, {})[match[0]] = epoch
    for (number, generation), found in sorted(uploads.items()):
        slot = Slot(ledger, number, generation)
        try:
            if old_generations and _is_replaced(slot):
                yield from (Garbage(key, "the slot was begun again") for key in found)
                continue
            yield from _unneeded_in_generation(slot, found)
        except SlotError as error:
            log.warning("slot %d is left alone: %s", number, error)


def _is_replaced(slot: Slot) -> bool:
    """Whether a later generation is committed; until then the earlier adapter is all there is."""
    newest = slot.ledger.slot(slot.number)
    return slot.generation < newest.generation and newest.result() is not None


def _unneeded_in_generation(slot: Slot, found: dict[str, int | None]) -> Iterator[Garbage]:
    stored, result = slot.lease(), slot.result()
    if stored is None:
        log.warning("slot %d is left alone: it has uploads but no lease.json", slot.number)
        return
    named = {checkpoint.key for checkpoint in stored.lease.checkpoints}
    for key, epoch in found.items():
        if result is not None:
            if key not in (result.adapter_key, result.history_key, result.rows_key):
                yield Garbage(key, "the slot is committed and does not name it")
        elif epoch is not None and epoch < stored.lease.epoch and key not in named:
            yield Garbage(key, f"of epoch {epoch}, and the lease of a later one does not name it")


def _unused_shared(store: Store, unused_hours: float, waiting: dict[str, str]) -> Iterator[Garbage]:
    """Find prepared data and bases of no sweep, and probes; put those not unused for long into
    `waiting`.
    """
    matches = (
        _UNOWNED.match(key) for top in ("prepared/", "bases/", "probe-") for key in store.list(top)
    )
    candidates = dict.fromkeys(match[1] or match[2] for match in matches if match)
    # Read after the listing, so that a sweep frozen in between is seen.
    used = _shared_of_sweeps(store)
    since = _remembered(store)[0].unused_since
    now = datetime.now(UTC)
    for key in candidates:
        if used is None or key in used:
            continue
        first_seen = since.get(key, now.isoformat(timespec="seconds"))
        hours = (now - datetime.fromisoformat(first_seen)).total_seconds() / 3600
        if hours >= unused_hours:
            yield Garbage(key, f"no sweep uses it, for {hours:.0f} h at least")
        else:
            waiting[key] = first_seen


def _shared_of_sweeps(store: Store) -> set[str] | None:
    """The prepared data and the bases that sweeps name; None if a sweep cannot be read."""
    used = set()
    for key in store.list("sweeps/"):
        if (match := re.fullmatch(r"sweeps/([^/]+)/sweep\.json", key)) is None:
            continue
        try:
            identity = Ledger(store, match[1]).identity()
        except SettingsError as error:
            log.warning("prepared data and bases are left alone: %s", error)
            return None
        if identity is None:
            continue
        if identity.dataset.prepared is None:
            log.warning("prepared data and bases are left alone: %s names none", key)
            return None
        used.add(f"prepared/{identity.dataset.prepared}")
        used.add(staged_key(identity.base_model_name, identity.base_model.revision or ""))
    return used


def _remembered(store: Store) -> tuple[Memory, str | None]:
    """The memory of earlier gcs and the version to swap it by; an empty one if it is damaged."""
    document = read_document(store, MEMORY_KEY)
    if document is None:
        return Memory(), None
    try:
        return Memory.model_validate(document.content), document.version
    except ValidationError as error:
        log.warning("%s/%s is damaged (%s): begun anew", store.uri, MEMORY_KEY, damage(error))
        return Memory(), document.version


def _remember(store: Store, waiting: dict[str, str]) -> None:
    """Write down what waits; another gc that does so at the same time has seen the same."""
    memory, version = _remembered(store)
    content = memory.changed(unused_since=waiting).to_json()
    if version is not None:
        swap_document(store, MEMORY_KEY, content, version)
    elif waiting:
        create_document(store, MEMORY_KEY, content)


def _delete(store: Store, key: str) -> None:
    if key.endswith((".jsonl", ".json")) or key.startswith("probe-"):
        store.delete(key)
    else:
        delete_folder(store, key)
