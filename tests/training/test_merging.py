"""A merged model says what base and adapter say together.

`pytest tests/training/test_merging.py`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from job.errors import OutageError, SettingsError
from job.ledger.folders import seal_folder, upload_folder
from job.ledger.records import Result
from job.store.local import LocalStore
from job.winner.adapter import merge
from tests.ledger.documents import make_result
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


def test_an_adapter_trained_in_16_bits_is_merged_into_them(tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from job.training.model import (
        adapter_state,
        add_adapters,
        load_base,
        save_adapter,
        trainable_parameters,
    )

    base, cpu = make_base(tmp_path / "base", vocab_size=600), torch.device("cpu")
    byte_level_tokenizer().save_pretrained(base)
    model = add_adapters(load_base(str(base), None, cpu, quantization="none"), make_recipe())
    torch.manual_seed(0)
    for parameter in trainable_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, adapter_state(model), tmp_path / "adapter")
    input_ids = torch.arange(3, 60)[None]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))(input_ids).logits
        far, near = (
            float((_merged(mode, base, tmp_path)(input_ids).logits - expected).abs().max())
            for mode in ("nf4", "none")
        )
    assert near < 0.1 * far


def _merged(quantization: str, base: Path, folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from job.training.merging import merge_adapter

    merged = folder / quantization
    merge_adapter(str(base), None, folder / "adapter", merged, quantization=quantization)
    return AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)


def _committed(tmp_path: Path, store: LocalStore) -> Result:
    """The result of a slot whose adapter is in the store, and its base in a folder."""
    import torch

    from job.training.model import adapter_state, add_adapters, load_base, save_adapter

    base = make_base(tmp_path / "base", vocab_size=600)
    byte_level_tokenizer().save_pretrained(base)
    model = add_adapters(load_base(str(base), None, torch.device("cpu")), make_recipe())
    save_adapter(model, adapter_state(model), tmp_path / "adapter")
    sealed = seal_folder("sweeps/s/slots/0000/adapter", tmp_path / "adapter")
    upload_folder(store, sealed, tmp_path / "adapter")
    adapter = {"adapter_key": sealed.key, "adapter_sha256": sealed.sha256}
    return make_result(base_model=str(base), base_model_revision="", **adapter)


def test_a_volume_too_small_for_the_merged_model_is_one_line_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers
    from safetensors import SafetensorError

    def fill_up(_model: object, folder: Path, **_: object) -> None:
        """As transformers on a full volume: files are begun, then safetensors' own error."""
        (folder / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    store = LocalStore(tmp_path / "out")
    result = _committed(tmp_path, store)
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fill_up)
    with pytest.raises(OutageError, match=f"^best --merge: {tmp_path}/merged: no space left; free"):
        merge(store, 0, result, tmp_path / "merged", work_dir=tmp_path)
    assert not (tmp_path / "merged").exists()
    (tmp_path / "base/config.json").unlink()
    with pytest.raises(SettingsError, match="JOB_BASE_MODEL"):
        merge(store, 0, result, tmp_path / "merged", work_dir=tmp_path)
    assert not (tmp_path / "merged").exists(), "nor after any other error"
