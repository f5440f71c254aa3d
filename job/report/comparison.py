"""Which trials of a sweep can be told apart on its held-out rows, and which one to take."""

from __future__ import annotations

import hashlib
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from job.errors import SlotError, StoreError
from job.ledger.ledger import Ledger
from job.ledger.records import Answers, MergeLosses, RowLosses, damage
from job.log import log
from job.progress import size
from job.report.overview import READERS, Overview, SlotView, read_overview
from job.store.base import Store
from job.winner.answers import newest_answers, that_count
from job.winner.intervals import LEVEL, Comparison, Interval, compare

SMALLER = 0.9  # an adapter of this share of the best one's bytes is worth a word


def read_compared(ledger: Ledger, num_trials: int) -> Overview:
    """Read a sweep, compare its trials, and read what merges measured: small files of each."""
    overview = read_overview(ledger, num_trials)
    comparison = compare_trials(ledger.store, overview)
    return replace(
        overview,
        comparison=comparison,
        merges=_merges(ledger, overview),
        answers=_answers(ledger, overview),
    )


def _answers(ledger: Ledger, overview: Overview) -> Answers | None:
    """The newest answers, those of trials that are still judged; None where nobody asked."""
    found = newest_answers(ledger)
    judged = [view.result for view in overview.slots if view.judged and view.result]
    return None if found is None else that_count(found, judged)


def _merges(ledger: Ledger, overview: Overview) -> dict[int, MergeLosses]:
    """What `job best --merge` measured, by slot; a damaged document is told and left out."""

    def read(view: SlotView) -> MergeLosses | None:
        try:
            return ledger.slot(view.slot).merge_losses()
        except SlotError as error:
            log.warning("%s", error)
            return None

    judged = [view for view in overview.slots if view.judged]
    with ThreadPoolExecutor(READERS) as pool:
        found = zip(judged, pool.map(read, judged), strict=True)
        return {view.slot: losses for view, losses in found if losses is not None}


def compare_trials(store: Store, overview: Overview) -> Comparison | None:
    """Compare the best trial with every other on their rows; None where no rows were kept."""
    if overview.best is None:
        return None
    judged = [view for view in overview.slots if view.judged]
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda view: read_rows(store, view), judged)
        rows = {view.slot: r for view, r in zip(judged, found, strict=True) if r is not None}
    return compare(rows, overview.best.slot)


def read_rows(store: Store, view: SlotView) -> RowLosses | None:
    """The evaluation of a committed trial by row; None if it kept none, or if it is damaged."""
    key = view.result.rows_key if view.result else None
    if key is None:
        return None
    try:
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "rows.json"
            store.download(key, path)
            content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() not in key:
            raise ValueError("its sha256 is another")
        return RowLosses.model_validate_json(content)
    except FileNotFoundError:
        what = "is gone"
    except ValidationError as error:
        what = f"is damaged, {damage(error)}"
    except (StoreError, ValueError) as error:
        what = f"cannot be read: {error}"
    log.warning("slot %d is not compared: %s/%s %s", view.slot, store.uri, key, what)
    return None


def recommendation(overview: Overview) -> str | None:
    """Say in a sentence which trial to take, and what cannot be told apart from it."""
    found = overview.comparison
    if found is None:
        return None
    rows = f"these {found.num_rows} rows"
    if not found.ties:
        closest = min(found.behind, key=lambda slot: found.behind[slot].estimate)
        ahead = in_millinats(found.behind[closest])
        return f"take slot {found.best}: it beats every other on {rows}, slot {closest} by {ahead}"
    tied = _slots(sorted(found.ties))
    sentence = f"take slot {found.best}; {tied} cannot be told apart from it on {rows}"
    views = {view.slot: view for view in overview.slots}
    if (smaller := _smallest(views[found.best], [views[slot] for slot in found.ties])) is not None:
        sentence += (
            f"; slot {smaller.slot}'s adapter is smaller, {size(smaller.adapter_bytes or 0)} for"
            f" {size(views[found.best].adapter_bytes or 0)}: `job best --slot {smaller.slot}`"
        )
    return sentence


def in_millinats(interval: Interval) -> str:
    """An interval in thousandths of a nat: 1.2 ± 0.9 mnat."""
    return f"{1000 * interval.estimate:.1f} ± {1000 * interval.half_width:.1f} mnat"


def comparison_json(overview: Overview) -> dict[str, Any] | None:
    """The comparison for a program; losses in nats."""
    found = overview.comparison
    if found is None:
        return None
    return {
        "best": found.best,
        "num_rows": found.num_rows,
        "level": LEVEL,  # of all intervals together
        "recommendation": recommendation(overview),
        "behind": [
            {
                "slot": slot,
                "nats": interval.estimate,
                "half_width": interval.half_width,
                "standard_error": interval.standard_error,
                "tied": slot in found.ties,
            }
            for slot, interval in sorted(found.behind.items())
        ],
    }


def _smallest(best: SlotView, ties: list[SlotView]) -> SlotView | None:
    """The tied trial with the smallest adapter, if it is clearly smaller than the best one's."""
    if not best.adapter_bytes:
        return None
    limit = SMALLER * best.adapter_bytes
    smaller = [view for view in ties if view.adapter_bytes and view.adapter_bytes <= limit]
    return min(smaller, key=lambda v: (v.adapter_bytes, v.eval_loss, v.slot), default=None)


def _slots(numbers: list[int]) -> str:
    """Slots in words: slot 2; slots 2 and 5; slots 2, 5 and 7."""
    if len(numbers) == 1:
        return f"slot {numbers[0]}"
    return f"slots {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
