"""The sweep's ledger in the bucket: its identity and its slots. The bucket is the truth.

    sweeps/<sweep>/sweep.json                 the identity
    sweeps/<sweep>/ended.json                 another trial gains too little: no new slot is begun
    sweeps/<sweep>/slots/<NNNN>/              a slot's documents (`records`), checkpoints, adapters
    sweeps/<sweep>/slots/<NNNN>/redo-<g>.json create-once: a person began the slot again, and
    sweeps/<sweep>/slots/<NNNN>/redo-<g>/     holds all of that generation; 0 has no such folder

Slots 0 to N-1 are read by name; nothing here rests on listing a bucket.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydantic import ValidationError

from job.errors import DamagedError, SettingsError, SlotError
from job.ledger.records import Ended, Identity, Result, Spec, damage
from job.ledger.slot import AnyRecord, Slot
from job.log import log
from job.store.base import Store
from job.store.documents import create_document, read_document

T = TypeVar("T")

LEDGER_SCHEMA = 1
READERS = 16  # slots that are read at once; the stores keep 20 connections open

_SAME_SETTINGS = (
    "JOB_DATASET_URI: the settings are the same, but the files changed, or this version reads or"
    " prepares rows otherwise: put the files back, or go on with the image that began the sweep"
)


class Ledger:
    """The documents of one sweep."""

    def __init__(self, store: Store, sweep: str) -> None:
        self.store = store
        self.sweep = sweep
        self._known: dict[str, Any] = {}  # what `once` has read, by key

    @property
    def folder(self) -> str:
        """The key under which the sweep lies, without a trailing slash."""
        return f"sweeps/{self.sweep}"

    def once(self, key: str, read: Callable[[str], T | None]) -> T | None:
        """A create-once document: `read` is asked for it until it is there, and never again.

        Nobody changes or deletes one, so what was read holds. Its absence is never remembered:
        whatever begins, ends or closes a slot is seen at the next look. Nor is damage, which
        `read` raises.
        """
        found: T | None = self._known.get(key)
        if found is None and (found := read(key)) is not None:
            self._known[key] = found
        return found

    def slot(self, number: int) -> Slot:
        """The slot in its newest generation: that of its last redo document, read by name."""
        generation = 0
        try:
            while self.once(self.redo_key(number, generation + 1), self.store.get) is not None:
                generation += 1
        except DamagedError as error:  # no redo could create the next one
            raise SlotError(f"slot {number}: {error}; remove it") from error
        return Slot(self, number, generation)

    def redo_key(self, number: int, generation: int) -> str:
        """The document whose existence begins that generation of a slot."""
        return f"{self.folder}/slots/{number:04d}/redo-{generation}.json"

    def report_key(self, file_name: str) -> str:
        """Where `job report` writes a file for people."""
        return f"{self.folder}/{file_name}"

    def identity(self) -> Identity | None:
        """The identity that the first trial froze, or None. Raises `SettingsError` if damaged."""
        with self._damage_told():
            return self.once(self._identity_key, lambda key: self._read(key, Identity))

    def open_sweep(self, identity: Identity) -> None:
        """Freeze the identity, or check ours against the frozen one.

        Raises as `check_identity`.
        """
        if self.identity() is None:
            ours = identity.changed(ledger_schema=LEDGER_SCHEMA)
            with self._damage_told():
                create_document(self.store, self._identity_key, ours.to_json())
        self.check_identity(identity)

    def check_identity(self, identity: Identity) -> None:
        """Compare with the frozen identity, if the sweep has begun.

        Raises `SettingsError` with `name: old -> new` for every difference, those of the settings
        behind other prepared rows included.
        """
        if (frozen := self.identity()) is None:
            return
        ours = identity.changed(ledger_schema=LEDGER_SCHEMA)
        if changed := differences(frozen.compared(), ours.compared()):
            other_rows = differences(frozen.rows, ours.rows)
            if len(changed) == 1 and frozen.dataset != ours.dataset and not other_rows:
                other_rows = [_SAME_SETTINGS]
            changed += other_rows
            raise SettingsError(
                f"sweep {self.sweep} was started with other settings (old -> new):"
                f" {'; '.join(changed)}; set them back, or start another sweep with another"
                " JOB_SWEEP_NAME"
            )

    def ended(self) -> Ended | None:
        """The document that ended the sweep; None if it goes on, or the document is damaged.

        Nothing rests on it but time: what it says is found again from the results.
        """
        try:
            return self.once(self._ended_key, lambda key: self._read(key, Ended))
        except SlotError as error:
            log.warning("%s; whether the sweep has ended is found anew", error)
        except ValidationError as error:
            where = f"{self.store.uri}/{self._ended_key}"
            what = "whether the sweep has ended is found anew"
            log.warning("%s: damaged, %s; %s", where, damage(error), what)
        return None

    def end(self, ended: Ended) -> None:
        """Write once that the sweep has ended; an earlier such document stays."""
        with contextlib.suppress(SlotError):  # a damaged one stands there, which `ended` tells
            create_document(self.store, self._ended_key, ended.to_json())

    def num_slots(self, num_trials: int) -> int:
        """The number of slots: `num_trials`, or more if the sweep has drawn more."""
        count = num_trials
        while self.slot(count).spec() is not None:
            count += 1
        return count

    def read_slots(
        self, numbers: Sequence[int], read: Callable[[Slot], T]
    ) -> Iterator[tuple[int, T | SlotError]]:
        """What `read` gives for each slot, in their order; of a damaged one its error.

        Side by side: a bucket answers each small read in tens of milliseconds, and a trial asks for
        some 170 documents of twelve slots before its first step. Raises what else `read` raises.
        """

        def read_one(number: int) -> T | SlotError:
            try:
                return read(self.slot(number))
            except SlotError as error:  # ends no other slot's trial
                return error

        with ThreadPoolExecutor(READERS) as pool:
            yield from zip(numbers, pool.map(read_one, numbers), strict=True)

    def committed(self, num_trials: int) -> Iterator[tuple[Slot, Spec, Result]]:
        """Every committed slot that is neither excluded nor damaged, with its documents."""

        def read(slot: Slot) -> tuple[Slot, Spec | None, Result | None, str | None]:
            return slot, slot.spec(), slot.result(), slot.exclusion()

        for _, found in self.read_slots(range(num_trials), read):
            if isinstance(found, SlotError):
                log.warning("not counted: %s", found)
                continue
            slot, spec, result, excluded = found
            if spec is not None and result is not None and excluded is None:
                yield slot, spec, result

    def _read(self, key: str, kind: type[AnyRecord]) -> AnyRecord | None:
        """A document as a record; None if it is absent. Raises `SlotError`, `ValidationError`."""
        document = read_document(self.store, key)
        return kind.model_validate(document.content) if document else None

    @property
    def _identity_key(self) -> str:
        return f"{self.folder}/sweep.json"

    @property
    def _ended_key(self) -> str:
        return f"{self.folder}/ended.json"

    @contextlib.contextmanager
    def _damage_told(self) -> Iterator[None]:
        """Raise `SettingsError` for a damaged identity, with which no trial can be compared."""
        way_out = "put it back, or start another sweep with another JOB_SWEEP_NAME"
        try:
            yield
        except SlotError as error:
            raise SettingsError(f"{error}; {way_out}") from error
        except ValidationError as error:
            where = f"{self.store.uri}/{self._identity_key}"
            raise SettingsError(f"{where}: damaged, {damage(error)}; {way_out}") from error


def check_sweep(ledger: Ledger) -> None:
    """Refuse a sweep that does not exist: a misspelt name. Raises `SettingsError`."""
    if ledger.identity() is None:
        raise SettingsError(
            f"JOB_OUTPUT_URI, JOB_SWEEP_NAME: there is no sweep {ledger.sweep} in"
            f" {ledger.store.uri}"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`name: old -> new` for every difference, nested names joined by dots."""
    before, after = _flatten(old), _flatten(new)
    return [
        f"{name}: {before.get(name, 'not set')} -> {after.get(name, 'not set')}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
