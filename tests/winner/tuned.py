"""A committed sweep of a tiny base with real adapters, made without training."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from job.base_model import resolve_base_model
from job.ledger.folders import seal_folder, upload_folder
from job.ledger.ledger import Ledger
from job.ledger.records import Result
from job.settings import Settings
from job.store.local import LocalStore
from tests.data.test_build import settings_for, write_lines
from tests.ledger.documents import make_identity, make_recipe, make_result, make_rows, make_spec
from tests.tiny_model import make_base
from tests.tiny_tokenizer import byte_level_tokenizer

NUM_ROWS = 10  # JOB_EVAL_ROWS


def make_tuned_sweep(
    folder: Path, *, model_type: str = "llama", num_slots: int = 1, std: float = 0.1
) -> Ledger:
    """Sums as rows; each slot's adapter has random weights of this standard deviation."""
    from job.data.prepared import prepare
    from job.data.tokenisation import tokenisation_of

    base = make_base(folder / "base", model_type=model_type, vocab_size=600)
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(base)
    rows = [
        {"question": f"{a}+{b}?", "answer": f"#### {a + b}"}
        for a in range(9)
        for b in range(0, 1800, 200)
    ]
    store = LocalStore(folder / "out")
    data = prepare(
        settings_for(write_lines(folder / "rows.jsonl", rows), subsample_fraction=1.0),
        tokenisation=tokenisation_of(tokenizer, None),
        store=store,
        cache_dir=folder / "made",
        should_stop=lambda: None,
    )
    ledger = Ledger(store, "s")
    ledger.open_sweep(
        make_identity(JOB_DATASET_URI={"prepared": data.digest}, JOB_EVAL_ROWS=NUM_ROWS)
    )
    for number in range(num_slots):
        _commit(ledger, number, base, folder / f"adapter-{number}", digest=data.digest, std=std)
    return ledger


def result_of(ledger: Ledger, number: int = 0) -> Result:
    result = ledger.slot(number).result()
    assert result is not None
    return result


def settings_of(folder: Path) -> Settings:
    return Settings(
        dataset_uri="unused",
        output_uri=str(folder / "out"),
        work_dir=folder / "work",
        sweep_name="s",
        device="cpu",
    )


def _commit(
    ledger: Ledger, number: int, base: Path, folder: Path, *, digest: str, std: float
) -> None:
    import torch

    from job.training.model import (
        adapter_state,
        add_adapters,
        load_base,
        save_adapter,
        trainable_parameters,
    )

    recipe = make_recipe(seed=number, lora_r=4)
    model = add_adapters(load_base(str(base), None, torch.device("cpu")), recipe)
    torch.manual_seed(number)
    for parameter in trainable_parameters(model).values():
        torch.nn.init.normal_(parameter, std=std)
    save_adapter(model, adapter_state(model), folder)
    slot = ledger.slot(number)
    (folder / "README.md").write_text("# LoRA adapter\n")
    sealed = seal_folder(slot.key("adapter"), folder)
    upload_folder(ledger.store, sealed, folder)
    rows = make_rows(1.5 + number / 10, trial=number)
    content = json.dumps(rows.to_json()).encode()
    rows_key = slot.key(f"rows-{hashlib.sha256(content).hexdigest()}.json")
    ledger.store.put_if_absent(rows_key, content)
    changes: dict[str, Any] = {
        "adapter_key": sealed.key, "adapter_sha256": sealed.sha256, "base_model": str(base),
        "adapter_bytes": sealed.size_bytes, "rows_key": rows_key, "eval_loss": rows.loss,
        "base_model_revision": resolve_base_model(str(base), "main").revision,
        "data_digest": digest,
    }  # fmt: skip
    slot.specify(make_spec(params={"lora_r": 4, "seed": number}, data_digest=digest))
    slot.commit(make_result(slot.folder, **changes))
