"""What only a CUDA GPU can show: fp16 autocast, loss scaling, memory. `make test-gpu`

They passed on an H100 (2026-11-27, torch 2.11) with the kernels that it chose; never on a T4.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from job.training.footprint import FP16_CUDA, Recompute, Work, footprint
from job.training.memory import MemoryPlan
from job.training.shape import model_shape
from tests.tiny_model import make_base, make_recipe, make_table
from tests.tiny_tokenizer import byte_level_tokenizer

pytestmark = pytest.mark.gpu
# Large enough that activations outweigh what a CUDA library keeps for itself.
MIDDLE = {
    "vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6,
    "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.fixture(autouse=True)
def attention_of_a_t4() -> Iterator[None]:
    """Leave the one fused kernel that a T4 has; other cards would take FlashAttention."""
    import torch

    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield
    torch.backends.cuda.enable_flash_sdp(True)


def _trainer(
    folder: Path,
    token_budget: int = 80,
    recompute: Recompute = "second",
    *,
    quantization: str = "nf4",
    **shape: Any,
) -> Any:
    import torch

    from job.training.model import add_adapters, load_base
    from job.training.trainer import Trainer

    device = torch.device("cuda", 0)
    recipe = make_recipe(lora_dropout=0.1, gradient_accumulation_steps=8)
    base = load_base(str(make_base(folder, **shape)), None, device, quantization=quantization)
    return Trainer(
        add_adapters(base, recipe),
        recipe,
        device=device,
        token_budget=token_budget,
        recompute=recompute,
    )


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    return _trainer(tmp_path)


@pytest.fixture
def no_cap() -> Iterator[None]:
    """Give the card back its whole memory afterwards."""
    import gc

    import torch

    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()


def test_the_memory_efficient_kernel_takes_packed_rows_with_shared_heads(trainer: Any) -> None:
    """The only fused one on sm75; transformers' enable_gqa would fall back to plain products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from job.training.state import TrainState

    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):  # raises where it cannot be used
        trainer.step(make_table(8, seed=1), TrainState())


@pytest.mark.parametrize("quantization", ["nf4", "none", "mixed:down_proj"])
@pytest.mark.parametrize("mode", ["none", "second", "all"])
def test_the_predicted_peak_is_the_measured_one_within_10_percent(
    tmp_path: Path, mode: Recompute, quantization: str, no_cap: None
) -> None:
    import gc

    import torch

    from job.training.state import TrainState

    _open_cublas()
    gc.collect()
    torch.cuda.empty_cache()
    others = torch.cuda.memory_allocated()
    trainer = _trainer(tmp_path, 2048, mode, quantization=quantization, **MIDDLE)
    batch = trainer.heaviest(make_table(40, seed=1, longest=300))
    trainer.take_step([batch], TrainState())
    torch.cuda.reset_peak_memory_stats()
    trainer.take_step([batch, batch], TrainState())
    measured = torch.cuda.max_memory_allocated() - others
    shape = model_shape(json.loads((tmp_path / "config.json").read_text()), quantization)
    assert shape is not None
    work = Work(batch.num_tokens, len(batch.targets), trainer.recipe.lora_r, True, mode)
    predicted = footprint(shape, work, FP16_CUDA).total - FP16_CUDA.workspace
    assert predicted == pytest.approx(measured, rel=0.10)


def _open_cublas() -> None:
    """Its workspaces, one for a thread that multiplies: 64 MiB in all."""
    import torch

    matrix = torch.ones(8, 8, device="cuda", dtype=torch.float16, requires_grad=True)
    (matrix @ matrix).sum().backward()


def test_out_of_memory_eases_the_plan_and_loses_no_step(tmp_path: Path, no_cap: None) -> None:
    """A real one: the card is capped so that only recomputing fits."""
    import torch

    from job.training.loop import easing_on_oom
    from job.training.state import TrainState
    from job.training.warmup import warm_up

    trainer, table = _trainer(tmp_path, 4096, "none", **MIDDLE), make_table(64, 1, longest=300)
    shape = model_shape(json.loads((tmp_path / "config.json").read_text()))
    assert shape is not None
    needs = {
        mode: footprint(shape, Work(4096, 4096, 4, True, mode), FP16_CUDA).total
        for mode in ("none", "all")
    }
    torch.cuda.empty_cache()
    cap = (needs["none"] + 2 * needs["all"]) / 3
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(cap / total)
    assert warm_up(trainer, table, MemoryPlan(4096, "none", warm_up=True)) is None
    assert trainer.recompute != "none"
    trainer.set_plan(4096, "none")  # as if training met it without a warm-up
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.optimizer.param_groups[0]["lr"] = 1e-3
    easing_on_oom(trainer, lambda: trainer.take_step([trainer.heaviest(table)], TrainState()))
    assert trainer.recompute != "none"
    moved = zip(before, trainer.parameters, strict=True)
    assert any(not torch.equal(old, new) for old, new in moved)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Use deterministic kernels as a trial does, and any others again afterwards."""
    import torch

    from job.training.device import use_deterministic_kernels

    use_deterministic_kernels(os.environ["CUBLAS_WORKSPACE_CONFIG"])
    assert torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mode", ["none", "second", "all"])
def test_two_runs_are_equal_to_the_bit(
    tmp_path: Path, mode: Recompute, deterministic: None
) -> None:
    """Rows long enough that the attention's backward splits its keys and sums them with atomics."""
    import torch

    from job.training.state import TrainState

    runs = []
    for number in range(2):
        trainer, state = _trainer(tmp_path / str(number), 2048, mode, **MIDDLE), TrainState()
        table = make_table(40, seed=1, longest=700)
        losses = [trainer.step(table, state).train_loss for _ in range(6)]
        runs.append((losses, trainer.snapshot().weights))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])


def test_the_warm_up_meets_the_peak_of_training(tmp_path: Path, no_cap: None) -> None:
    """With real rows of several steps, in every mode, to 2 %."""
    import torch

    from job.training.state import TrainState
    from job.training.warmup import warm_up

    table = make_table(64, seed=1, longest=300)
    trainer = _trainer(tmp_path, 2048, "none", **MIDDLE)
    for mode in ("none", "second", "all"):
        trainer.set_plan(2048, mode)
        torch.cuda.reset_peak_memory_stats()
        assert warm_up(trainer, table, MemoryPlan(2048, mode, warm_up=True)) is None
        torch.cuda.reset_peak_memory_stats()
        heaviest = trainer.heaviest(table)
        trainer.take_step([heaviest, heaviest], TrainState())
        warmed_up = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        state = TrainState()
        for _ in range(8):
            trainer.step(table, state)
        trainer.evaluate(table, state)
        assert torch.cuda.max_memory_allocated() <= 1.02 * warmed_up, mode


def test_the_memory_cap_holds(no_cap: None) -> None:
    import torch

    from job.training.device import open_device, usable_memory_bytes

    device = open_device("cuda", gpu_memory_gb=1.0)
    usable = usable_memory_bytes(device, gpu_memory_gb=1.0)
    assert usable is not None
    assert usable <= 2**30
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2 * 2**30, dtype=torch.uint8, device=device)


def test_a_short_trial_commits_on_the_gpu(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", vocab_size=600)
    byte_level_tokenizer().save_pretrained(base)
    rows = [
        {"question": f"What is {a} plus {b}?", "answer": f"It is {a + b}."}
        for a in range(15)
        for b in range(15)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "JOB_BASE_MODEL": base,
        "JOB_DATASET_URI": tmp_path / "rows.jsonl",
        "JOB_OUTPUT_URI": tmp_path / "out",
        "JOB_WORK_DIR": tmp_path / "work",
        "JOB_DEVICE": "cuda",
        "JOB_GPU_MEMORY_GB": "14.6",
        "JOB_USE_FULL_DATASET": "1",
        "JOB_MAX_STEPS": "25",
        "JOB_EVALS_PER_TRIAL": "2",
    }
    done = subprocess.run(
        [sys.executable, "-m", "job"],
        env={**os.environ, **{name: str(value) for name, value in settings.items()}},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").glob("sweeps/*/slots/0000/result.json")
    result = json.loads(path.read_text())
    assert result["status"] == "completed"
    assert result["eval_loss"] < result["curve"][0][1]
    (warmed_up,) = re.findall(r"memory: the heaviest step took ([\d.]+) GiB", done.stderr)
    assert 0 < result["peak_memory_bytes"] <= 1.02 * float(warmed_up) * 2**30 + 2**23
    assert "kernels: not deterministic" not in done.stderr
    assert "steps/s" in done.stderr
