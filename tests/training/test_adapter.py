"""What a training hands over is what PEFT loads. `pytest tests/training/test_adapter.py`"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.data.samples import Tables
from job.progress import size
from tests.tiny_model import make_base, make_recipe, make_table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


class Kept:
    """A `Keeper` that leaves everything on this disk."""

    resume_dir: Path | None = None
    best: Path | None = None

    def is_due(self) -> bool:
        return False

    def put_best(self, folder: Path) -> Any:
        from job.ledger.folders import seal_folder

        self.best = folder
        return seal_folder("adapter", folder)

    def put_checkpoint(self, folder: Path, step: int, best: str | None) -> None:
        raise AssertionError("none was due")

    def report(self, **progress: Any) -> None:
        pass


RELOAD = """
import sys
import numpy as np, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
base, adapter, rows = sys.argv[1:]
quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization,
    dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
table = np.load(rows)
nll = count = 0
for start, end in zip(table["offsets"][:-1], table["offsets"][1:]):
    ids = torch.from_numpy(table["input_ids"][start:end].astype("int64"))[None]
    target = torch.from_numpy(table["is_target"][start:end])
    with torch.no_grad():
        logp = model(input_ids=ids).logits[0].log_softmax(-1)
    where = target.nonzero()[:, 0]
    nll -= float(logp[where - 1, ids[0, where]].sum())
    count += len(where)
print(nll / count)
"""


def _fit(
    base: Path,
    work_dir: Path,
    *,
    kept: Kept,
    max_adapter_bytes: int,
    refuse: Callable[[int], None] = lambda _: None,
    **recipe: Any,
) -> Any:
    import torch

    from job.training.fit import FitInputs, fit
    from job.training.loop import Ending
    from job.training.memory import MemoryPlan
    from job.training.model import load_base

    inputs = FitInputs(
        base=load_base(str(base), None, torch.device("cpu")),
        tables=Tables(make_table(40, seed=1), make_table(12, seed=2)),
        memory=MemoryPlan(80),
        ending=Ending(),
        max_adapter_bytes=max_adapter_bytes,
        refuse=refuse,
    )
    return fit(
        make_recipe(**recipe),
        inputs,
        device=torch.device("cpu"),
        work_dir=work_dir,
        keeper=kept,
    )


def test_plain_peft_in_another_process_gives_the_same_eval_loss(base: Path, tmp_path: Path) -> None:
    kept = Kept()
    fitted = _fit(base, tmp_path, kept=kept, max_adapter_bytes=200_000_000)
    held_out = make_table(12, seed=2)
    np.savez(
        tmp_path / "rows.npz",
        input_ids=held_out.input_ids,
        is_target=held_out.is_target,
        offsets=held_out.offsets,
    )
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, base, kept.best, tmp_path / "rows.npz"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert math.isclose(float(done.stdout), fitted.state.best_loss, abs_tol=1e-3)
    history = [json.loads(line) for line in fitted.history_path.read_text().splitlines()]
    assert [h["step"] for h in history if "train/loss" in h] == list(range(1, 21))


def test_an_adapter_over_the_limit_is_infeasible_before_training(
    base: Path, tmp_path: Path
) -> None:
    from job.training.shape import model_shape

    asked: list[int] = []
    fitted = _fit(
        base, tmp_path, kept=Kept(), max_adapter_bytes=20_000, refuse=asked.append, lora_r=16
    )
    assert (fitted.status, fitted.state.step, fitted.state.best) == ("infeasible", 0, None)
    config = json.loads((base / "config.json").read_text())
    shape = model_shape(config)
    assert shape is not None
    assert f"adapter would be {size(2 * shape.adapter_weights(16))}" in fitted.reason
    assert asked == [2 * shape.adapter_weights(16)], "who knows the sweep may refuse it"
