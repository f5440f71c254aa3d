"""Real shapes in fp16 on a card that only counts. `pytest tests/training/test_fake_cuda.py`

What it cannot show needs a GPU: tests/training/test_cuda.py.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.fake_cuda.library import run_with_fake_card, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]
# As wide as the models of these names, not as deep.
LLAMA = {
    "num_hidden_layers": 5,
    "vocab_size": 128_256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama 3.2 1B": LLAMA | {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64,
        "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "Mistral 7B": LLAMA | {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14_336,
        "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32_768, "sliding_window": None,
    },
    "Qwen3 4B": LLAMA | {
        "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 151_936, "tie_word_embeddings": True,
    },
    "Phi-3 mini": LLAMA | {
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192,
        "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": 32_064, "pad_token_id": 0,
    },
}  # fmt: skip
ATTENTION = "mixed:v_proj,k_proj,o_proj,q_proj"
PEAKS = [
    ("Llama 3.2 1B", "none", 2048, "nf4"),
    ("Llama 3.2 1B", "second", 1024, "nf4"),
    ("Llama 3.2 1B", "all", 1024, "nf4"),
    ("Llama 3.2 1B", "none", 2048, "none"),
    ("Llama 3.2 1B", "all", 1024, "none"),
    ("Llama 3.2 1B", "second", 1024, "mixed:down_proj"),
    ("Mistral 7B", "none", 1024, "nf4"),
    ("Mistral 7B", "none", 1024, ATTENTION),
    ("Mistral 7B", "all", 512, "mixed:gate_proj,up_proj"),
    ("Mistral 7B", "all", 256, "none"),
    ("Mistral 7B", "all", 256, "mixed:down_proj"),
    ("Qwen3 4B", "second", 512, "nf4"),
    ("Qwen3 4B", "second", 512, "none"),
    ("Phi-3 mini", "all", 512, "nf4"),
    ("Phi-3 mini", "all", 512, "mixed:down_proj"),
]
SMALL = LLAMA | {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 8000,
    "num_attention_heads": 16, "num_key_value_heads": 4,
}  # fmt: skip


# How much memory a card has that said 1 GiB: enough only for an easier plan; too little for any.
CAPS = [("nf4", 0.4, 0.12), ("none", 0.4, 0.2), (ATTENTION, 0.42, 0.14)]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All that is asked of the card, by one process."""
    peaks = [
        {
            "side": "peak",
            "config": CONFIGS[name],
            "recompute": mode,
            "tokens": n,
            "samples": 4,
            "quantization": quantization,
        }
        for name, mode, n, quantization in PEAKS
    ]
    job = {"side": "job", "config": SMALL, "memory_gib": 1.0}
    plans = [
        job | {"quantization": quantization} | cap
        for quantization, enough, too_little in CAPS
        for cap in ({}, {"cap_gib": enough}, {"cap_gib": too_little})
    ]
    folder = tmp_path_factory.mktemp("card")
    output = run_with_fake_card(
        "benchmarks.fake_cuda.steps", json.dumps(peaks + plans), folder=folder
    )
    results: list[dict[str, Any]] = json.loads(output.splitlines()[-1])
    return results


@pytest.fixture(scope="module")
def peaks(counted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A step's, for each of PEAKS."""
    return counted[: len(PEAKS)]


@pytest.fixture(scope="module")
def planned(counted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each of CAPS a trial on the card as it said, and on those two."""
    return counted[len(PEAKS) :]


@pytest.mark.parametrize("number", range(len(PEAKS)), ids=["-".join(map(str, p)) for p in PEAKS])
def test_the_predicted_peak_of_a_real_shape_is_the_counted_one_within_2_percent(
    peaks: list[dict[str, Any]], number: int
) -> None:
    counted = peaks[number]
    assert counted["predicted_bytes"] == pytest.approx(counted["peak_bytes"], rel=0.02)


def test_every_module_gives_fp16(peaks: list[dict[str, Any]]) -> None:
    """Norms under CUDA's autocast would not, left to themselves."""
    for (name, *_), counted in zip(PEAKS, peaks, strict=True):
        assert counted["dtypes"] == ["torch.float16"], name


def test_logits_are_never_whole(peaks: list[dict[str, Any]]) -> None:
    for (name, *_), counted in zip(PEAKS, peaks, strict=True):
        if "Llama" in name or "Qwen" in name:
            assert counted["largest_bytes"] < 0.6 * counted["logits_bytes"], name


@pytest.mark.parametrize("number", range(len(CAPS)), ids=["-".join(map(str, c)) for c in CAPS])
def test_a_trial_takes_its_plan_where_it_fits_and_an_easier_one_where_it_does_not(
    planned: list[dict[str, Any]], number: int
) -> None:
    """The second card has less memory than it said; both leave nothing behind when undone."""
    cap_gib = CAPS[number][1]
    fits, eases, none = planned[3 * number : 3 * number + 3]
    assert not fits["eased"]
    assert fits["warm_up_bytes"] <= fits["predicted_bytes"]
    assert eases["eased"]
    assert eases["infeasible"] is None
    assert max(eases["warm_up_bytes"], eases["peak_bytes"]) <= cap_gib * 2**30
    assert eases["standing_bytes"] == fits["standing_bytes"]
    assert none["infeasible"].startswith("the longest sample does not fit the GPU's memory")
