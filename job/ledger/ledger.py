"""The sweep's ledger in the bucket: identity, slots, specs, results. The bucket is the truth.

    sweeps/<sweep>/sweep.json                 create-once: the identity
    sweeps/<sweep>/slots/<NNNN>/spec.json     create-once: what the slot computes
    sweeps/<sweep>/slots/<NNNN>/result.json   create-once: THE COMMIT
    sweeps/<sweep>/slots/<NNNN>/failed.json   create-once: given up, with the reason
    sweeps/<sweep>/slots/<NNNN>/excluded.json create-once: a person took it out, with the reason
    sweeps/<sweep>/slots/<NNNN>/redo-<g>.json create-once: a person began the slot again, and
    sweeps/<sweep>/slots/<NNNN>/redo-<g>/     holds all of that generation; 0 has no such folder

Slots 0 to N-1 are read by name; nothing here rests on listing a bucket.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from job.errors import DamagedError, SettingsError, SlotError
from job.log import log
from job.store.base import Store
from job.store.documents import Document, Json, create_document, read_document

LEDGER_SCHEMA = 1

SlotState = Literal["empty", "specified", "committed", "failed", "excluded"]


class Ledger:
    """The documents of one sweep."""

    def __init__(self, store: Store, sweep: str, pins: Mapping[int, int] | None = None) -> None:
        """`pins`: slots whose generation is given, where others' is read from the store."""
        self.store = store
        self.sweep = sweep
        self._root = f"sweeps/{sweep}"
        self._pins = dict(pins or {})

    def generation(self, slot: int) -> int:
        """How often the slot was begun again: the redo documents that exist, read by name."""
        return self._pins[slot] if slot in self._pins else self._newest_generation(slot)

    def pin(self, slot: int, generation: int | None = None) -> Ledger:
        """This ledger, with the slot seen in one generation whatever others begin meanwhile."""
        pinned = self.generation(slot) if generation is None else generation
        return Ledger(self.store, self.sweep, {**self._pins, slot: pinned})

    def is_current(self, slot: int) -> bool:
        """The slot was not begun again since it was pinned."""
        return self.generation(slot) == self._newest_generation(slot)

    def redo_key(self, slot: int, generation: int) -> str:
        """The document whose existence begins that generation."""
        return f"{self._root}/slots/{slot:04d}/redo-{generation}.json"

    def slot_prefix(self, slot: int) -> str:
        """Where everything of the slot's generation lies, without a trailing slash."""
        generation = self.generation(slot)
        folder = f"/redo-{generation}" if generation else ""
        return f"{self._root}/slots/{slot:04d}{folder}"

    def _newest_generation(self, slot: int) -> int:
        generation = 0
        try:
            while self.store.get(self.redo_key(slot, generation + 1)) is not None:
                generation += 1
        except DamagedError as error:  # no redo gets past it
            raise SlotError(f"slot {slot}: {error}; remove it") from error
        return generation

    def report_key(self, file_name: str) -> str:
        """Where `job report` writes a file for people."""
        return f"{self._root}/{file_name}"

    def identity(self) -> Json | None:
        """What the sweep's first trial froze; None before it."""
        document = read_document(self.store, f"{self._root}/sweep.json")
        return document.content if document else None

    def open_sweep(self, identity: Mapping[str, Any]) -> None:
        """Freeze the identity, or check ours against the frozen one.

        Raises as `check_identity`.
        """
        key = f"{self._root}/sweep.json"
        create_document(self.store, key, {**identity, "ledger_schema": LEDGER_SCHEMA})
        self.check_identity(identity)

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Compare with the frozen identity, if the sweep has begun.

        Raises `SettingsError` with a line `name: old -> new` for every difference. Names that
        begin with `_` are information and not compared; those under `_rows` say what is behind
        other prepared rows.
        """
        if (frozen := self.identity()) is None:
            return
        new = {**identity, "ledger_schema": LEDGER_SCHEMA}
        if changed := differences(_compared(frozen), _compared(new)):
            changed += differences(frozen.get("_rows", {}), new.get("_rows", {}))
            raise SettingsError(
                f"sweep {self.sweep} was started with other settings (old -> new):\n  "
                + "\n  ".join(changed)
                + "\nset them back, or start another sweep with another JOB_SWEEP_NAME"
            )

    def spec(self, slot: int) -> Json | None:
        """What the slot computes; None if it was never drawn. Raises `SlotError` if damaged."""
        document = self._read(slot, "spec.json")
        if document is not None and "recipe" not in document.content:
            what = f"slot {slot}: its spec.json is damaged, it has no recipe"
            raise SlotError(f"{what}; {begin_again(slot)}")
        return document.content if document else None

    def specify(self, slot: int, spec: Mapping[str, Any]) -> Json:
        """Write the slot's spec once; return the one that holds, ours or an earlier one."""
        return self._create(slot, "spec.json", spec).content

    def result(self, slot: int) -> Json | None:
        """The slot's commit; None if it is open. Raises `SlotError` if it is damaged."""
        document = self._read(slot, "result.json")
        if document is None:
            return None
        if not isinstance(document.content.get("status"), str):
            raise SlotError(
                f"slot {slot}: {self.store.uri}/{self.slot_prefix(slot)}/result.json is damaged,"
                f" it has no status; {begin_again(slot)}"
            )
        return document.content

    def commit(self, slot: int, result: Mapping[str, Any]) -> bool:
        """Commit the slot; False if another attempt committed it before, which then holds."""
        return self._create(slot, "result.json", result).ours

    def close(self, slot: int, reason: str) -> None:
        """Give the slot up for good: it makes no progress."""
        self._create(slot, "failed.json", {"reason": reason})

    def failure(self, slot: int) -> str | None:
        """Why the slot was given up; None if it was not."""
        document = self._read(slot, "failed.json")
        return str(document.content.get("reason")) if document else None

    def exclude(self, slot: int, reason: str) -> bool:
        """Take the slot out of the sweep; False if it was taken out before."""
        return self._create(slot, "excluded.json", {"reason": reason}).ours

    def exclusion(self, slot: int) -> str | None:
        """Why a person took the slot out of the sweep; None if nobody did."""
        document = self._read(slot, "excluded.json")
        return str(document.content.get("reason")) if document else None

    def is_open(self, slot: int) -> bool:
        """Neither committed, nor given up, nor excluded."""
        view = self.pin(slot)
        closed = (view.result(slot), view.failure(slot), view.exclusion(slot))
        return closed == (None, None, None)

    def state(self, slot: int) -> SlotState:
        """Where the slot stands."""
        view = self.pin(slot)
        if view.exclusion(slot) is not None:
            return "excluded"
        if view.result(slot) is not None:
            return "committed"
        if view.failure(slot) is not None:
            return "failed"
        return "specified" if view.spec(slot) is not None else "empty"

    def num_slots(self, num_trials: int) -> int:
        """`num_trials`, or more if the sweep has drawn more."""
        count = num_trials
        while self.pin(count).spec(count) is not None:
            count += 1
        return count

    def committed(self, num_trials: int) -> Iterator[tuple[int, Json, Json]]:
        """Slot, spec and result of every committed slot that is neither excluded nor damaged."""
        for slot in range(num_trials):
            try:
                view = self.pin(slot)
                result, spec = view.result(slot), view.spec(slot)
                excluded = view.exclusion(slot) is not None
            except SlotError as error:  # ends no other slot's trial
                log.warning("not counted: %s", error)
                continue
            if spec is not None and result is not None and not excluded:
                yield slot, spec, result

    def _read(self, slot: int, name: str) -> Document | None:
        key = f"{self.slot_prefix(slot)}/{name}"
        with damage_told(slot):
            return read_document(self.store, key)

    def _create(self, slot: int, name: str, content: Mapping[str, Any]) -> Document:
        key = f"{self.slot_prefix(slot)}/{name}"
        with damage_told(slot):
            return create_document(self.store, key, content)


@contextlib.contextmanager
def damage_told(slot: int) -> Iterator[None]:
    """A damaged document is told with its slot and what helps."""
    try:
        yield
    except (SlotError, DamagedError) as error:
        raise SlotError(f"slot {slot}: {error}; {begin_again(slot)}") from error


def begin_again(slot: int) -> str:
    """The way out of a damaged slot."""
    return f"`job redo {slot}` begins it again"


def check_sweep(ledger: Ledger) -> None:
    """Refuse a sweep that does not exist: a misspelt name. Raises `SettingsError`."""
    if ledger.identity() is None:
        raise SettingsError(
            f"JOB_OUTPUT_URI, JOB_SWEEP_NAME: there is no sweep {ledger.sweep} in"
            f" {ledger.store.uri}"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line `name: old -> new` for every difference, nested names joined by dots."""
    before, after = _flatten(old), _flatten(new)
    return [
        f"{name}: {before.get(name, 'not set')} -> {after.get(name, 'not set')}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


def _compared(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Names that begin with `_` are information."""
    return {name: value for name, value in identity.items() if not name.startswith("_")}


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
