"""The merge that is written is the one that was measured to be better.

`pytest tests/winner/test_merge.py`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job.base_model import resolve_base_model
from job.data.samples import SampleTable
from job.errors import OutageError, SettingsError
from job.ledger.ledger import Ledger
from job.ledger.records import MergeLosses, Result
from job.winner.held_out import held_out_data, judged_rows
from job.winner.merge import merge, merge_table
from tests.tiny_model import make_base
from tests.tiny_tokenizer import byte_level_tokenizer
from tests.winner.tuned import NUM_ROWS, make_tuned_sweep, result_of, settings_of

pytestmark = pytest.mark.slow


def _merge(
    ledger: Ledger, folder: Path, *, result: Result | None = None, **given: Any
) -> MergeLosses:
    target, result = folder / "merged", result or result_of(ledger)
    return merge(ledger, 0, result, target, settings=settings_of(folder), **given)


def _plain_loss(ledger: Ledger, folder: Path, model: Any) -> float:
    """The loss on the judged rows by transformers alone."""
    table = judged_rows(ledger, held_out_data(ledger, folder / "work"))
    assert len(table) == NUM_ROWS
    return _plain_loss_on(table, model)


def _plain_loss_on(table: SampleTable, model: Any) -> float:
    """One row after another, full logits."""
    import torch
    from torch.nn.functional import cross_entropy

    total = 0.0
    for start, end in zip(table.offsets, table.offsets[1:], strict=False):
        ids = torch.tensor(table.input_ids[start:end].astype("int64"))[None]
        labels = ids[0, 1:][torch.tensor(table.is_target[start + 1 : end])]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1][torch.tensor(table.is_target[start + 1 : end])]
        total += float(cross_entropy(logits, labels, reduction="sum"))
    return total / table.num_target_tokens


# With random adapters which merge is better is chance, known for these two.
@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_all_losses_are_those_of_transformers_and_the_better_merge_is_written(
    tmp_path: Path, model_type: str
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from job.training.model import load_base

    ledger = make_tuned_sweep(tmp_path, model_type=model_type)
    losses = _merge(ledger, tmp_path)
    base, adapter = tmp_path / "base", str(tmp_path / "adapter-0")
    own = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16).float()
    in_4 = load_base(str(base), None, torch.device("cpu"))
    assert losses.untuned_16bit == pytest.approx(_plain_loss(ledger, tmp_path, own), rel=1e-5)
    assert losses.untuned_4bit == pytest.approx(_plain_loss(ledger, tmp_path, in_4), rel=1e-5)
    both = PeftModel.from_pretrained(in_4, adapter)
    assert losses.adapter_4bit == pytest.approx(_plain_loss(ledger, tmp_path, both), rel=1e-5)
    assert losses.merged_4bit == pytest.approx(losses.adapter_4bit, rel=1e-4)
    on_16 = PeftModel.from_pretrained(own, adapter)
    assert losses.merged_16bit == pytest.approx(_plain_loss(ledger, tmp_path, on_16), rel=1e-4)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    best = min(losses.merged_16bit, losses.merged_4bit)
    assert _plain_loss(ledger, tmp_path, written) == pytest.approx(best, rel=1e-5)
    assert losses.written == ("16bit" if best == losses.merged_16bit else "4bit")
    assert ledger.slot(0).merge_losses() == losses
    assert not list(tmp_path.glob(".merged-*")), "the worse one is gone"


@pytest.mark.parametrize(("loss_16bit", "written"), [(1.2, "16bit"), (1.6, "4bit"), (None, "4bit")])
def test_a_merge_that_measures_worse_is_not_taken(
    tmp_path: Path, loss_16bit: float | None, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made up: the losses of what is measured in 16 bits are given."""
    from job.training import measuring

    def loss(*_: Any, title: str, **__: Any) -> float | None:
        return {"untuned in 16 bits": 1.3, "merged in 16bit": loss_16bit}.get(title, 1.5)

    monkeypatch.setattr(measuring, "loss_in_16_bits", loss)
    ledger = make_tuned_sweep(tmp_path)
    losses = _merge(ledger, tmp_path)
    assert (losses.written, losses.merged_16bit, losses.merged_4bit) == (written, loss_16bit, 1.5)
    card = (tmp_path / "merged/README.md").read_text()
    assert ("quantised to 4 bits (NF4) and back" in card) == (written == "4bit")
    again = merge(
        ledger, 0, result_of(ledger), tmp_path / "forced", settings=settings_of(tmp_path),
        onto="16bit",
    )  # fmt: skip
    assert again.written == "16bit"
    assert again.merged_4bit is None, "only what was asked for is made"
    assert ledger.slot(0).merge_losses() == again


def test_an_adapter_trained_on_16_bits_is_merged_into_them_and_not_measured_in_4(
    tmp_path: Path,
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ledger = make_tuned_sweep(tmp_path)
    result = result_of(ledger).changed(quantization="none")
    settings, target = settings_of(tmp_path), tmp_path / "merged"
    with pytest.raises(SettingsError, match="--onto 4bit: slot 0 was trained with the base in 16"):
        merge(ledger, 0, result, target, settings=settings, onto="4bit")
    assert not target.exists()
    losses = merge(ledger, 0, result, target, settings=settings)
    assert losses.written == "16bit"
    assert (losses.untuned_4bit, losses.adapter_4bit, losses.merged_4bit) == (None, None, None)
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float16).float()
    tuned = PeftModel.from_pretrained(own, str(tmp_path / "adapter-0"))
    assert losses.merged_16bit == pytest.approx(_plain_loss(ledger, tmp_path, tuned), rel=1e-4)


def test_generating_with_the_merged_folder_is_generating_with_base_and_adapter(
    tmp_path: Path,
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from job.training.model import load_base

    ledger = make_tuned_sweep(tmp_path)
    _merge(ledger, tmp_path, onto="4bit")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = load_base(str(tmp_path / "base"), None, torch.device("cpu"))
    tuned = PeftModel.from_pretrained(base, str(tmp_path / "adapter-0"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    prompt = tokenizer("3+4?", return_tensors="pt")
    texts = [
        model.generate(**prompt, do_sample=False, max_new_tokens=12, use_cache=True).tolist()
        for model in (merged, tuned)
    ]
    assert texts[0] == texts[1]
    assert merged.config.use_cache
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {p.dtype for p in stored.parameters()} == {torch.float16}


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "cohere2", "granite", "phi3", "mistral"])
def test_what_does_not_fit_passes_through_layer_by_layer(tmp_path: Path, model_type: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from job.training.measuring import loss_in_16_bits
    from tests.tiny_model import make_table

    changes: dict[str, Any] = {"tie_word_embeddings": model_type == "llama"}
    base, table = make_base(tmp_path, model_type=model_type, **changes), make_table(9, seed=1)
    whole, streamed = (
        loss_in_16_bits(str(base), None, table, torch.device("cpu"), title="it",
                        memory_bytes=memory)
        for memory in (10**12, 0)
    )  # fmt: skip
    assert whole == pytest.approx(streamed, rel=1e-6)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16).float().eval()
    assert whole == pytest.approx(_plain_loss_on(table, plain), rel=1e-5)


def test_only_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from job.training import measuring
    from tests.tiny_model import make_table

    base = make_base(tmp_path, num_hidden_layers=6)
    held: list[int] = []
    models: list[Any] = []
    skeleton = measuring.skeleton

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if models:
                alive = [p for p in models[0].base_model.layers.parameters() if not p.is_meta]
                held.append(sum(p.numel() for p in alive))
            return func(*args, **kwargs or {})

    def kept(config: Any) -> Any:
        models.append(skeleton(config))
        return models[0]

    measuring.skeleton = kept
    try:
        with Watch():
            measuring.loss_in_16_bits(
                str(base), None, make_table(3, seed=1), torch.device("cpu"), title="it",
                memory_bytes=0,
            )  # fmt: skip
    finally:
        measuring.skeleton = skeleton
    largest = max(p.numel() for p in models[0].base_model.layers.parameters())
    assert 0 < max(held) <= largest
    assert held[-1] == 0


def test_a_pre_quantised_base_has_its_own_weights_only_with_its_original(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    ledger = make_tuned_sweep(tmp_path)
    original = tmp_path / "original"
    (tmp_path / "base").rename(original)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    quantised = AutoModelForCausalLM.from_pretrained(
        original, quantization_config=config, dtype=torch.bfloat16
    )
    quantised.save_pretrained(tmp_path / "base")
    byte_level_tokenizer().save_pretrained(tmp_path / "base")
    revision = resolve_base_model(str(tmp_path / "base"), "main").revision
    result = result_of(ledger).changed(base_model_revision=revision)
    with pytest.raises(SettingsError, match="name the model that it was made of with --base ID"):
        _merge(ledger, tmp_path, result=result, onto="16bit")
    without = _merge(ledger, tmp_path, result=result)
    assert without.written == "4bit"
    assert (without.untuned_16bit, without.merged_16bit) == (None, None)
    assert without.merged_4bit == pytest.approx(without.adapter_4bit, rel=1e-4)
    told = (tmp_path / "merged/config.json").read_text()
    assert "quantization_config" not in told
    import shutil

    shutil.rmtree(tmp_path / "merged")
    both = _merge(ledger, tmp_path, result=result, original=str(original))
    assert both.original is not None
    assert both.original.startswith(f"{original}@sha256:")
    assert None not in (both.untuned_16bit, both.merged_16bit)
    shutil.rmtree(tmp_path / "merged")
    other = make_base(tmp_path / "other", vocab_size=600, num_hidden_layers=3)
    byte_level_tokenizer().save_pretrained(other)
    with pytest.raises(SettingsError, match="is not what .* num_hidden_layers is 3, not 2"):
        _merge(ledger, tmp_path, result=result, original=str(other))
    with pytest.raises(SettingsError, match="it is quantised itself"):
        _merge(ledger, tmp_path, result=result, original=str(tmp_path / "base"))


def test_another_vocabulary_is_another_model(tmp_path: Path) -> None:
    from job.winner.merge import _check_same

    one, other = (make_base(tmp_path / name, vocab_size=600) for name in ("one", "other"))
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(one)
    tokenizer.save_pretrained(other)
    models = [resolve_base_model(str(path), "main") for path in (one, other)]
    _check_same(*models)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    words = [word for word in vocabulary if len(word) == 1][:2]
    vocabulary[words[0]], vocabulary[words[1]] = vocabulary[words[1]], vocabulary[words[0]]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(SettingsError, match="its vocabulary is another"):
        _check_same(*models)


def test_the_tokenizer_has_the_chat_template_that_was_trained_with(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from job.data.templates import load_template
    from job.data.tokens import load_tokenizer

    ledger = make_tuned_sweep(tmp_path)
    before = load_tokenizer(str(tmp_path / "base"))
    _merge(ledger, tmp_path, onto="16bit")
    after = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert after.chat_template == load_template(None, before).source
    assert after.get_vocab() == before.get_vocab()


def test_a_base_that_has_16_bits_needs_no_other(tmp_path: Path) -> None:
    ledger = make_tuned_sweep(tmp_path)
    with pytest.raises(SettingsError, match="has 16-bit weights of its own"):
        _merge(ledger, tmp_path, original=str(tmp_path / "base"))
    assert not (tmp_path / "merged").exists()


def test_a_volume_too_small_is_one_line_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.training import merging

    def fill_up(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OutageError(f"{path} cannot be written (No space left on device); free or enlarge it")

    ledger = make_tuned_sweep(tmp_path)
    monkeypatch.setattr(merging, "write_tensors", fill_up)
    with pytest.raises(OutageError, match="No space left on device"):
        _merge(ledger, tmp_path)
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".merged-*"))
    monkeypatch.undo()
    (tmp_path / "base/config.json").unlink()
    with pytest.raises(SettingsError, match="JOB_BASE_MODEL"):
        _merge(ledger, tmp_path)
    assert not (tmp_path / "merged").exists(), "nor after any other error"


def test_large_models_are_written_in_shards_that_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from job.training import merging

    ledger = make_tuned_sweep(tmp_path)
    _merge(ledger, tmp_path, onto="16bit")
    monkeypatch.setattr(merging, "MAX_SHARD_BYTES", 50_000)
    merge(
        ledger, 0, result_of(ledger), tmp_path / "many", settings=settings_of(tmp_path),
        onto="16bit",
    )  # fmt: skip
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 2
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("merged", "many"))
    for (name, a), b in zip(one.named_parameters(), many.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_table_tells_what_was_not_measured() -> None:
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as shown:
        console.print(merge_table(MergeLosses(adapter_4bit=1.437, written="4bit", num_rows=24)))
    text = shown.get()
    assert "24 held-out rows" in text
    assert "1.4370" in text
    assert text.count("not measured") == 4


@pytest.mark.gpu
def test_a_gpu_measures_what_a_cpu_measures(tmp_path: Path) -> None:
    from job.winner.answers import answer

    ledger = make_tuned_sweep(tmp_path)
    on_cpu = _merge(ledger, tmp_path)
    on_gpu = settings_of(tmp_path).model_copy(update={"device": "auto"})
    found = merge(ledger, 0, result_of(ledger), tmp_path / "again", settings=on_gpu)
    for name in ("untuned_16bit", "untuned_4bit", "adapter_4bit", "merged_16bit", "merged_4bit"):
        assert getattr(found, name) == pytest.approx(getattr(on_cpu, name), rel=2e-3), name
    trials = {0: result_of(ledger)}
    _, answers = answer(ledger, trials, settings=on_gpu, num_rows=9, max_new_tokens=4)
    assert len(answers.rows) == 9
