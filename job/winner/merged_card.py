"""The README.md of a merged model: what it is, what was measured, and the lines that serve it."""

from __future__ import annotations

import yaml

import job
from job.ledger.records import MergeLosses, Result
from job.training.quantization import price_of_4_bits

_WAYS = {
    "16bit": "added to the base's own 16-bit weights",
    "4bit": "added to the base as it was trained on: quantised to 4 bits (NF4) and back",
}
# Each is run by tests/winner/test_cards.py, as far as packages from PyPI allow.
TRANSFORMERS_LINES = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "FOLDER OF THIS FILE"
model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)"""
VLLM_LINES = "vllm serve FOLDER_OF_THIS_FILE --dtype float16"
LLAMA_CPP_LINES = "python convert_hf_to_gguf.py FOLDER_OF_THIS_FILE --outtype f16 --outfile m.gguf"


def merged_card(
    result: Result,
    *,
    slot: int,
    sweep: str,
    losses: MergeLosses,
    untuned: float | None = None,
) -> str:
    """The card of the merge of a slot's adapter that was written.

    `untuned` is the base's own eval/loss as it was trained on, where a trial measured it.
    """
    assert losses.written is not None
    on_the_hub = not result.base_model_revision.startswith("sha256:")
    metadata = {
        **({"base_model": result.base_model} if on_the_hub else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["qlora", "base_model:finetune"],
    }
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---

# {result.base_model}, tuned

The LoRA adapter of trial {slot} of the sweep `{sweep}`, merged into its base by qlora-sweep-job
{job.__version__}: {_WAYS[losses.written]}. fp16; needs neither PEFT nor bitsandbytes.

| on {losses.num_rows} held-out rows | eval/loss |
|---|---|
{_rows(losses)}
{_price(result.quantization, losses, untuned)}
```python
{TRANSFORMERS_LINES}
```

To serve it with vLLM, or to convert it for llama.cpp:

```bash
{VLLM_LINES}
{LLAMA_CPP_LINES}
```

| | |
|---|---|
| base model | `{result.base_model}` |
| its revision | `{result.base_model_revision}` |
| adapter | `{result.adapter_sha256}` |
"""


def _price(mode: str, losses: MergeLosses, untuned: float | None) -> str:
    held = untuned if losses.untuned_4bit is None else losses.untuned_4bit
    if mode == "none" or held is None or losses.untuned_16bit is None:
        return ""
    price = price_of_4_bits(mode, held, losses.untuned_16bit, losses.num_rows)
    return f"\n{price[:1].upper()}{price[1:]}.\n"


def _rows(losses: MergeLosses) -> str:
    """The lines of the table: what was measured."""
    return "\n".join(
        f"| {name} | {loss:.4f} |"
        for name, loss in (
            ("the untuned base, 16 bits", losses.untuned_16bit),
            ("the untuned base, 4 bits", losses.untuned_4bit),
            ("base in 4 bits and adapter, as trained", losses.adapter_4bit),
            ("merged into the 16-bit base", losses.merged_16bit),
            ("merged into the dequantised base", losses.merged_4bit),
        )
        if loss is not None
    )
