"""A merged model says what base and adapter say together. `pytest tests/test_merging.py`"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_model import make_base, make_recipe
from tests.tiny_tokenizer import byte_level_tokenizer

pytestmark = pytest.mark.slow


def test_the_merged_models_logits_are_those_of_base_and_adapter(tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from job.training.merging import merge_adapter
    from job.training.model import (
        adapter_state,
        add_adapters,
        load_base,
        save_adapter,
        trainable_parameters,
    )

    base = make_base(tmp_path / "base", vocab_size=600)
    byte_level_tokenizer().save_pretrained(base)
    model = add_adapters(load_base(str(base), None, torch.device("cpu")), make_recipe())
    torch.manual_seed(0)
    for parameter in trainable_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, adapter_state(model), tmp_path / "adapter")
    input_ids = torch.arange(3, 60)[None]
    merge_adapter(str(base), None, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    unrounded = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    with torch.no_grad():
        # transformers' own forward: ours packs samples.
        tuned = load_base(str(base), None, torch.device("cpu"))
        expected = PeftModel.from_pretrained(tuned, str(tmp_path / "adapter"))(input_ids).logits
        far = (unrounded(input_ids).logits - expected).abs().max()
        near = (merged(input_ids).logits - expected).abs().max()
    assert near < 0.1 * far, "the base that was trained on is the quantised one"
    assert merged.config.use_cache
    assert (tmp_path / "merged/tokenizer.json").is_file()
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {p.dtype for p in weights.parameters()} == {torch.float16}
