"""The sweep's name, its definition, and its identity: all that can change its eval/loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import job
from job.base_model import BaseModel
from job.data.prepared import PreparedData
from job.errors import SettingsError, SweepError
from job.file_uri import absolute
from job.ledger.accounts import now
from job.ledger.ledger import Ledger, differences
from job.ledger.records import WARM_START, Identity
from job.log import log
from job.settings import IDENTITY_FIELDS, ROW_FIELDS, Settings, variable
from job.store.base import Store
from job.sweep.definition import SweepDefinition, load_definition, parse_definition
from job.trial.warm_start import EarlierBest, check_vocabulary_as_earlier, warm_start_of
from job.wandb.client import check_wanted
from job.wandb.sweeps import check_same, read_sweep, sweep_path

CARD_SWEEP_FILE = Path(__file__).parents[1] / "sweep/sweep.yaml"


def sweep_name(settings: Settings) -> str:
    """The sweep's folder in the bucket. Raises `SweepError`, `SettingsError`."""
    if settings.wandb_sweep_id is not None:
        return settings.sweep_name or sweep_path(settings).id
    sweep = settings.sweep_name or load_sweep_file(settings).name
    if sweep is None:
        raise SettingsError(
            f"JOB_SWEEP_NAME: not set, and {settings.sweep_file} has no `name`; give either"
        )
    return sweep


def load_sweep(
    settings: Settings, store: Store, should_stop: Callable[[], None]
) -> tuple[SweepDefinition, str]:
    """The sweep's definition and its name in the bucket.

    A W&B sweep's definition is the one that its first trial froze, so that later attempts at a
    drawn slot do without W&B; before that it is read from the server. Raises `SweepError`,
    `SettingsError`, and what `read_sweep` raises.
    """
    sweep = sweep_name(settings)
    if settings.wandb_sweep_id is None:
        return load_sweep_file(settings), sweep
    check_wanted(settings)
    identity = Ledger(store, sweep).identity()
    if identity is not None and identity.sweep_file:
        definition = parse_definition(identity.searched, free_name=True)
    else:
        definition = read_sweep(settings, should_stop).definition
    if settings.sweep_file is not None:
        check_same(
            definition,
            load_sweep_file(settings),
            where=f"JOB_SWEEP_FILE: {settings.sweep_file}",
            way_out="unset it: with WANDB_SWEEP_ID the sweep on W&B holds",
        )
    return definition, sweep


def load_sweep_file(settings: Settings) -> SweepDefinition:
    """`JOB_SWEEP_FILE`, or the card's. Raises `SweepError`."""
    try:
        return load_definition(
            settings.sweep_file or CARD_SWEEP_FILE, free_name=settings.sweep_name is not None
        )
    except SweepError as error:
        raise SweepError(f"JOB_SWEEP_FILE: {error}") from error


def sweep_identity(
    settings: Settings,
    definition: SweepDefinition,
    base: BaseModel,
    data: PreparedData,
    earlier: EarlierBest | None = None,
    *,
    mixed: str | None = None,
) -> Identity:
    """All that can change eval/loss, by the name under which a person can change it.

    `mixed` is what a plain `mixed` of JOB_QUANTIZATION is for the whole sweep. Raises
    `SettingsError` if the sweep is to start from one with another vocabulary.
    """
    content = {
        **_named_by_settings(settings, definition),
        "JOB_BASE_MODEL": {"revision": base.revision},
        "JOB_DATASET_URI": {"prepared": data.digest},
        "_rows": _rows(settings),
        "_base_model": base.name,
        "_base_model_revision": settings.base_model_revision,
        "_vocabulary": data.vocabulary,
        "_code_version": job.__version__,
        "_created_at": now(),
        **({} if mixed is None else {"_mixed": mixed}),
    }
    identity = Identity.model_validate(content)
    if earlier is None:
        return identity
    check_vocabulary_as_earlier(earlier, identity)
    return identity.changed(_warm_start=warm_start_of(earlier, definition).to_json())


def warn_of_other_settings(settings: Settings, definition: SweepDefinition, ledger: Ledger) -> None:
    """Warn if a sweep without open slots was made with other settings, as far as settings tell."""
    if changed := other_settings(settings, definition, ledger):
        log.warning(
            "sweep %s was made with other settings (old -> new): %s; another JOB_SWEEP_NAME starts"
            " another sweep",
            ledger.sweep,
            "; ".join(changed),
        )


def other_settings(settings: Settings, definition: SweepDefinition, ledger: Ledger) -> list[str]:
    """`name: old -> new` for each setting that differs from the sweep's, as far as settings tell.

    Empty before the first trial. Whether base and rows are still the same is known once they are
    looked at.
    """
    frozen = ledger.identity()
    if frozen is None:
        return []
    old = frozen.compared() | frozen.rows | {"JOB_BASE_MODEL": frozen.base_model_name}
    new = Identity.model_validate(_named_by_settings(settings, definition)).compared()
    new |= _rows(settings)
    new["JOB_BASE_MODEL"] = settings.base_model
    return differences({name: old.get(name) for name in new}, new)


def _named_by_settings(settings: Settings, definition: SweepDefinition) -> dict[str, Any]:
    return {
        **{variable(field): getattr(settings, field) for field in IDENTITY_FIELDS},
        "JOB_SWEEP_FILE": {
            key: value
            for key, value in definition.to_json().items()
            if key in ("method", "metric", "parameters", "early_terminate")
        },
        **({WARM_START: absolute(uri)} if (uri := settings.warm_start_uri) else {}),
    }


def _rows(settings: Settings) -> dict[str, Any]:
    return {variable(field): getattr(settings, field) for field in ROW_FIELDS}


def base_revision(settings: Settings, ledger: Ledger) -> str:
    """The revision to load: the commit that the sweep froze, while the settings ask for the same.

    A branch such as `main` may move between two trials of a sweep.
    """
    identity = ledger.identity()
    if identity is None:
        return settings.base_model_revision
    asked = (identity.base_model_name, identity.asked_revision)
    frozen = identity.base_model.revision or ""
    is_same = asked == (settings.base_model, settings.base_model_revision)
    is_commit = frozen != "" and not frozen.startswith("sha256:")
    return frozen if is_same and is_commit else settings.base_model_revision


# Names of the number of positions in a config.json, by family.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


def check_rows(base: BaseModel, data: PreparedData) -> None:
    """Refuse rows with tokens or positions that the model does not know. Raises `SettingsError`.

    A tokenizer that knows more tokens would index past its table, and so would rows that are longer
    than learned positions reach; rotary ones go on silently where nothing was trained.
    """
    vocab_size = base.config.get("vocab_size")
    highest = max(int(table.input_ids.max()) for table in (data.train, data.eval))
    if isinstance(vocab_size, int) and highest >= vocab_size:
        raise SettingsError(
            f"JOB_BASE_MODEL: {base.name}: its tokenizer gives token {highest}, but its model has"
            f" only {vocab_size}; the two do not belong together"
        )
    longest = max(int(table.lengths.max()) for table in (data.train, data.eval))
    known = [base.config[name] for name in POSITIONS if isinstance(base.config.get(name), int)]
    if known and longest > known[0]:
        raise SettingsError(
            f"JOB_MAX_SEQ_LENGTH: a row has {longest} tokens, but {base.name} knows {known[0]}"
            f" positions; set it to {known[0]}"
        )
