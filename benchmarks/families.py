"""Families of bases as tiny models: what is in 4 bits and adapted, and is the loss their own.

`python -m benchmarks.families` prints the table of docs/families.md, which
tests/training/test_families.py holds. The refused ones are so by their config.json alone, at
transformers' default size.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from job.data.samples import SampleTable
from job.errors import SettingsError
from job.ledger.records import Recipe
from job.training.coverage import coverage
from job.training.families import check_base, is_packed
from job.training.model import add_adapters, load_base
from job.training.state import TrainState
from job.training.trainer import Trainer

CPU = torch.device("cpu")
IDS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
# Changes to TINY; where a family has names of its own, they stand for themselves.
TRAINED: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {}, "phi3": {}, "granite": {}, "cohere": {},
    "cohere2": {}, "apertus": {}, "arcee": {}, "bitnet": {}, "diffllama": {}, "doge": {},
    "ernie4_5": {}, "exaone4": {}, "glm": {"head_dim": 16}, "gpt2": GPT2, "gpt_bigcode": GPT2,
    "gpt_neox": {}, "helium": {"head_dim": 16}, "nemotron": {"head_dim": 16}, "olmo": {},
    "olmo2": {}, "olmo3": {}, "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64}, "persimmon": {},
    "phi": {}, "biogpt": {}, "seed_oss": {}, "smollm3": {}, "stablelm": {}, "starcoder2": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]}, "recurrent_gemma": {},
}  # fmt: skip
REFUSED = (
    "falcon", "mixtral", "qwen2_moe", "olmoe", "phimoe", "granitemoehybrid", "jamba", "falcon_h1",
    "mamba", "bert", "roberta", "bart", "t5", "bloom", "mpt", "gptj", "xlnet",
)  # fmt: skip
RECIPE = Recipe(
    learning_rate=5e-3, gradient_accumulation_steps=2, lora_dropout=0.0, weight_decay=0.0, lora_r=4,
    lora_alpha=8, lr_scheduler="constant", warmup_ratio=0.0, max_grad_norm=1.0,
    per_device_train_batch_size=2, seed=17, planned_steps=4, eval_steps=(4,), patience=1,
)  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    print("| family | rows | in 4 bits | adapted | loss, or why it is refused |")
    print("|---|---|---|---|---|")
    for family in TRAINED:
        with tempfile.TemporaryDirectory() as folder:
            print(trained_row(family, Path(folder)))
    for family in REFUSED:
        print(refused_row(family))


def trained_row(family: str, folder: Path) -> str:
    """Load a tiny model as the job does, compare its losses with its own, and train four steps."""
    shape = IDS | (GPT2 if TRAINED[family] is GPT2 else TINY | TRAINED[family])
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    shares = coverage(config.to_dict())
    base, table = load_base(str(folder), None, CPU), _rows()
    own = _own_loss(base, table)
    trainer = Trainer(add_adapters(base, RECIPE), RECIPE, device=CPU, token_budget=80)
    difference = abs(trainer.evaluate(table, TrainState()) - own)
    losses = [trainer.step(table, TrainState()).train_loss for _ in range(4)]  # the same samples
    equal = "equal" if difference < 1e-5 and losses[-1] < losses[0] else f"off by {difference:.1e}"
    rows = "packed" if is_packed(family) else "one at a time"
    return f"| {family} | {rows} | {shares.quantised:.0%} | {shares.adapted:.0%} | {equal} |"


def refused_row(family: str) -> str:
    """Say why the family is refused, at the size that is transformers' default."""
    try:
        check_base(family, AutoConfig.for_model(family).to_dict())
    except SettingsError as error:
        _, _, reason = str(error).partition("cannot be trained: ")
        return f"| {family} | refused | | | {reason.partition('; take')[0]} |"
    return f"| {family} | not refused | | | |"


def _own_loss(base: Any, table: SampleTable) -> float:
    """The mean NLL of the target tokens from the model's own logits, a sample at a time."""
    total = 0.0
    for row, targets in _samples(table):
        with torch.no_grad():
            log_p = base(input_ids=row[None], use_cache=False).logits[0].float().log_softmax(-1)
        where = targets.nonzero()[:, 0]
        total -= float(log_p[where - 1].gather(1, row[where][:, None]).double().sum())
    return total / table.num_target_tokens


def _samples(table: SampleTable) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start, end in zip(table.offsets[:-1], table.offsets[1:], strict=True):
        ids = torch.from_numpy(table.input_ids[start:end].astype(np.int64))
        yield ids, torch.from_numpy(table.is_target[start:end].copy())


def _rows() -> SampleTable:
    rng = np.random.default_rng(1)
    ids = [rng.integers(3, 128, n).astype(np.int32) for n in rng.integers(6, 40, 4)]
    return SampleTable.concatenate(ids, [np.arange(len(row)) >= len(row) // 2 for row in ids])


if __name__ == "__main__":
    main()
