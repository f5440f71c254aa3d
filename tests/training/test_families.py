"""Which bases train, and why others do not. `pytest tests/training/test_families.py`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job.errors import SettingsError
from job.training.families import PACKED_FAMILIES, check_base
from tests.tiny_model import make_base, make_recipe, make_table

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "docs/families.md"
ROWS = {
    line.split("|")[1].strip(): line
    for line in PAGE.read_text().splitlines()
    if line.startswith("| ") and line.count("|") == 6 and not line.startswith("| family")
}
REFUSED = sorted(family for family, line in ROWS.items() if "| refused |" in line)
TRAINED = sorted(ROWS.keys() - set(REFUSED))


@pytest.mark.parametrize("family", TRAINED)
def test_a_family_of_the_page_trains_as_it_says(family: str, tmp_path: Path) -> None:
    from benchmarks.families import trained_row

    assert trained_row(family, tmp_path) == ROWS[family]
    assert ROWS[family].endswith("| equal |")


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_of_the_page_is_refused_as_it_says(family: str) -> None:
    from benchmarks.families import refused_row

    assert refused_row(family) == ROWS[family]


def test_the_page_has_every_packed_family_and_the_benchmarks_own_lists() -> None:
    from benchmarks import families

    assert len(ROWS) > 30
    assert set(families.TRAINED) == set(TRAINED) > set(PACKED_FAMILIES)
    assert set(families.REFUSED) == set(REFUSED)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_shares_are_those_of_the_model_that_is_loaded(family: str, tmp_path: Path) -> None:
    import bitsandbytes as bnb
    import torch

    from benchmarks.families import GPT2
    from job.training.coverage import coverage
    from job.training.model import add_adapters, load_base

    make_base(tmp_path, model_type=family, **(GPT2 if family == "gpt2" else {}))
    config = json.loads((tmp_path / "config.json").read_text())
    model = add_adapters(load_base(str(tmp_path), None, torch.device("cpu")), make_recipe())
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    adapted = [m for m in model.modules() if hasattr(m, "lora_A")]
    assert len(layers) == len(adapted) == {"llama": 14, "gpt2": 8}[family]
    shares = coverage(config)
    assert (shares.quantised, shares.adapted) == (1.0, 1.0)


def test_layers_that_a_quantised_checkpoint_left_out_count(tmp_path: Path) -> None:
    config = json.loads((make_base(tmp_path) / "config.json").read_text())
    kept = ["lm_head", "gate_proj", "up_proj", "down_proj"]
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert check_base("whole", config | {"quantization_config": nf4}).quantised == 1.0
    half = config | {"quantization_config": nf4 | {"llm_int8_skip_modules": kept}}
    with pytest.raises(SettingsError, match=r"half \(llama\) .* only 33% of its linear weights"):
        check_base("half", half)
    as_it_is = check_base("half", half, "mixed")
    assert (round(as_it_is.quantised, 2), as_it_is.adapted) == (0.33, 1.0)
    for mode in ("none", "mixed:q_proj"):
        with pytest.raises(SettingsError, match=r"JOB_QUANTIZATION: .* name the model that it was"):
            check_base("whole", config | {"quantization_config": nf4}, mode)


def test_only_nf4_promises_4_bits(tmp_path: Path) -> None:
    config = json.loads((make_base(tmp_path) / "config.json").read_text())
    assert check_base("x", config, "none").quantised == 0.0
    mixed = check_base("x", config, "mixed:gate_proj,up_proj,down_proj")
    assert (round(mixed.quantised, 2), mixed.adapted) == (0.33, 1.0)
    with pytest.raises(SettingsError, match="no linear layers named w1; there are q_proj, k_proj"):
        check_base("x", config, "mixed:w1,q_proj")
    assert check_base("x", config, "mixed: up_proj, gate_proj,down_proj, up_proj") == mixed
    with pytest.raises(SettingsError, match="only .* would get an adapter"):
        check_base("x", {"model_type": "mixtral"}, "none")


@pytest.mark.parametrize(
    ("family", "quantization", "in_4_bits"),
    [
        ("llama", "none", 0),
        ("llama", "mixed:down_proj,v_proj", 10),
        ("gpt2", "none", 0),
        ("gpt2", "mixed:c_attn", 6),  # its layers are no nn.Linear
        ("opt", "mixed:fc1", 10),
    ],
)
def test_a_mode_loads_the_shares_that_it_promises_and_trains(
    family: str, quantization: str, in_4_bits: int, tmp_path: Path
) -> None:
    import bitsandbytes as bnb
    import torch

    from benchmarks.families import GPT2
    from job.training.coverage import coverage
    from job.training.model import add_adapters, load_base
    from job.training.state import TrainState
    from job.training.trainer import Trainer

    opt = {"ffn_dim": 128, "word_embed_proj_dim": 64}
    make_base(tmp_path, model_type=family, **{"gpt2": GPT2, "opt": opt}.get(family, {}))
    config, cpu = json.loads((tmp_path / "config.json").read_text()), torch.device("cpu")
    base = load_base(str(tmp_path), None, cpu, quantization=quantization)
    linear = coverage(config, quantization)
    layers = [m for m in base.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == in_4_bits
    assert linear.quantised == pytest.approx(_share_in_4_bits(base), abs=1e-6)
    recipe = make_recipe(quantization=quantization)
    trainer = Trainer(add_adapters(base, recipe), recipe, device=cpu, token_budget=80)
    table, state = make_table(12, seed=2), TrainState()
    before = trainer.evaluate(table, state)
    for _ in range(6):
        trainer.step(table, state)
    assert trainer.evaluate(table, state) < before


def _share_in_4_bits(model: Any) -> float:
    """Of the weights of all layers but the head that multiply."""
    import bitsandbytes as bnb
    import torch
    from transformers.pytorch_utils import Conv1D

    kinds, head = (torch.nn.Linear, Conv1D), model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, kinds) and m is not head]
    sizes = {m: m.in_features * m.out_features if hasattr(m, "in_features") else m.nx * m.nf
             for m in layers}  # fmt: skip
    return sum(n for m, n in sizes.items() if isinstance(m, bnb.nn.Linear4bit)) / sum(
        sizes.values()
    )


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "of-tomorrow"}, "knows no family of-tomorrow"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"model_type": "gpt_neox", "hidden_size": "wide"}, "cannot be built from its config.json"),
    ],
)
def test_a_config_that_makes_no_model_is_the_settings_fault(
    config: dict[str, Any], says: str
) -> None:
    with pytest.raises(SettingsError, match=f"JOB_BASE_MODEL: x .*{says}"):
        check_base("x", config)


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("bert", "its tokens see those after them"),
        ("roberta", "it counts positions in a way of its own"),
        ("mamba", "cannot be loaded as a causal language model"),
    ],
)
def test_what_no_config_shows_is_seen_once_the_weights_are_there(
    family: str, says: str, tmp_path: Path
) -> None:
    """A decoder by its config's word, and one that is handed to the loader directly."""
    import torch

    from job.training.model import load_base

    make_base(tmp_path, model_type=family, **({"is_decoder": True} if family == "roberta" else {}))
    with pytest.raises(SettingsError, match=says):
        load_base(str(tmp_path), None, torch.device("cpu"))


LONGROPE = {
    "model_type": "phi3", "original_max_position_embeddings": 16, "max_position_embeddings": 64,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [9.0] * 8},
}  # fmt: skip
DYNAMIC = {
    "max_position_embeddings": 16,
    "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
}


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_rope_that_depends_on_the_length_sees_a_sample_and_not_its_row(
    rope: dict[str, Any], tmp_path: Path
) -> None:
    import torch

    from job.training.model import add_adapters, load_base
    from job.training.state import TrainState
    from job.training.trainer import Trainer

    make_base(tmp_path, **rope)
    table, recipe, losses = make_table(12, seed=1), make_recipe(), []
    assert table.lengths.min() < 16 < table.lengths.max()
    for budget in (1, 300):  # one sample a row, and all in one
        base = load_base(str(tmp_path), None, torch.device("cpu"))
        model = add_adapters(base, recipe)
        trainer = Trainer(model, recipe, device=torch.device("cpu"), token_budget=budget)
        losses.append(trainer.evaluate(table, TrainState()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    plain = load_base(str(tmp_path), None, torch.device("cpu"))
    total = 0.0
    for start, end in zip(table.offsets[:-1], table.offsets[1:], strict=True):
        rotary = plain.base_model.rotary_emb
        if hasattr(rotary, "max_seq_len_cached"):  # as new for every sample
            rotary.max_seq_len_cached, rotary.inv_freq = 16, rotary.original_inv_freq
        ids = torch.from_numpy(table.input_ids[start:end]).long()
        with torch.no_grad():
            log_p = plain(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        where = torch.from_numpy(table.is_target[start:end].copy()).nonzero()[:, 0]
        total -= float(log_p[where - 1].gather(1, ids[where][:, None]).double().sum())
    assert losses[1] == pytest.approx(total / table.num_target_tokens, abs=1e-6)
