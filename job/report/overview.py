"""A sweep as its bucket holds it: one `SlotView` a slot, read by name, damaged ones included."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from job.errors import ExitCode, SlotError
from job.ledger.accounts import FRESH, NOTHING, Cost, account, cost_of, read_accounts
from job.ledger.ledger import Ledger
from job.ledger.records import (
    Account,
    Answers,
    AttemptProgress,
    Ended,
    Identity,
    Lease,
    MergeLosses,
    Result,
    Spec,
    Status,
)
from job.ledger.slot import Slot
from job.log import log
from job.sweep.definition import SweepDefinition, parse_definition
from job.sweep.distributions import contains
from job.training.quantization import price_of_4_bits
from job.winner.intervals import Comparison

State = Literal[
    "empty",  # not drawn
    "running",  # drawn, and somebody holds its lease
    "waiting",  # drawn, nobody is at work on it
    "given up",
    "excluded",  # by a person
    "damaged",
    "completed", "truncated", "stopped", "diverged", "infeasible",  # committed
]  # fmt: skip
COMMITTED = get_args(Status)
READERS = 8  # slots read at once: a bucket answers in tens of milliseconds


BEGUN_AGAIN = "begun again"
# Why an attempt's GPU time came to nothing, by its exit code; None: it could not leave one.
CAUSES: dict[int | None, str] = {
    ExitCode.OK: "loading and waiting",
    ExitCode.PREEMPTED: "preempted",
    None: "killed without notice",
    ExitCode.OUTAGE: "outages and hangs",
    ExitCode.GPU: "GPU faults",
    ExitCode.BUG: "bugs",
}


@dataclass(frozen=True)
class Charge:
    """What one attempt cost."""

    place: str  # the node's name
    hourly_usd: float | None  # None: the attempt tells no price
    gpu_seconds: float
    wasted_seconds: float = 0.0  # of them, those on which nothing later rests
    cause: str = ""  # of the waste


@dataclass(frozen=True)
class SlotView:
    """A slot as a person sees it; None where the bucket does not say."""

    slot: int
    state: State
    reason: str | None = None  # how it ended, or why it is damaged
    params: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None  # optimizer steps done
    planned_steps: int | None = None
    eval_loss: float | None = None  # the adapter's; before the commit the last evaluation's
    best_step: int | None = None
    curve: tuple[tuple[int, float], ...] = ()  # (step, eval/loss), finite ones
    attempts: int = 0
    generation: int = 0  # how often a person began it again
    node: str | None = None
    tokens_per_second: float | None = None
    lease_age_seconds: float | None = None  # since the holder last renewed it
    cost: Cost = NOTHING  # of all attempts
    trial_cost: Cost = NOTHING  # of those since it was begun, or begun again
    charges: tuple[Charge, ...] = ()  # what each attempt cost
    gpu: str | None = None  # the name of the newest attempt's card
    wasted_gpu_seconds: float = 0.0  # for steps done twice, restarts and waiting
    training_seconds: float | None = None
    peak_memory_bytes: int | None = None
    adapter_key: str | None = None
    adapter_bytes: int | None = None
    committed_at: str | None = None
    wandb_sweep: str | None = None  # that drew its parameters; None: the built-in engine
    result: Result | None = None

    @property
    def gpu_seconds(self) -> float:
        """GPU-seconds of all attempts."""
        return self.cost.gpu_seconds

    @property
    def judged(self) -> bool:
        """Whether it is committed with an adapter that may be the best."""
        return self.state in COMMITTED and self.state != "diverged" and self.eval_loss is not None


@dataclass(frozen=True)
class Overview:
    """A sweep as its bucket holds it."""

    sweep: str
    uri: str
    identity: Identity | None  # None before the first trial
    slots: tuple[SlotView, ...]
    ended: Ended | None = None  # why no new slot is begun, if JOB_MIN_GAIN does not overrule it
    merges: Mapping[int, MergeLosses] = field(default_factory=dict)  # by slot, where asked for
    answers: Answers | None = None  # the newest, where asked for
    comparison: Comparison | None = None  # of the best with the others, where it was asked for

    @property
    def definition(self) -> SweepDefinition | None:
        """The sweep's definition, as its first trial froze it; None before that."""
        frozen = self.identity.searched if self.identity else None
        if not frozen:
            return None
        return parse_definition(frozen, where=f"{self.uri}: sweep.json", free_name=True)

    @property
    def base_model(self) -> str:
        return self.identity.base_model_name if self.identity else ""

    @property
    def best(self) -> SlotView | None:
        """The committed trial with the lowest eval/loss; None before the first."""
        judged = [view for view in self.slots if view.judged]
        return min(judged, key=lambda view: (view.eval_loss, view.slot), default=None)

    @property
    def comparable(self) -> list[SlotView]:
        """The judged trials whose parameters the sweep can give, for charts and importances."""
        definition = self.definition
        domains = definition.parameters if definition else {}
        return [
            view
            for view in self.slots
            if view.judged and all(contains(d, view.params.get(n)) for n, d in domains.items())
        ]

    @property
    def cost(self) -> Cost:
        """The cost of all attempts at all slots."""
        return sum((view.cost for view in self.slots), NOTHING)

    @property
    def gpu_seconds(self) -> float:
        """GPU-seconds of all attempts at all slots."""
        return self.cost.gpu_seconds

    @property
    def wasted_gpu_seconds(self) -> float:
        return sum(view.wasted_gpu_seconds for view in self.slots)

    @property
    def untuned(self) -> dict[str, float]:
        """The untuned base's eval/loss by `quantization`, as far as it was measured.

        At step 0 of a trial, for `none` also beside a trial in 4 bits; else by a merge.
        """
        results = [view.result for view in self.slots if view.result is not None]
        merges = self.merges.values()
        told = [
            *(
                (view.result.quantization if view.result else "nf4", loss)
                for view in self.slots
                for step, loss in view.curve[:1]
                if step == 0
            ),
            *(("none", result.untuned_16bit) for result in results),
            *(("none", merge.untuned_16bit) for merge in merges),
            *(("nf4", merge.untuned_4bit) for merge in merges),
        ]
        return {mode: loss for mode, loss in reversed(told) if loss is not None}

    @property
    def eval_rows(self) -> int | None:
        """The number of held-out rows that the trials are judged by, if a result tells it."""
        told = [view.result.eval_rows for view in self.slots if view.result is not None]
        told += [merge.num_rows for merge in self.merges.values()]
        return next((count for count in told if count is not None), None)

    @property
    def prices_of_4_bits(self) -> list[str]:
        """A sentence for every precision that was measured beside 16 bits."""
        lossy = dict(self.untuned)
        if (in_16 := lossy.pop("none", None)) is None:
            return []
        return [
            price_of_4_bits(mode, loss, in_16, self.eval_rows)
            for mode, loss in sorted(lossy.items(), reverse=True)
        ]


def read_overview(ledger: Ledger, num_trials: int, *, now: datetime | None = None) -> Overview:
    """Read every slot of the sweep, and those that a larger `JOB_NUM_TRIALS` drew beyond it.

    Ages are seconds before `now`, by default this machine's clock.
    """
    now = now or datetime.now(UTC)
    # Read first and alone: a store that fails is then told once, and Ctrl-C is heard.
    identity = ledger.identity()
    with ThreadPoolExecutor(READERS) as pool:
        views = list(pool.map(lambda slot: _view(ledger, slot, now), range(num_trials)))
    while (further := _view(ledger, len(views), now)).state != "empty":
        views.append(further)
    return Overview(ledger.sweep, ledger.store.uri, identity, tuple(views), ledger.ended())


def _view(ledger: Ledger, number: int, now: datetime) -> SlotView:
    """Read one slot; a damaged one says so and hides no other."""
    try:
        slot = ledger.slot(number)
    except SlotError as error:
        return _damaged(number, error)
    try:
        view = _view_generation(slot, now)
    except SlotError as error:
        view = _damaged(number, error)
    own, earlier = cost_of(slot), sum(map(cost_of, slot.earlier()), NOTHING)
    lease = _lease(slot)
    charges = [
        replace(charge, wasted_seconds=charge.gpu_seconds, cause=BEGUN_AGAIN)
        for before in slot.earlier()
        for charge in _charges(before, _lease(before))
    ]
    return replace(
        view,
        generation=slot.generation,
        cost=own + earlier,
        trial_cost=own,
        # What came before a redo was paid for, and nothing rests on it.
        wasted_gpu_seconds=view.wasted_gpu_seconds + earlier.gpu_seconds,
        charges=(*charges, *_charges(slot, lease)),
        gpu=lease.attempt.gpu if lease else None,
    )


def _lease(slot: Slot) -> Lease | None:
    """The lease as it stands; None without one, or where it is damaged, which `cost_of` tells."""
    try:
        stored = slot.lease()
    except SlotError:
        return None
    return stored.lease if stored else None


def _charges(slot: Slot, lease: Lease | None) -> list[Charge]:
    """What each attempt at the slot cost; none of a slot whose accounts are damaged."""
    if lease is None:
        return []
    if lease.epoch == 1:  # it is the whole account: nothing has to be listed
        return [_charge(account(lease, ended=not lease.is_held))]
    try:
        return [_charge(told) for told in read_accounts(slot)]
    except SlotError as error:
        log.warning("slot %d: what its attempts cost is not known: %s", slot.number, error)
        return []


def _charge(told: Account) -> Charge:
    cause = CAUSES.get(told.exit_code, "refused") if told.state == "ended" else ""
    place, wasted = told.node or "unknown", told.wasted_gpu_seconds or 0.0
    return Charge(place, told.hourly_usd, told.gpu_seconds, wasted, cause)


def _damaged(number: int, error: SlotError) -> SlotView:
    log.warning("slot %d is damaged: %s", number, error)
    return SlotView(number, "damaged", str(error))


def _view_generation(slot: Slot, now: datetime) -> SlotView:
    spec, result, failure, excluded = slot.spec(), slot.result(), slot.failure(), slot.exclusion()
    if spec is None:
        if excluded is not None:
            return SlotView(slot.number, "excluded", excluded)
        if (found := slot.damage_without_spec()) is not None:
            return SlotView(slot.number, "damaged", f"it has {found} but no spec.json")
        return SlotView(slot.number, "empty")
    view = _committed(slot, spec, result) if result else _open(slot, spec, failure, now)
    return replace(view, state="excluded", reason=excluded) if excluded is not None else view


def _committed(slot: Slot, spec: Spec, result: Result) -> SlotView:
    return SlotView(
        slot.number,
        result.status,
        reason=result.reason,
        params=spec.params,
        step=result.steps,
        planned_steps=spec.recipe.planned_steps,
        eval_loss=result.eval_loss,
        best_step=result.best_step,
        curve=result.finite_curve,
        attempts=result.attempts,
        tokens_per_second=result.tokens_per_second,
        wasted_gpu_seconds=result.wasted_gpu_seconds,
        training_seconds=result.training_seconds,
        peak_memory_bytes=result.peak_memory_bytes,
        adapter_key=result.adapter_key,
        adapter_bytes=result.adapter_bytes,
        committed_at=result.committed_at,
        wandb_sweep=spec.wandb_sweep,
        result=result,
    )


def _open(slot: Slot, spec: Spec, failure: str | None, now: datetime) -> SlotView:
    stored = slot.lease()
    lease = stored.lease if stored else FRESH
    attempt, is_held = lease.attempt, lease.is_held
    return SlotView(
        slot.number,
        "given up" if failure else "running" if is_held else "waiting",
        reason=failure,
        params=spec.params,
        step=attempt.step,
        planned_steps=spec.recipe.planned_steps,
        eval_loss=attempt.eval_loss,
        attempts=lease.epoch,
        node=place(attempt) if is_held else None,
        tokens_per_second=attempt.tokens_per_second if is_held else None,
        lease_age_seconds=_age(attempt.heard_at if is_held else None, now),
        wasted_gpu_seconds=lease.wasted_gpu_seconds_before,
        wandb_sweep=spec.wandb_sweep,
    )


def place(attempt: AttemptProgress | Account) -> str | None:
    """Where an attempt runs: the node, and the worker's number if it has several."""
    if attempt.worker is None:
        return attempt.node
    return f"{attempt.node or 'unknown'} [{attempt.worker}]"


def _age(moment: str | None, now: datetime) -> float | None:
    """Seconds since a time that another machine wrote, whose clock may differ: for people only."""
    if moment is None:
        return None
    return max(0.0, (now - datetime.fromisoformat(moment)).total_seconds())
