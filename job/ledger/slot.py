"""`Slot`: one slot of a sweep in one generation; its documents, each read and written as a record.

A slot is begun again (`job redo`) as its next generation, in a folder of its own. A `Slot` stays
with the generation it was made for, whatever others begin meanwhile. That is the second fence
beside the lease: what an attempt wrote before a redo is never taken for what comes after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from pydantic import ValidationError

from job.errors import CredentialsError, DamagedError, SlotError
from job.ledger.records import Account, Closure, Lease, MergeLosses, Record, Result, Spec, damage
from job.store.base import Store
from job.store.documents import Document, create_document, read_document, swap_document

if TYPE_CHECKING:
    from job.ledger.ledger import Ledger

SlotState = Literal["empty", "specified", "committed", "failed", "excluded"]
# What an attempt uploads into its slot's folder: after the spec was written, never before.
UPLOADS = ("adapter-", "best-", "checkpoints/", "history-", "rows-")
AnyRecord = TypeVar("AnyRecord", bound=Record)


class StoredLease(NamedTuple):
    """A lease as it stands in the store, the version to swap it by, and whether we wrote it."""

    lease: Lease
    version: str
    ours: bool


@dataclass(frozen=True)
class Slot:
    """One slot in one generation. A damaged document raises `SlotError`, which says what helps."""

    ledger: Ledger
    number: int
    generation: int  # how often the slot was begun again
    is_earlier: bool = field(default=False, compare=False)  # a later generation is known to count

    @property
    def store(self) -> Store:
        """The store that holds the slot's documents."""
        return self.ledger.store

    @property
    def folder(self) -> str:
        """The key under which all of this generation lies, without a trailing slash."""
        inside = f"/redo-{self.generation}" if self.generation else ""
        return f"{self.ledger.folder}/slots/{self.number:04d}{inside}"

    def key(self, name: str) -> str:
        """The key of a document or a folder of this slot."""
        return f"{self.folder}/{name}"

    def earlier(self) -> list[Slot]:
        """The slot in each generation before this one."""
        return [
            replace(self, generation=generation, is_earlier=True)
            for generation in range(self.generation)
        ]

    def is_current(self) -> bool:
        """Whether this is the slot's newest generation."""
        return self.generation == self.ledger.slot(self.number).generation

    def spec(self) -> Spec | None:
        """The slot's frozen spec; None if it was never drawn."""
        return self._read_once("spec.json", Spec)

    def specify(self, spec: Spec) -> Spec:
        """Write the slot's spec once; return the one that holds, ours or an earlier one."""
        document = self._create("spec.json", spec)
        return self._checked(self.key("spec.json"), document, Spec)

    def result(self) -> Result | None:
        """The slot's commit; None if it is open."""
        result = self._read_once("result.json", Result)
        if result is not None:
            self._check_own("result.json", result.adapter_key, result.history_key, result.rows_key)
        return result

    def commit(self, result: Result) -> bool:
        """Commit the slot; False if another attempt committed it before, which then holds."""
        return self._create("result.json", result).ours

    def failure(self) -> str | None:
        """Why the slot was given up; None if it was not."""
        closure = self._read_once("failed.json", Closure)
        return closure.reason if closure else None

    def give_up(self, reason: str) -> None:
        """Close the slot for good: it makes no progress."""
        self._create("failed.json", Closure(reason=reason))

    def exclusion(self) -> str | None:
        """Why a person took the slot out of the sweep; None if nobody did."""
        closure = self._read_once("excluded.json", Closure)
        return closure.reason if closure else None

    def exclude(self, reason: str) -> bool:
        """Take the slot out of the sweep; False if it was taken out before."""
        return self._create("excluded.json", Closure(reason=reason)).ours

    def merge_losses(self) -> MergeLosses | None:
        """What `job best --merge` measured of the slot's adapter last; None if it never did."""
        return self._read("merge.json", MergeLosses)

    def write_merge_losses(self, losses: MergeLosses) -> None:
        """Keep what a merge measured, in place of what an earlier one did."""
        with self._damage_told():
            document = create_document(self.store, self.key("merge.json"), losses.to_json())
            if not document.ours:
                swap_document(
                    self.store, self.key("merge.json"), losses.to_json(), document.version
                )

    def is_open(self) -> bool:
        """Whether the slot is neither committed, nor given up, nor excluded."""
        closing = (self.result, self.failure, self.exclusion)
        with ThreadPoolExecutor(len(closing)) as pool:
            return list(pool.map(lambda read: read(), closing)) == [None] * len(closing)

    def damage_without_spec(self) -> str | None:
        """What lies here that cannot be without a spec, where there is none; None if nothing does.

        Uploads are found by listing, which finds damage and never decides what counts: who may not
        list sees none.
        """
        with ThreadPoolExecutor(3) as pool:
            result, lease = pool.submit(self.result), pool.submit(self.lease)
            keys = pool.submit(self.store.list, self.key(""))
        if result.result() is not None:
            return "a result.json"
        if (stored := lease.result()) is not None and stored.lease.checkpoints:
            return "checkpoints"
        with contextlib.suppress(CredentialsError):
            names = (key.removeprefix(self.key("")) for key in keys.result())
            return next((name for name in names if name.startswith(UPLOADS)), None)
        return None

    def state(self) -> SlotState:
        """The slot's state, by the documents that exist."""
        if self.exclusion() is not None:
            return "excluded"
        if self.result() is not None:
            return "committed"
        if self.failure() is not None:
            return "failed"
        return "specified" if self.spec() is not None else "empty"

    def lease(self) -> StoredLease | None:
        """The lease of who holds the slot, or held it last; None if nobody ever did."""
        key = self.key("lease.json")
        with self._damage_told():
            document = read_document(self.store, key)
        return self._stored_lease(document) if document else None

    def create_lease(self, lease: Lease) -> StoredLease:
        """Write the slot's first lease; return the one that stands there now."""
        return self._ours_or_anothers(self._create("lease.json", lease))

    def swap_lease(self, lease: Lease, version: str) -> StoredLease:
        """Replace the lease if its version is `version`; return the one that stands there now."""
        key = self.key("lease.json")
        with self._damage_told():
            document = swap_document(self.store, key, lease.to_json(), version)
        return self._ours_or_anothers(document)

    def write_account(self, account: Account) -> None:
        """Create an attempt's document, or complete it if it is open; twice is harmless."""
        key = self.key(f"attempts/{account.epoch}-{account.owner}.json")
        with self._damage_told():
            document = create_document(self.store, key, account.to_json())
            if account.state == "ended" and document.content.get("state") == "open":
                swap_document(self.store, key, account.to_json(), document.version)

    def accounts(self) -> list[Account]:
        """The accounts of the slot's attempts, for people: their documents are found by listing."""
        keys = self.store.list(self.key("attempts/"))
        with self._damage_told():
            documents = [(key, read_document(self.store, key)) for key in keys]
        return [self._checked(key, document, Account) for key, document in documents if document]

    def _read_once(self, name: str, kind: type[AnyRecord]) -> AnyRecord | None:
        """A create-once document, asked for until it is there."""
        return self.ledger.once(self.key(name), lambda _: self._read(name, kind))

    def _read(self, name: str, kind: type[AnyRecord]) -> AnyRecord | None:
        with self._damage_told():
            document = read_document(self.store, self.key(name))
        return self._checked(self.key(name), document, kind) if document else None

    def _create(self, name: str, record: Record) -> Document:
        """Create a document once; return the one that holds, ours or an earlier one."""
        with self._damage_told():
            return create_document(self.store, self.key(name), record.to_json())

    def _stored_lease(self, document: Document) -> StoredLease:
        lease = self._checked(self.key("lease.json"), document, Lease)
        for checkpoint in lease.checkpoints:
            self._check_own("lease.json", checkpoint.key, checkpoint.best)
        return StoredLease(lease, document.version, document.ours)

    def _ours_or_anothers(self, document: Document) -> StoredLease:
        """The lease after a write: one that cannot be read is another's, whatever it says."""
        try:
            return self._stored_lease(document)
        except SlotError:
            if document.ours:
                raise
            return StoredLease(Lease(owner="", epoch=0, state="held"), document.version, ours=False)

    def _check_own(self, name: str, *keys: str | None) -> None:
        """Refuse a document that names another slot's folder: what it names is deleted one day."""
        for key in keys:
            if key is not None and not key.startswith(f"{self.folder}/"):
                with self._damage_told():
                    where = f"{self.store.uri}/{self.key(name)}"
                    raise SlotError(f"{where}: damaged, it names {key}, which is not this slot's")

    def _checked(self, key: str, document: Document, kind: type[AnyRecord]) -> AnyRecord:
        with self._damage_told():
            try:
                return kind.model_validate(document.content)
            except ValidationError as error:
                what = f"{self.store.uri}/{key}: damaged, {damage(error)}"
                raise SlotError(what) from error

    @contextlib.contextmanager
    def _damage_told(self) -> Iterator[None]:
        """Add the slot and the way out to the error of a damaged document."""
        try:
            yield
        except (SlotError, DamagedError) as error:
            way_out = "it was begun again since" if self.is_earlier else begin_again(self.number)
            raise SlotError(f"slot {self.number}: {error}; {way_out}") from error


def begin_again(number: int) -> str:
    """The way out of a damaged slot, in words."""
    return f"`job redo {number}` begins it again"
