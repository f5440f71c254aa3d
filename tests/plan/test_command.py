"""`job plan`: predictions, warnings, exit codes; no GPU. `pytest tests/plan/test_command.py`"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from rich.console import Console

from job.data.preview import Piece, bracketed
from job.ledger.ledger import Ledger
from job.plan import warnings
from job.plan.command import Plan, section_text
from job.plan.forecast import (
    Span,
    Throughput,
    Workload,
    throughput_of_trials,
    throughput_on_a_t4,
    throughput_on_this_cpu,
    trial_seconds,
)
from job.plan.sections import describe_cost, describe_sweep, num_drawable, num_excluded, num_left
from job.report.notation import span
from job.report.overview import Overview, SlotView, State
from job.settings import Settings
from job.store import open_store
from job.sweep.definition import SweepDefinition, parse_definition
from job.training.memory import Samples, plan_memory
from job.training.shape import model_shape
from job.trial.budget import Room
from tests import forked
from tests.servers import s3
from tests.tiny_tokenizer import byte_level_tokenizer

ROOT = Path(__file__).parents[2]
MISTRAL_7B = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32768,
}  # fmt: skip


def test_a_7b_on_a_t4_goes_as_published_and_as_aimed_at() -> None:
    shape = model_shape(MISTRAL_7B)
    assert shape is not None
    throughput = throughput_on_a_t4(shape, "all")
    assert (throughput.slow, throughput.fast) == pytest.approx((210, 350), rel=0.03)
    assert "not measured" in throughput.basis
    assert throughput_on_a_t4(shape, "none").fast == pytest.approx(1.5 * throughput.fast)


def test_committed_trials_are_believed_before_any_estimate() -> None:
    throughput = throughput_of_trials([100.0, 90.0, 3000.0])
    assert throughput.slow < 100 < throughput.fast
    assert throughput.basis == "measured by 3 committed trials"


def test_an_evaluation_costs_one_forward_pass() -> None:
    throughput = Throughput(slow=10, fast=20, basis="")
    assert trial_seconds([Workload(1, 1000, 0)], throughput, "all") == Span(50, 100)
    assert trial_seconds([Workload(1, 1000, 300)], throughput, "all") == Span(55, 110)
    assert trial_seconds([Workload(1, 1000, 300)], throughput, "none") == Span(57.5, 115)


def test_a_few_layers_speed_is_shared_out_over_all_and_the_head() -> None:
    shape = model_shape(MISTRAL_7B)
    shallow = model_shape(MISTRAL_7B | {"num_hidden_layers": 2, "vocab_size": 0})
    assert shape is not None
    assert shallow is not None
    layers_alone = throughput_on_this_cpu(shape, shallow, 160.0, 0.0)
    assert layers_alone.slow < 10.0 < layers_alone.fast, "a sixteenth: 2 of 32 layers"
    assert "2 layers" in layers_alone.basis
    with_head = throughput_on_this_cpu(shape, shallow, 160.0, 1.0)
    weights = 32 * shallow.quantised_weights // 2
    assert layers_alone.fast / with_head.fast == pytest.approx(1 + 32768 * 4096 / weights)


@pytest.mark.parametrize(
    ("short", "long", "text"),
    [
        (0.001, 0.002, "under a minute"),
        (12, 200, "under a minute to 3 min"),
        (179, 181, "about 3 min"),
        (5460, 9000, "91 min to 2.5 h"),
    ],
)
def test_a_forecast_says_nothing_exact_of_seconds(short: float, long: float, text: str) -> None:
    assert span(short, long) == text


def test_a_sweep_that_costs_next_to_nothing_says_so() -> None:
    settings = _settings(num_trials=12, gpu_hourly_usd=0.35, device="auto")
    cost = describe_cost(settings, Span(0.1, 0.2))
    assert cost == "12 trials: under a minute of GPU at most, under a cent"
    cost = describe_cost(settings, Span(5490, 9150))
    assert cost == "12 trials: 18.3 h to 30.5 h of GPU at most, $6.41 to $10.67"
    cost = describe_cost(settings, Span(1, 10))
    assert cost == "12 trials: under a minute to 2 min of GPU at most, $0.0012 to $0.01"


def _settings(**given: Any) -> Settings:
    return Settings(dataset_uri="rows", output_uri="out", **given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"num_trials": 12}, "s: 1 of 12 trials can be drawn (the sweep has 1 point), random over"),
        ({"num_trials": 1}, "s: 1 trial, random over nothing"),
        ({"num_trials": 12, "WANDB_SWEEP_ID": "a/b/c"}, "s: 12 trials, random"),
    ],
)
def test_slots_that_are_never_drawn_are_foretold(given: dict[str, Any], told: str) -> None:
    sweep = _sweep("random", learning_rate={"value": 1e-4})
    assert describe_sweep(_settings(**given), sweep, "s").startswith(told)


def test_the_reason_that_leaves_fewest_trials_is_told() -> None:
    views = tuple(SlotView(number, "excluded") for number in range(3))
    drawn = SlotView(3, "excluded", planned_steps=10)
    overview = Overview("s", "out", None, (*views, drawn))
    assert num_excluded(_settings(num_trials=12), overview) == 3, "one was drawn before"
    assert num_excluded(_settings(num_trials=2), overview) == 2
    grid = _sweep("grid", learning_rate={"values": [1e-5, 1e-4]})
    assert num_drawable(_settings(num_trials=12), grid, 3) == (2, "the grid has 2 points")
    assert num_drawable(_settings(num_trials=3), grid, 2) == (1, "2 are excluded")
    assert num_drawable(_settings(num_trials=2), grid, 1) == (1, "1 is excluded")
    assert num_drawable(_settings(num_trials=2), grid, 0) == (2, None)


@pytest.mark.parametrize(
    ("least", "most", "says"),
    [
        (12, 14, None),
        (5, 14, "room for about 5 to 12 more trials, not 12: $0.60 are spent, JOB_X is 2;"),
        (5, 5, "room for about 5 more trials, not 12: "),
        (1, 1, "room for about 1 more trial, not 12: "),
    ],
)
def test_a_budget_that_ends_the_sweep_is_foretold(least: int, most: int, says: str | None) -> None:
    found = list(warnings.of_budgets([Room("JOB_X", 2, "$0.60", least, most)], 12))
    assert says in found[0] if says else found == []


@pytest.mark.parametrize(("drawable", "left"), [(6, 3), (4, 1), (2, 0)])
def test_what_is_drawn_is_left_out_of_the_trials_that_are_to_come(drawable: int, left: int) -> None:
    states: tuple[State, ...] = ("completed", "empty", "running", "empty", "excluded", "empty")
    views = tuple(SlotView(number, state) for number, state in enumerate(states))
    assert num_left(drawable, Overview("s", "out", None, views)) == left


def _sweep(method: str, **parameters: Any) -> SweepDefinition:
    metric = {"name": "eval/loss", "goal": "minimize"}
    rate = {"min": 1e-5, "max": 1e-4}
    domains = {"learning_rate": rate} | parameters
    return parse_definition({"method": method, "metric": metric, "parameters": domains})


@pytest.mark.parametrize(
    ("short", "long", "words"), [(1, 2, None), (2, 4, "may be"), (4, 5, "will be")]
)
def test_trials_longer_than_their_budget_are_foretold(
    short: float, long: float, words: str | None
) -> None:
    found = list(warnings.of_time(_settings(), Span(3600 * short, 3600 * long)))
    assert [words] == [w for w in ("may be", "will be") if w in found[0]] if words else not found


@pytest.mark.parametrize(("gib", "fits"), [(14.6, True), (2, False)])
def test_a_model_that_fits_no_plan_is_foretold(gib: float, fits: bool) -> None:
    memory = plan_memory(
        MISTRAL_7B, Samples(longest=1024, mean=400, deviation=300, per_step=16),
        lora_r=8, lora_dropout=0.1, per_device_train_batch_size=2, usable_bytes=int(gib * 2**30),
    )  # fmt: skip
    found = list(warnings.of_memory({"nf4": memory}))
    assert found == [] if fits else "does not fit: its smallest plan needs" in found[0]


def test_a_checkpoint_too_large_for_the_grace_is_foretold() -> None:
    assert list(warnings.of_checkpoints(_settings(), 250_000_000, 40e6)) == []
    (line,) = warnings.of_checkpoints(_settings(), 250_000_000, 10e6)
    assert "250 MB takes 25 s" in line
    assert "11 s are left" in line


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        (None, None),
        ([8, 38], None),
        ([8, 64], "draws lora_r up to 64, and adapters above 38 are over JOB_MAX_ADAPTER_MB (200)"),
    ],
)
def test_searched_ranks_whose_adapters_are_too_large_are_foretold(
    ranks: list[int] | None, says: str | None
) -> None:
    sweep = _sweep("random", **({} if ranks is None else {"lora_r": {"values": ranks}}))
    found = list(warnings.of_adapters(_settings(), sweep, MISTRAL_7B))
    assert (says in found[0] and found[0].endswith("raise it to 335.6")) if says else found == []
    assert not list(warnings.of_adapters(_settings(), sweep, MISTRAL_7B | {"model_type": "olmo2"}))


@pytest.mark.parametrize(
    ("rows", "searched", "says"),
    [
        (512, {}, None),
        (181, {}, "a step takes 512 samples and there are 181 rows to train on: it goes over"),
        (512, {"gradient_accumulation_steps": {"values": [4, 512]}}, "a step takes 1,024 samples"),
    ],
)
def test_steps_of_more_samples_than_rows_are_foretold(
    rows: int, searched: dict[str, Any], says: str | None
) -> None:
    settings = _settings(per_device_train_batch_size=2, gradient_accumulation_steps=256)
    data: Any = SimpleNamespace(counts=SimpleNamespace(train=rows))
    found = list(warnings.of_steps(settings, _sweep("random", **searched), data))
    assert found[0].startswith(says) if says else found == []


@pytest.mark.slow
def test_lifecycle_rules_that_delete_the_sweep_are_foretold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3.moto_server(tmp_path) as endpoint:
        s3.use(monkeypatch, endpoint)
        store = open_store(f"s3://{s3.BUCKET}/sweeps")
        assert list(warnings.of_expiry(store)) == []
        rules = [
            {"Status": status, "Filter": {"Prefix": prefix}, "Expiration": {"Days": 7}}
            for status, prefix in (("Enabled", "swe"), ("Enabled", "x/"), ("Disabled", ""))
        ]
        boto3.client("s3").put_bucket_lifecycle_configuration(
            Bucket=s3.BUCKET, LifecycleConfiguration={"Rules": rules}
        )
        (line,) = warnings.of_expiry(store)
        assert "under swe 7 days after they were written" in line


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, "\x1b[32mA"), (False, "[[A")])
def test_a_sample_is_coloured_on_a_terminal_only(is_terminal: bool, shown: str) -> None:
    plan = Plan(sample=[Piece("Q\n", False), Piece("A\nB", True)])
    plan.sections["sample"] = bracketed(plan.sample)
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, color_system="standard", no_color=False)
    console.print(section_text(plan, "sample", console))
    assert shown in out.getvalue()
    assert ("[[" in out.getvalue()) != is_terminal


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("plan")
    byte_level_tokenizer().save_pretrained(folder / "base")
    (folder / "base/config.json").write_text(json.dumps(MISTRAL_7B))
    (folder / "base/model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")  # no weights are needed
    sums = [(a, b) for a in range(12) for b in range(12)]
    rows = [{"question": f"{a}+{b}?", "answer": str(a + b), "url": "x[0]"} for a, b in sums]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "JOB_BASE_MODEL": f"{folder}/base", "JOB_DATASET_URI": f"{folder}/rows.jsonl",
        "JOB_OUTPUT_URI": f"{folder}/out", "JOB_WORK_DIR": f"{folder}/work",
        "JOB_USE_FULL_DATASET": "1", "JOB_GPU_HOURLY_USD": "0.35",
    }  # fmt: skip


def _plan(inputs: dict[str, str], *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    forked.with_torch()
    return forked.run(
        [sys.executable, "-m", "job", "plan", *words],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | inputs | environ,
        timeout=120, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.slow
def test_the_plan_names_every_part(inputs: dict[str, str]) -> None:
    done = _plan(inputs)
    assert done.returncode == 0, done.stderr
    parts = [line.split()[0] for line in done.stdout.splitlines() if line[:1].strip()]
    assert parts == [
        "sweep", "store", "base", "rows", "sample", "memory", "trial", "in", "precision", "end",
        "warning", "warning", "advice", "advice",
    ]  # fmt: skip
    assert "7.25 B weights; 100% of its linear weights in 4 bits, 100% adapted" in done.stdout
    sample = done.stdout.partition("sample     ")[2].partition("\nmemory")[0]
    assert re.fullmatch(
        r"<\|im_start\|>user\n {11}\d+\+\d+\?<\|im_end\|>\n {11}<\|im_start\|>assistant\n"
        r" {11}\[\[\d+<\|im_end\|>\]\]",
        sample,
    )
    assert "of 14.60 GiB" in done.stdout
    assert "only" in done.stdout, "fewer held-out rows than JOB_EVAL_ROWS"
    assert "144  rows read" in done.stdout, "the table of counts"
    assert "columns not used: url: " in done.stdout
    out = Path(inputs["JOB_OUTPUT_URI"])
    assert not list(out.glob("probe*")), "the file that measured the upload is gone"


@pytest.mark.slow
def test_numbers_for_a_program(inputs: dict[str, str]) -> None:
    done = _plan(inputs, "--json", JOB_NUM_TRIALS="3", JOB_SWEEP_BUDGET_GPU_HOURS="0.001")
    content = json.loads(done.stdout)
    (budget,) = (line for line in content["warnings"] if "the budget has room" in line)
    assert "about 1 more trial, not 3: 0.0 GPU-hours are spent" in budget
    assert content["memory"]["predicted"]["total"] < content["memory"]["usable_bytes"]
    assert content["data"]["train"] > 0
    assert content["sections"]["sample"].startswith("<|im_start|>user\n")
    assert content["sections"]["sample"].endswith("<|im_end|>]]")
    assert any("Bayesian" in warning for warning in content["warnings"])
    assert content["trial_seconds"]["short"] < content["trial_seconds"]["long"]
    fits = {one["quantization"]: one["fits"] for one in content["precisions"]}
    assert [fits["nf4"], fits["none"], len(fits)] == [True, False, 3]


@pytest.mark.slow
def test_hours_and_money_are_of_the_trials_that_can_be_drawn(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        "method: grid\nname: s\nmetric: {name: eval/loss, goal: minimize}\n"
        "parameters: {lora_r: {values: [8, 64]}}\n"
    )
    limits = {"JOB_SWEEP_BUDGET_USD": "99"}
    done = _plan(inputs, "--json", "--price", "t4=0.15", JOB_SWEEP_FILE=str(sweep), **limits)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    told = plan["sections"]
    assert not any("the budget has room" in line for line in plan["warnings"])
    assert (
        told["sweep"] == "s: 2 of 12 trials can be drawn (the grid has 2 points), grid over lora_r"
    )
    assert told["in all"].startswith("2 trials: ")
    assert " for 2 (" in told["cards"]
    assert told["end"] == "after 2 trials"
    assert any("adapters above 38 are over JOB_MAX_ADAPTER_MB" in line for line in plan["warnings"])


@pytest.mark.slow
def test_excluded_slots_that_were_never_drawn_cost_neither_hours_nor_money(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    out = {"JOB_OUTPUT_URI": f"{tmp_path}/out", "JOB_NUM_TRIALS": "6", "JOB_SWEEP_NAME": "s"}
    ledger = Ledger(open_store(out["JOB_OUTPUT_URI"]), "s")
    for number in (2, 5):
        ledger.slot(number).exclude("not these")
    plan = json.loads(_plan(inputs, "--json", JOB_SWEEP_BUDGET_GPU_HOURS="0.001", **out).stdout)
    told = plan["sections"]
    assert told["sweep"].startswith("s: 4 of 6 trials can be drawn (2 are excluded), bayes over")
    assert told["in all"].startswith("4 trials: ")
    (budget,) = (line for line in plan["warnings"] if "the budget has room" in line)
    assert "more trial, not 4: " in budget


@pytest.mark.slow
def test_a_precision_that_does_not_fit_or_does_not_exist_is_foretold(
    inputs: dict[str, str],
) -> None:
    done = _plan(inputs, JOB_QUANTIZATION="none", JOB_GPU_MEMORY_GB="12")
    assert done.returncode == 0, done.stderr
    assert "a trial does not fit: its smallest plan needs" in " ".join(done.stdout.split())
    large = _plan(inputs, JOB_LORA_R="64")
    assert large.returncode == 64
    assert "336 MB, limit is 200 MB: lower JOB_LORA_R to 38" in " ".join(large.stderr.split())
    refused = _plan(inputs, JOB_QUANTIZATION="mixed:w1")
    assert refused.returncode == 64
    assert "no linear layers named w1; there are q_proj" in " ".join(refused.stderr.split())


@pytest.mark.slow
def test_a_family_without_predictions_is_told_what_is_not_known_of_it(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    for file in Path(inputs["JOB_BASE_MODEL"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL_7B | {"model_type": "olmo2"}))
    base = {"JOB_BASE_MODEL": str(tmp_path), "JOB_OUTPUT_URI": str(tmp_path / "out")}
    done = _plan(inputs, "--json", "--price", "t4=0.15", **base)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["sections"]["trial"] == "its hours and its price are known once one has ended"
    (warning,) = (line for line in plan["warnings"] if "--price" in line)
    assert warning.startswith("--price t4: the base's family is one without predictions")
    assert "\ntrial      its hours and its price are known once" in _plan(inputs, **base).stdout
    assert _plan(inputs, "--price", "nosuch=1", **base).returncode == 64


@pytest.mark.slow
def test_a_price_of_a_card_that_nobody_knows_is_refused_before_the_base_is_looked_for(
    inputs: dict[str, str],
) -> None:
    done = _plan(inputs, "--price", "t4=1", "--price", "zzz=1", JOB_BASE_MODEL="/no/such/folder")
    assert done.returncode == 64
    assert "plan: --price zzz=...: no rate of this card is known; allowed: t4, l4" in done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["sweep", "store"]


@pytest.mark.slow
def test_the_exit_code_is_the_trials(inputs: dict[str, str]) -> None:
    wrong = _plan(inputs, JOB_DATASET_URI="nowhere.jsonl")
    assert wrong.returncode == 65
    assert wrong.stdout.splitlines()[0].startswith("sweep"), "what is right is shown first"
    refused = _plan(inputs, JOB_OUTPUT_URI="ftp://host/folder")
    assert refused.returncode == 64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "falcon"}, "only 0% of its linear weights can be held in 4 bits"),
        (MISTRAL_7B | {"quantization_config": {"quant_method": "gptq"}}, "already, by gptq"),
        (MISTRAL_7B | {"max_position_embeddings": 8}, "knows 8 positions; set it to 8"),
    ],
)  # fmt: skip
def test_a_base_that_cannot_train_is_refused_by_the_plan(
    inputs: dict[str, str], tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    for file in Path(inputs["JOB_BASE_MODEL"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = _plan(inputs, JOB_BASE_MODEL=str(tmp_path))
    assert done.returncode == 64
    assert says in " ".join(done.stderr.split())
