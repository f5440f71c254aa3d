"""`JOB_WARM_START_URI`: the best trial of an earlier sweep, as a point of this one.

It is read once, before the first trial of the sweep; its `sweep.json` then holds the point, so that
all workers draw alike whatever becomes of the earlier sweep.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from job.errors import CredentialsError, OutageError, SettingsError, SweepError
from job.ledger.ledger import Ledger
from job.ledger.records import Identity, Recipe, Result, Spec, WarmStart
from job.ledger.slot import Slot
from job.settings import SWEEP_FOLDER, Settings, variable
from job.store import open_store
from job.sweep.definition import SweepDefinition, parse_definition
from job.sweep.distributions import contains, nearest

SETTING = "JOB_WARM_START_URI"
_WAY_OUT = "name another sweep, or unset it"


@dataclass(frozen=True)
class EarlierBest:
    """The best committed trial of an earlier sweep, and the base it was trained on."""

    uri: str  # the sweep's folder
    slot: int
    eval_loss: float
    recipe: Recipe
    base_model: str
    revision: str | None
    vocabulary: str | None  # None: begun by a version that did not note it


def read_earlier_best(
    settings: Settings, definition: SweepDefinition, ledger: Ledger
) -> EarlierBest | None:
    """The best trial to start from; None without the setting, or once the sweep has begun.

    Raises `SettingsError` for what no sweep can start from, and what the earlier store raises.
    """
    uri = settings.warm_start_uri
    if uri is None or ledger.identity() is not None:
        return None
    if settings.wandb_sweep_id is not None:
        raise SettingsError(f"{SETTING}: W&B draws this sweep's points; unset it or WANDB_SWEEP_ID")
    if definition.method != "bayes":
        what = f"the sweep's method is {definition.method}, which starts from no point"
        raise SettingsError(f"{SETTING}: {what}; unset it, or use bayes")
    found = SWEEP_FOLDER.fullmatch(uri)
    assert found is not None, "the setting was checked"
    store = open_store(
        found["output"] or ".", outage_seconds=60 * settings.outage_minutes, setting=SETTING
    )
    return best_of(Ledger(store, found["sweep"]), uri)


def best_of(earlier: Ledger, uri: str) -> EarlierBest:
    """The best committed trial of a sweep, whose folder people know as `uri`; as above."""
    try:
        identity = _identity(earlier, uri)
        spec, slot, result = _best(earlier, uri)
    except (OutageError, CredentialsError) as error:
        way_out = "once this sweep has begun, it is not read again"
        raise type(error)(f"{SETTING}: {error} ({way_out})") from error
    assert result.eval_loss is not None
    return EarlierBest(
        uri=uri,
        slot=slot.number,
        eval_loss=result.eval_loss,
        recipe=spec.recipe,
        base_model=identity.base_model_name,
        revision=identity.base_model.revision,
        vocabulary=identity.vocabulary,
    )


def _identity(earlier: Ledger, uri: str) -> Identity:
    """The earlier sweep's identity. Raises `SettingsError` if it is none of ours."""
    try:
        identity = earlier.identity()
    except SettingsError as error:
        raise SettingsError(f"{SETTING}: {str(error).partition('; ')[0]}; {_WAY_OUT}") from error
    if identity is None:
        raise SettingsError(f"{SETTING}: there is no sweep in {uri}; {_WAY_OUT}")
    try:
        parse_definition(identity.searched, where=f"{uri}/sweep.json", free_name=True)
    except SweepError as error:
        first = str(error).splitlines()[0]
        raise SettingsError(f"{SETTING}: not a sweep like this one: {first}; {_WAY_OUT}") from error
    return identity


def _best(earlier: Ledger, uri: str) -> tuple[Spec, Slot, Result]:
    """The committed trial with the lowest eval/loss. Raises `SettingsError` if there is none.

    Excluded and diverged trials do not count. Slots are found by listing: one that it misses makes
    the start less good, and nothing wrong.
    """
    pattern = re.compile(re.escape(f"{earlier.folder}/slots/") + r"(\d{4})/")
    keys = earlier.store.list(f"{earlier.folder}/slots/")
    numbers = {int(found[1]) for found in map(pattern.match, keys) if found}
    judged = [
        (result.eval_loss, slot.number, spec, slot, result)
        for slot, spec, result in earlier.committed(max(numbers, default=-1) + 1)
        if result.eval_loss is not None and result.status != "diverged"
    ]
    if not judged:
        raise SettingsError(
            f"{SETTING}: no trial of {uri} is committed with an adapter; wait for one, or unset it"
        )
    _, _, spec, slot, result = min(judged, key=lambda trial: trial[:2])
    return spec, slot, result


def check_vocabulary_as_earlier(earlier: EarlierBest, identity: Identity) -> None:
    """Refuse another vocabulary: losses a token of two tokenizers have nothing in common.

    Raises `SettingsError`.
    """
    if earlier.vocabulary is None:
        is_same = earlier.revision == identity.base_model.revision
        why = "which does not say its vocabulary and has another base"
    else:
        is_same = earlier.vocabulary == identity.vocabulary
        why = "whose tokenizer has another vocabulary"
    if not is_same:
        raise SettingsError(
            f"{SETTING}: {earlier.uri} was begun with {earlier.base_model}, {why} than"
            f" {identity.base_model_name}; {_WAY_OUT}"
        )


def warm_start_of(earlier: EarlierBest, definition: SweepDefinition) -> WarmStart:
    """The earlier best as a point of this sweep: its values, or the nearest that can be drawn."""
    params = {
        name: nearest(domain, getattr(earlier.recipe, name))
        for name, domain in definition.parameters.items()
    }
    return WarmStart(params=params, slot=earlier.slot, eval_loss=earlier.eval_loss)


def describe(earlier: EarlierBest, definition: SweepDefinition, settings: Settings) -> str:
    """Say where the sweep starts from, and what of that trial it takes otherwise."""
    told = f"eval/loss {earlier.eval_loss:.4f} there"
    lines = [f"slot {earlier.slot} of {earlier.uri} ({told}): its point is tried second"]
    for name, setting in settings.hyperparameters.items():
        value, domain = getattr(earlier.recipe, name), definition.parameters.get(name)
        if domain is None and value != setting:
            lines.append(f"{name}: {value} there, not searched here: {setting} ({variable(name)})")
        if domain is not None and not contains(domain, value):
            near = nearest(domain, value)
            lines.append(
                f"{name}: {value} there, which this sweep cannot draw: {near}, the nearest"
            )
    return "\n".join(lines)
