"""`job best --merge`: base and adapter as one fp16 model, by whichever way is really better.

An adapter was trained on a base in 4 bits. Added to the base's own 16-bit weights it meets a better
base, but not the one whose rounding errors it has learned to correct; which of the two merges is
better is measured on the held-out rows, and written.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.table import Table

from job.base_model import BaseModel, resolve_base_model
from job.data.samples import SampleTable
from job.errors import CredentialsError, SettingsError, StoreError, is_volume_full
from job.ledger.accounts import now
from job.ledger.ledger import Ledger
from job.ledger.records import MergeLosses, Result
from job.log import log
from job.settings import Settings
from job.training.quantization import words
from job.winner.adapter import download, make_new, unwritable
from job.winner.base import base_of
from job.winner.held_out import held_out_data, judged_rows
from job.winner.merged_card import merged_card

if TYPE_CHECKING:
    import torch

Onto = Literal["16bit", "4bit"]
_MERGE = "best --merge"
# Parts of a config that say how large a model is and what it computes; others may differ between a
# model and its pre-quantised copy.
_SHAPE = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "hidden_act",
    "sliding_window", "n_embd", "n_layer", "n_head",
)  # fmt: skip


@dataclass(frozen=True)
class _Work:
    """What all measurements of one merge share."""

    base: BaseModel
    original: BaseModel | None  # with the base's 16-bit weights; None where there are none
    tokenizer: Any  # the base's, with the chat template of the sweep
    rows: SampleTable
    device: torch.device
    memory_bytes: int


def merge(
    ledger: Ledger,
    slot: int,
    result: Result,
    folder: Path,
    *,
    settings: Settings,
    onto: Onto | None = None,
    original: str | None = None,
) -> MergeLosses:
    """Write the better merge of base and adapter, in fp16, as a model of its own; say what it gave.

    `onto` forces one of the merges; `original` names the model that a pre-quantised base was made
    of. Raises as `download` does, and then leaves nothing in `folder`.
    """
    make_new(folder, _MERGE)
    try:
        losses = _merge(
            ledger, slot, result, folder, settings=settings, onto=onto, original=original
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # it was new or empty before
        raise
    log.info("slot %d merged in %s: %s", slot, losses.written, folder)
    try:
        ledger.slot(slot).write_merge_losses(losses)
    except (CredentialsError, StoreError) as error:  # the model is written all the same
        log.warning("the report will not show these losses: %s", error)
    return losses


def merge_table(losses: MergeLosses) -> Table:
    """The measured losses for a terminal, what was written marked."""
    table = Table(box=box.SIMPLE, title=f"eval/loss on {losses.num_rows} held-out rows")
    table.add_column("model")
    table.add_column("eval/loss", justify="right")
    table.add_column("")
    for name, loss, way in (
        ("untuned, 16 bits", losses.untuned_16bit, None),
        ("untuned, 4 bits", losses.untuned_4bit, None),
        ("adapter on the 4-bit base", losses.adapter_4bit, None),
        ("merged into the 16-bit base", losses.merged_16bit, "16bit"),
        ("merged into the dequantised base", losses.merged_4bit, "4bit"),
    ):
        shown = "not measured" if loss is None else f"{loss:.4f}"
        table.add_row(name, shown, "written" if way and way == losses.written else "")
    return table


def _merge(
    ledger: Ledger,
    slot: int,
    result: Result,
    folder: Path,
    *,
    settings: Settings,
    onto: Onto | None,
    original: str | None,
) -> MergeLosses:
    from job.training.device import any_device, weight_memory_bytes

    base = base_of(ledger.store, result, settings)
    in_4_bits = result.quantization == "nf4"
    if not in_4_bits:
        onto = _only_16_bits(slot, result.quantization, onto)
    own = _with_16_bits(base, original, onto, settings)
    rows = judged_rows(ledger, held_out_data(ledger, settings.work_dir))
    device = any_device(settings.device, gpu_memory_gb=settings.gpu_memory_gb)
    memory_bytes = weight_memory_bytes(device, gpu_memory_gb=settings.gpu_memory_gb)
    work = _Work(base, own, _tokenizer(base, ledger), rows, device, memory_bytes)
    with (
        tempfile.TemporaryDirectory(prefix="adapter-") as name,
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside,
    ):
        adapter = Path(name) / "adapter"
        download(ledger.store, slot, result, adapter, option=_MERGE)
        losses = _measure(work, adapter, Path(beside), onto, in_4_bits=in_4_bits)
        assert losses.written is not None
        untuned = _untuned(ledger, slot, result)
        card = merged_card(result, slot=slot, sweep=ledger.sweep, losses=losses, untuned=untuned)
        chosen = Path(beside) / losses.written
        (chosen / "README.md").write_text(card, encoding="utf-8")
        folder.rmdir()  # the move makes it again
        shutil.move(chosen, folder)
    return losses


def _only_16_bits(slot: int, quantization: str, onto: Onto | None) -> Onto:
    """The one way to merge an adapter of a base that was not in 4 bits. Raises `SettingsError`."""
    if onto == "4bit":
        raise SettingsError(
            f"{_MERGE} --onto 4bit: slot {slot} was trained with the base in"
            f" {words(quantization)}; leave --onto out"
        )
    log.info("trained with the base in %s: merged in 16 bits", words(quantization))
    return "16bit"


def _untuned(ledger: Ledger, slot: int, result: Result) -> float | None:
    """The base's eval/loss as the slot trained on it: its own step 0, or an earlier slot's."""
    own = next((loss for step, loss in result.finite_curve[:1] if step == 0), None)
    spec = ledger.slot(slot).spec()
    return spec.untuned if own is None and spec is not None else own


def _tokenizer(base: BaseModel, ledger: Ledger) -> Any:
    """The tokenizer that the rows were made with, its chat template the one of the sweep."""
    from job.data.templates import load_template
    from job.data.tokens import load_tokenizer

    tokenizer = load_tokenizer(base.location, base.hub_revision)
    identity = ledger.identity()
    asked = identity.rows.get("JOB_CHAT_TEMPLATE") if identity else None
    if asked is not None or tokenizer.chat_template is None:
        try:
            tokenizer.chat_template = load_template(asked, tokenizer).source
        except SettingsError as error:  # a file on another machine
            log.warning("the merged model keeps its tokenizer's own chat template: %s", error)
    return tokenizer


def _with_16_bits(
    base: BaseModel, original: str | None, onto: Onto | None, settings: Settings
) -> BaseModel | None:
    """The model whose files hold the base's 16-bit weights, if there is one. `SettingsError`."""
    if "quantization_config" not in base.config:
        if original is not None:
            raise SettingsError(
                f"{_MERGE} --base: {base.name} has 16-bit weights of its own; leave --base out"
            )
        return base
    if original is None:
        if onto == "16bit":
            raise SettingsError(
                f"{_MERGE} --onto 16bit: {base.name} is quantised, it has no 16-bit weights; name"
                " the model that it was made of with --base ID"
            )
        log.warning(
            "%s is quantised: nothing is measured in 16 bits; --base ID names the model that it was"
            " made of",
            base.name,
        )
        return None
    found = resolve_base_model(original, "main", cache_dir=settings.work_dir)
    _check_same(base, found)
    return found


def _check_same(base: BaseModel, original: BaseModel) -> None:
    """Refuse a model of another shape or vocabulary. Raises `SettingsError`."""
    from job.data.tokens import load_tokenizer

    where = f"{_MERGE} --base: {original.name} is not what {base.name} was made of"
    if "quantization_config" in original.config:
        raise SettingsError(f"{where}: it is quantised itself")
    for key in _SHAPE:
        ours, theirs = base.config.get(key), original.config.get(key)
        if ours is not None and theirs is not None and ours != theirs:
            raise SettingsError(f"{where}: {key} is {theirs}, not {ours}")
    known, other = (
        load_tokenizer(m.location, m.hub_revision).get_vocab() for m in (base, original)
    )
    if any(other.get(token) != number for token, number in known.items() if token in other) or (
        len(set(known) - set(other)) > 16  # copies often add a token to pad with
    ):
        raise SettingsError(f"{where}: its vocabulary is another")


def _measure(
    work: _Work, adapter: Path, beside: Path, onto: Onto | None, *, in_4_bits: bool
) -> MergeLosses:
    """Measure all that can be, write the merges that may be chosen, and choose one.

    An adapter that was not trained `in_4_bits` is not measured there.
    """
    from job.training.measuring import losses_in_4_bits

    base, own = work.base, work.original
    found: dict[str, Any] = {}
    if in_4_bits:
        found["untuned_4bit"], found["adapter_4bit"] = losses_in_4_bits(
            base.location, base.hub_revision, adapter, work.rows, work.device
        )
    if own is not None:
        found["untuned_16bit"] = _loss(work, own.location, own.hub_revision, "untuned in 16 bits")
        found["original"] = None if own is base else f"{own.name}@{own.revision}"
    ways: list[Onto] = [onto] if onto else ["16bit", "4bit"] if own is not None else ["4bit"]
    for way in ways:
        found[f"merged_{way}"] = _written(work, adapter, beside / way, way)
    losses = {way: _ordered(found[f"merged_{way}"]) for way in ways}
    best = min(ways, key=lambda way: losses[way])
    for way in set(ways) - {best}:
        shutil.rmtree(beside / way)
    return MergeLosses(
        **{name: value for name, value in found.items() if _is_told(value)},
        written=best,
        num_rows=len(work.rows),
        measured_at=now(),
    )


def _is_told(value: object) -> bool:
    """Whether a document can hold it: JSON has no NaN."""
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _written(work: _Work, adapter: Path, folder: Path, way: Onto) -> float | None:
    """Write one merge to `folder`, and measure what was written."""
    from job.training.merging import merge_adapter

    source = work.original if way == "16bit" else work.base
    assert source is not None
    folder.mkdir()
    try:
        merge_adapter(
            source.location, source.hub_revision, adapter, folder, onto=way, device=work.device
        )
        work.tokenizer.save_pretrained(folder)
        for path in folder.iterdir():
            path.chmod(0o644)  # safetensors makes files that only their owner can read
    except Exception as error:  # safetensors and tokenizers have errors of their own for it
        # If no file was written yet, it is the volume of the base that is full.
        if is_volume_full(error) and any(folder.iterdir()):
            raise unwritable(_MERGE, folder.parent.parent, error) from error
        raise
    return _loss(work, str(folder), None, f"merged in {way}")


def _loss(work: _Work, location: str, revision: str | None, title: str) -> float | None:
    from job.training.measuring import loss_in_16_bits

    return loss_in_16_bits(
        location, revision, work.rows, work.device, title=title, memory_bytes=work.memory_bytes
    )


def _ordered(loss: float | None) -> float:
    """A loss to choose by: what was not measured, or overflowed, comes last."""
    return loss if loss is not None and math.isfinite(loss) else math.inf
