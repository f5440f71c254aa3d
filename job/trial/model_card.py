"""The README.md beside an adapter: what it is and where it comes from, as the hub reads it.

https://huggingface.co/docs/hub/model-cards: YAML between `---` lines, then Markdown. It holds no
bucket, path or time: equal trials write equal bytes, and an adapter can be published as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import yaml

import job
from job.training.quantization import in_short, price_of_4_bits, words

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Provenance:
    """The facts about a trial that its card tells, beside its eval/loss and step."""

    base_model: str
    base_model_revision: str
    sweep: str
    slot: int
    recipe: Mapping[str, Any]
    data_digest: str
    train_rows: int
    eval_rows: int


def adapter_card(
    origin: Provenance,
    *,
    eval_loss: float,
    step: int,
    untuned: float | None = None,
    untuned_16bit: float | None = None,
) -> str:
    """The card of the adapter that reached `eval_loss` after `step` optimizer steps.

    `untuned` is the base's own eval/loss as it was trained on, `untuned_16bit` with its weights in
    16 bits, where they are known.
    """
    mode = origin.recipe.get("quantization", "nf4")
    before = _before(mode, untuned, untuned_16bit, origin.eval_rows)
    front = yaml.safe_dump(_metadata(origin, eval_loss), sort_keys=False, allow_unicode=True)
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return f"""---
{front}---

# LoRA adapter for {origin.base_model}

Trial {origin.slot} of the sweep `{origin.sweep}`, trained by qlora-sweep-job {job.__version__}, the
base in {words(mode)}. **eval/loss {eval_loss:.6f}** after {step} optimizer steps: the mean negative
log-likelihood, in nats, of an answer's token over {origin.eval_rows} held-out rows.{before}

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER OF THIS FILE", device_map="auto")
```

{_merging(mode)}

| | |
|---|---|
| base model | `{origin.base_model}` |
| its revision | `{origin.base_model_revision}` |
| rows | {origin.train_rows} to train on, {origin.eval_rows} to judge by |
| digest of the prepared rows | `{origin.data_digest}` |

| hyper-parameter | |
|---|---|
{_hyperparameters(origin)}

{packages}
"""


def _before(mode: str, untuned: float | None, untuned_16bit: float | None, eval_rows: int) -> str:
    """What is known of the untuned base's eval/loss, in sentences."""
    if untuned is None:
        return ""
    text = f" The untuned base, in {in_short(mode)}, has {untuned:.6f}."
    if mode == "none" or untuned_16bit is None:
        return text
    price = price_of_4_bits(mode, untuned, untuned_16bit, eval_rows)
    return f"{text}\n{price[:1].upper()}{price[1:]}."


def _merging(mode: str) -> str:
    made = "A model of its own, which vLLM and llama.cpp take, is made by\n`job best --merge`"
    if mode != "nf4":
        return f"It was trained on the base in {in_short(mode)}. {made}."
    return (
        f"It was trained on the base in 4 bits. {made}, which measures whether the 16-bit or the"
        " 4-bit base\nis the better one for it."
    )


def _hyperparameters(origin: Provenance) -> str:
    return "\n".join(
        f"| {name} | {_cell(value)} |"
        for name, value in sorted(origin.recipe.items())
        if not isinstance(value, list | tuple)
    )


def _metadata(origin: Provenance, eval_loss: float) -> dict[str, Any]:
    on_the_hub = not origin.base_model_revision.startswith("sha256:")
    qlora = [] if origin.recipe.get("quantization") == "none" else ["qlora"]
    metric = {"type": "loss", "name": "eval/loss", "value": round(eval_loss, 6)}
    dataset = {"type": "private", "name": f"prepared rows {origin.data_digest[:12]}"}
    return {
        # The hub refuses a base model that is not one of its own.
        **({"base_model": origin.base_model} if on_the_hub else {}),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", *qlora, "base_model:adapter"],
        "model-index": [
            {
                "name": f"{origin.sweep}-{origin.slot:04d}",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": dataset,
                        "metrics": [metric],
                    }
                ],
            }
        ],
    }


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|")
