"""The lines on the cards work, as far as packages from PyPI allow.

vLLM needs a GPU, and llama.cpp's converter belongs to no package of its authors: their lines are
held in words only. `pytest tests/winner/test_cards.py`
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from job.ledger.records import MergeLosses
from job.trial.model_card import Provenance, adapter_card
from job.winner.merged_card import merged_card
from tests.ledger.documents import make_result

LOSSES = MergeLosses(
    untuned_16bit=1.327, untuned_4bit=1.594, adapter_4bit=1.437, merged_16bit=1.24,
    merged_4bit=1.441, written="16bit", num_rows=24,
)  # fmt: skip


def _python(card: str) -> str:
    (lines,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return str(lines)


def test_a_merged_models_card_tells_what_was_measured_and_how_it_is_served() -> None:
    from huggingface_hub import ModelCard

    result = make_result(base_model="owner/name", base_model_revision="c" * 40)
    card = merged_card(result, slot=3, sweep="card", losses=LOSSES)
    data = ModelCard(card).data
    assert (data.base_model, data.library_name) == ("owner/name", "transformers")
    for word in ("1.3270", "1.5940", "1.4370", "1.2400", "1.4410", "24 held-out rows", "a" * 64,
                 "vllm serve", "--dtype float16", "convert_hf_to_gguf.py",
                 "added to the base's own 16-bit weights"):  # fmt: skip
        assert word in card
    price = "4 bits cost the untuned base 0.267 nats on these 24 rows (1.594 against 1.327)."
    assert price in card.splitlines()
    mixed, losses = result.changed(quantization="mixed:v_proj"), LOSSES.changed(untuned_4bit=None)
    card = merged_card(mixed, slot=3, sweep="card", losses=losses, untuned=1.5)
    assert "4 bits, v_proj in 16 bits, cost the untuned base 0.173 nats on these 24 rows" in card
    assert "cost" not in merged_card(mixed, slot=3, sweep="card", losses=losses)
    fewer = merged_card(
        make_result(), slot=3, sweep="card",
        losses=MergeLosses(adapter_4bit=1.4, merged_4bit=1.5, written="4bit", num_rows=24),
    )  # fmt: skip
    assert "16 bits" not in fewer
    assert "quantised to 4 bits (NF4) and back" in fewer
    assert "base_model:" not in fewer.split("---\n")[1].replace("base_model:finetune", "")


@pytest.mark.slow
def test_the_adapter_cards_lines_load_the_adapter(tmp_path: Path) -> None:
    from tests.winner.tuned import make_tuned_sweep

    make_tuned_sweep(tmp_path)
    origin = Provenance(
        base_model=str(tmp_path / "base"), base_model_revision="sha256:0", sweep="s", slot=0,
        recipe={}, data_digest="d", train_rows=1, eval_rows=1,
    )  # fmt: skip
    lines = _python(adapter_card(origin, eval_loss=1.0, step=1))
    names: dict[str, Any] = {}
    exec(lines.replace("FOLDER OF THIS FILE", str(tmp_path / "adapter-0")), names)  # noqa: S102
    assert names["model"].peft_config["default"].r == 4


@pytest.mark.slow
def test_the_merged_cards_lines_load_the_model(tmp_path: Path) -> None:
    from job.winner.merge import merge
    from tests.winner.tuned import make_tuned_sweep, result_of, settings_of

    ledger = make_tuned_sweep(tmp_path)
    target = tmp_path / "merged"
    merge(ledger, 0, result_of(ledger), target, settings=settings_of(tmp_path), onto="16bit")
    names: dict[str, Any] = {}
    exec(  # noqa: S102
        _python((target / "README.md").read_text()).replace("FOLDER OF THIS FILE", str(target)),
        names,
    )
    tokens = names["tokenizer"]("3+4?", return_tensors="pt").to(names["model"].device)
    assert names["model"].generate(**tokens, max_new_tokens=2, do_sample=False).shape[0] == 1
