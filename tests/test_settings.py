"""Settings: every mistake at once, in words, without secrets. `pytest tests/test_settings.py`"""

from __future__ import annotations

import base64
import json
import logging
import os
import urllib.parse

import pytest

from job.errors import SettingsError
from job.log import mask_secrets, set_up_logging
from job.settings import IDENTITY_FIELDS, NOT_NEEDED, Settings, variable
from job.variables import load_settings

REQUIRED = {"JOB_DATASET_URI": "rows.jsonl", "JOB_OUTPUT_URI": "out"}

# Every setting is either part of the sweep's identity or free to change. Rows, model and sweep
# file enter the identity resolved, under their own names.
RESOLVED = {
    "base_model", "base_model_revision", "dataset_uri", "sweep_file", "use_full_dataset",
    "subsample_fraction", "eval_fraction", "max_seq_length", "prompt_column", "completion_column",
    "chat_template", "prompt_template", "system_prompt", "warm_start_uri",
}  # fmt: skip
FREE = {
    "output_uri", "sweep_name", "num_trials", "min_gain", "completion_index", "trial_budget_hours",
    "sweep_budget_gpu_hours", "gpu_hourly_usd", "checkpoint_minutes", "lease_seconds",
    "grace_seconds", "outage_minutes", "max_adapter_mb", "device", "gpu_memory_gb", "work_dir",
    "wandb_artifact", "log_format", "strict", "wandb_sweep_id", "wandb_api_key", "wandb_entity",
    "wandb_project", "wandb_mode", "hf_token", "workers", "sweep_budget_usd", "notify_urls",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("JOB_", "WANDB_", "HF_TOKEN", "IMAGE_REVISION")):
            monkeypatch.delenv(name)


def _load(monkeypatch: pytest.MonkeyPatch, **variables: str) -> tuple[Settings, list[str]]:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return load_settings()


def _mistakes(monkeypatch: pytest.MonkeyPatch, **variables: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        _load(monkeypatch, **variables)
    return str(caught.value).splitlines()


def test_the_defaults_are_the_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, warnings = _load(monkeypatch, **REQUIRED)
    assert warnings == []
    assert settings.base_model == "unsloth/mistral-7b-v0.3-bnb-4bit"
    assert (settings.subsample_fraction, settings.eval_fraction) == (0.15, 0.2)
    assert settings.per_device_train_batch_size == 2
    assert (settings.max_steps, settings.evals_per_trial, settings.patience) == (1500, 8, 3)
    assert (settings.lora_r, settings.lora_alpha, settings.max_adapter_mb) == (8, 16, 200)
    assert settings.row_fraction == 0.15
    assert settings.quantization == "nf4"


@pytest.mark.parametrize(
    "value", ["none", "mixed", "mixed:v_proj,down_proj", "int8", "mixed:", "NF4"]
)
def test_the_bases_precision_is_a_word_or_names_matrices(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    if value in ("int8", "mixed:", "NF4"):
        (line,) = _mistakes(monkeypatch, **REQUIRED, JOB_QUANTIZATION=value)
        assert line.startswith(
            f"JOB_QUANTIZATION: is {value!r}; allowed: nf4, none, mixed, or mixed:"
        )
    else:
        assert _load(monkeypatch, **REQUIRED, JOB_QUANTIZATION=value)[0].quantization == value


def test_use_full_dataset_changes_only_the_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, _ = _load(monkeypatch, **REQUIRED, JOB_USE_FULL_DATASET="True")
    assert settings.row_fraction == 1.0
    assert settings.eval_fraction == 0.2


def test_all_mistakes_come_at_once_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = _mistakes(
        monkeypatch,
        JOB_OUTPUT_URI="out",
        JOB_MAX_STEPS="many",
        JOB_EVAL_FRACTION="1",
        JOB_DEVICE="tpu",
        JOB_LERNING_RATE="1e-4",
        JOB_SWEEP_BUDGET_GPU_HOURS="-1",
    )
    assert [line.partition(":")[0] for line in lines] == [
        "JOB_DATASET_URI",
        "JOB_EVAL_FRACTION",
        "JOB_MAX_STEPS",
        "JOB_SWEEP_BUDGET_GPU_HOURS",
        "JOB_DEVICE",
        "JOB_LERNING_RATE",
    ]
    assert "allowed: > 0 and < 1" in lines[1]
    assert "'auto', 'cuda' or 'cpu'" in lines[4]
    assert "did you mean JOB_LEARNING_RATE?" in lines[5]


def test_an_unknown_variable_is_a_warning_unless_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    _, warnings = _load(monkeypatch, **REQUIRED, JOB_NAME="build-17")
    assert warnings == ["JOB_NAME: unknown variable, ignored"]
    (line,) = _mistakes(monkeypatch, JOB_STRICT="1")
    assert line.startswith("JOB_NAME: unknown variable, refused under JOB_STRICT=1; the nearest is")


@pytest.mark.parametrize("value", ["1", "4"])
def test_a_setting_that_is_gone_says_what_to_use_instead(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    (line,) = _mistakes(monkeypatch, **REQUIRED, JOB_NUM_GPUS=value)
    assert line.startswith("JOB_NUM_GPUS: is gone: a trial trains on one GPU;")
    assert "`job queue` with JOB_WORKERS=auto runs one on each" in line


@pytest.mark.parametrize("value", ["1", "2", "64", "auto"])
def test_workers_are_a_number_or_auto(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    assert _load(monkeypatch, **REQUIRED, JOB_WORKERS=value)[0].workers == value


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "65", "all", "two", "\u0662"])
def test_no_other_number_of_workers_is_taken(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    (line,) = _mistakes(monkeypatch, **REQUIRED, JOB_WORKERS=value)
    assert line == f"JOB_WORKERS: is {value!r}; allowed: auto (one for every GPU), or 1 to 64"


@pytest.mark.parametrize(
    "name",
    [
        # Jenkins (core, "Available environment variables") and its plug-ins
        *("JOB_NAME", "JOB_BASE_NAME", "JOB_URL", "JOB_DISPLAY_URL"),
        *("JOB_ID", "JOB_SCRIPT"),  # Grid Engine, qsub(1)
        # GitLab, Slurm and others where a prologue cuts their own prefix off
        *(
            "JOB_TOKEN",
            "JOB_STAGE",
            "JOB_STATUS",
            "JOB_STARTED_AT",
            "JOB_PARTITION",
            "JOB_NODELIST",
        ),
        # Kubernetes' service links, for a service that is called job
        *("JOB_SERVICE_HOST", "JOB_SERVICE_PORT", "JOB_PORT", "JOB_PORT_80_TCP_ADDR"),
    ],
)
def test_another_systems_variable_is_no_misspelt_setting(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    _, (warning,) = _load(monkeypatch, **REQUIRED, **{name: "/var/spool/x"})
    assert warning.startswith(f"{name}: unknown variable, ignored")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("JOB_WORKDIR", "JOB_WORK_DIR"),
        ("JOB_OUTPUT_URL", "JOB_OUTPUT_URI"),
        ("JOB_SEDE", "JOB_SEED"),
        ("JOB_DEVICES", "JOB_DEVICE"),
        ("JOB_MAX_STESP", "JOB_MAX_STEPS"),
        ("JOB_NUMTRIAL", "JOB_NUM_TRIALS"),
        ("JOB_LORAR", "JOB_LORA_R"),
    ],
)
def test_a_slip_of_the_hand_is_an_error(
    monkeypatch: pytest.MonkeyPatch, name: str, meant: str
) -> None:
    (line,) = _mistakes(monkeypatch, **REQUIRED, **{name: "1"})
    assert line == f"{name}: unknown variable; did you mean {meant}?"


@pytest.mark.parametrize("name", ["job_num_trials", "Job_Num_Trials"])
def test_a_setting_that_is_set_twice_is_an_error(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    _load(monkeypatch, **REQUIRED, **{name: "5"})
    (line,) = _mistakes(monkeypatch, **REQUIRED, **{name: "5", "JOB_NUM_TRIALS": "3"})
    assert line == f"{name}: JOB_NUM_TRIALS is set as well; unset one of them"


@pytest.mark.parametrize(("full", "told"), [("1", True), ("0", False)])
def test_a_fraction_that_is_not_used_is_told(
    monkeypatch: pytest.MonkeyPatch, full: str, told: bool
) -> None:
    both = {"JOB_USE_FULL_DATASET": full, "JOB_SUBSAMPLE_FRACTION": "0.1"}
    _, warnings = _load(monkeypatch, **REQUIRED, **both)
    assert (
        warnings == ["JOB_SUBSAMPLE_FRACTION: not used, JOB_USE_FULL_DATASET takes all rows"] * told
    )


@pytest.mark.parametrize(
    ("text", "is_told"),
    [
        *(('"You are terse, {question}."', True), ("'{question}'", True), (" '{a}\n{b}'\n", True)),
        *(("'Don't shout, {question}.'", True), ('"Say \\"{a}\\"."', True), ('"{a}', False)),
        *(('"{a}" or "{b}"', False), ("'{a}', '{b}'", False), ("{a}", False), ("\"{a}'", False)),
    ],
)
@pytest.mark.parametrize("name", ["JOB_SYSTEM_PROMPT", "JOB_PROMPT_TEMPLATE"])
def test_a_prompt_in_quotes_is_told_and_stays(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, is_told: bool
) -> None:
    settings, warnings = _load(monkeypatch, **REQUIRED, **{name: text})
    assert getattr(settings, name.removeprefix("JOB_").lower()) == text
    assert len(warnings) == is_told
    for warning in warnings:
        assert warning.startswith(f"{name}: begins and ends with {text.strip()[0]}, which is kept")
        assert "give the text without them" in warning


def test_what_is_further_off_is_told_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (warning,) = _load(monkeypatch, **REQUIRED, JOB_USE_FULL_DATA="1")
    assert warning.endswith("ignored; the nearest setting is JOB_USE_FULL_DATASET")


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, _ = _load(monkeypatch, **REQUIRED, JOB_COMPLETION_INDEX="", JOB_MAX_STEPS="")
    assert settings.completion_index is None
    assert settings.max_steps == 1500


def test_an_index_beyond_the_trials_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = _mistakes(monkeypatch, **REQUIRED, JOB_COMPLETION_INDEX="12")
    assert line.startswith("JOB_COMPLETION_INDEX: is 12, but JOB_NUM_TRIALS is 12")


def test_a_budget_in_dollars_needs_a_price(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = _mistakes(monkeypatch, **REQUIRED, JOB_SWEEP_BUDGET_USD="10")
    assert line.startswith("JOB_SWEEP_BUDGET_USD: is set, but not JOB_GPU_HOURLY_USD")
    settings, _ = _load(monkeypatch, JOB_GPU_HOURLY_USD="0")
    assert (settings.sweep_budget_usd, settings.gpu_hourly_usd) == (10, 0)


def test_one_column_without_the_other_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = _mistakes(monkeypatch, **REQUIRED, JOB_PROMPT_COLUMN="q")
    assert line.startswith("JOB_PROMPT_COLUMN, JOB_COMPLETION_COLUMN: only one is set")


@pytest.mark.parametrize("template", ["{context}\n\n{question}", "{a b}: {{x}}\\n", "{Q}"])
def test_a_prompt_template_names_columns(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    settings, _ = _load(monkeypatch, **REQUIRED, JOB_PROMPT_TEMPLATE=template)
    assert settings.prompt_template == template
    monkeypatch.setenv("JOB_COMPLETION_COLUMN", "gold")
    assert _load(monkeypatch)[0].prompt_column is None
    (line,) = _mistakes(monkeypatch, JOB_PROMPT_COLUMN="q")
    assert line.startswith("JOB_PROMPT_TEMPLATE, JOB_PROMPT_COLUMN: both are set")


@pytest.mark.parametrize(
    "template", ["no column", "{q.upper}", "{q[0]}", "{q!r}", "{q:>9}", "{}", "{q", "q}", "{a{b}}"]
)
def test_a_prompt_template_is_no_program(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    (line,) = _mistakes(monkeypatch, **REQUIRED, JOB_PROMPT_TEMPLATE=template)
    assert line.startswith("JOB_PROMPT_TEMPLATE: ")
    assert line.endswith("column names in braces, {question}; a brace is written twice")


@pytest.mark.parametrize("name", ["JOB_OUTPUT_URI", "JOB_BASE_MODEL", "JOB_WORK_DIR"])
@pytest.mark.parametrize(("value", "says"), [("~/x", "only a shell expands"), (" /x", "a blank")])
def test_what_a_shell_would_have_expanded_is_no_folder_of_that_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    (line,) = _mistakes(monkeypatch, **{**REQUIRED, name: value})
    assert line.startswith(f"{name}: begins")
    assert says in line


PATHS = (
    *("JOB_OUTPUT_URI", "JOB_DATASET_URI", "JOB_BASE_MODEL"),
    *("JOB_WORK_DIR", "JOB_SWEEP_FILE"),
)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    ("value", "says"),
    [
        ('"/data/sweeps"', "holds quotes"),
        ("'s3://bucket/x'", "holds quotes"),
        ('/data/"sweeps"', "holds quotes"),
        ("$(STORE)/sweeps", "holds a place that nothing has filled in"),
        ("s3://${BUCKET}/sweeps", "holds a place that nothing has filled in"),
        ("$STORE/sweeps", "holds a place that nothing has filled in"),
        ("/data/{{ .Values.sweep }}", "holds a place that nothing has filled in"),  # Helm, Jinja
        ("s3://<bucket>/sweeps", "holds a place that nothing has filled in"),  # copied from a page
    ],
)
def test_a_path_that_somebody_else_was_to_finish_is_no_folder_of_that_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    if name in ("JOB_WORK_DIR", "JOB_SWEEP_FILE"):
        value = value.replace("s3://", "/")
    (line,) = _mistakes(monkeypatch, **{**REQUIRED, name: value})
    assert line.startswith(f"{name}: {says}"), line


@pytest.mark.parametrize(
    "value",
    [
        *("s3://bucket/a b/c", "s3://bucket/größe", "s3://bucket//x", "S3://bucket/x"),
        *(
            "/data/Tim's sweeps",
            "/data/$folder$/x",
            "/data/a$b",
            "/data/{train,eval}",
            "/data/*.jsonl",
        ),
        *("gs://bucket/50%", "/data/größe", "/a//b", "/data/a<b"),
    ],
)
@pytest.mark.parametrize("name", ["JOB_OUTPUT_URI", "JOB_DATASET_URI"])
def test_an_unusual_path_is_a_path(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv("IMAGE_REVISION", "abc")
    given = {"JOB_DATASET_URI": "rows.jsonl", "JOB_OUTPUT_URI": "/out", name: value}
    settings, warnings = _load(monkeypatch, **given)
    assert getattr(settings, name.removeprefix("JOB_").lower()) == value
    assert warnings == []


@pytest.mark.parametrize("value", ["out", "./out", "../out"])
def test_a_relative_output_is_refused_in_the_image_only(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    given = {**REQUIRED, "JOB_OUTPUT_URI": value}
    assert _load(monkeypatch, **given)[0].output_uri == value
    (line,) = _mistakes(monkeypatch, IMAGE_REVISION="unknown")
    assert line.startswith("JOB_OUTPUT_URI: is a relative path, which is lost with the container")


def test_a_verb_without_an_output_needs_none_in_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGE_REVISION", "abc")
    load_settings(dataset_uri=NOT_NEEDED, output_uri=NOT_NEEDED)


def test_spellings_of_values_that_have_always_worked(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, warnings = _load(
        monkeypatch,
        **REQUIRED,
        JOB_STRICT="yes",
        JOB_LEARNING_RATE="1e-4",
        JOB_MAX_STEPS="20\r",  # an env file with Windows' line ends
        JOB_WEIGHT_DECAY=".1\r\n",
        JOB_USE_FULL_DATASET="on",
    )
    assert (settings.strict, settings.use_full_dataset) == (True, True)
    assert (settings.learning_rate, settings.max_steps, settings.weight_decay) == (1e-4, 20, 0.1)
    assert warnings == []


@pytest.mark.parametrize("name", ["JOB_SWEEP_FILE", "JOB_WORK_DIR"])
def test_a_uri_where_a_path_is_needed_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (line,) = _mistakes(monkeypatch, **REQUIRED, **{name: "file:///x/y"})
    assert line.startswith(f"{name}: is a URI; give a path")


@pytest.mark.parametrize(
    "uri", ["s3://key:hunter22@bucket/x", "https://h/x?X-Amz-Signature=hunter22"]
)
def test_a_secret_in_a_uri_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    (line,) = _mistakes(monkeypatch, JOB_OUTPUT_URI="out", JOB_DATASET_URI=uri)
    assert line.startswith("JOB_DATASET_URI: must not hold a")
    assert "hunter22" not in line


def test_no_error_and_no_repr_shows_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"WANDB_API_KEY": "k" * 40, "HF_TOKEN": "hf_" + "t" * 30}
    settings, _ = _load(monkeypatch, **REQUIRED, **secrets)
    shown = [repr(settings), str(settings), settings.model_dump_json()]
    shown += _mistakes(monkeypatch, JOB_MAX_STEPS="x")
    for text in shown:
        assert not any(secret in text for secret in secrets.values())


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_log_line_and_no_traceback_shows_a_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], log_format: str
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    set_up_logging(log_format)
    try:
        raise RuntimeError("401 for key wJalrXUtnFEMI at https://me:letmein@host/")
    except RuntimeError:
        logging.getLogger("job").exception("with wJalrXUtnFEMI")
    shown = capsys.readouterr().err
    assert "RuntimeError" in shown
    assert "wJalrXUtnFEMI" not in shown
    assert "letmein" not in shown


SECRET = 'wJal/r+XU"tn\\FE\tMä'


@pytest.mark.parametrize(
    "shown",
    [
        SECRET,
        repr(SECRET),
        repr({"key": SECRET}),
        json.dumps({"key": SECRET}),
        json.dumps({"key": SECRET}, ensure_ascii=False),
        urllib.parse.quote(SECRET),
        urllib.parse.quote(SECRET, safe=""),
        urllib.parse.urlencode({"key": SECRET}),
        base64.b64encode(f"api:{SECRET}".encode()).decode(),
    ],
)
@pytest.mark.parametrize("value", [SECRET, f"{SECRET}\n", f'"{SECRET}"', f" '{SECRET}' "])
def test_a_secret_is_masked_however_a_library_writes_it(value: str, shown: str) -> None:
    masked = mask_secrets(f"<{shown}>", {"AWS_SECRET_ACCESS_KEY": value})
    assert "***" in masked
    assert "wJal" not in masked
    assert "FE" not in masked


def test_each_line_of_a_secret_is_masked() -> None:
    environ = {"SIGNING_PRIVATE_KEY": "-----BEGIN-----\nMIIEvQIBADAN\nBgkqhkiG9w0B\n"}
    assert mask_secrets("line MIIEvQIBADAN", environ) == "line ***"
    # A variable may hold any bytes.
    assert mask_secrets("x", {"HF_TOKEN": "secret\udcff"}) == "x"


def test_mask_secrets_leaves_ordinary_values_alone() -> None:
    environ = {"JOB_SEED": "17171717", "HF_TOKEN_PATH": "/home/me", "HF_TOKEN": "abc"}
    assert mask_secrets("17171717 /home/me abc", environ) == "17171717 /home/me abc"


def test_every_setting_is_in_exactly_one_group() -> None:
    groups = [set(IDENTITY_FIELDS), RESOLVED, FREE]
    assert sorted(field for group in groups for field in group) == sorted(Settings.model_fields)


def test_variables_have_the_prefix_except_those_of_other_tools() -> None:
    assert variable("max_steps") == "JOB_MAX_STEPS"
    assert variable("wandb_sweep_id") == "WANDB_SWEEP_ID"


NAME_RULE = (
    "allowed: 1 to 64 of a-z, A-Z, 0-9, '.', '_', '-', with a letter or a digit first and no '..'"
)


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("JOB_GRACE_SECONDS", "3", "is '3'; allowed: >= 5 and <= 3600"),
        ("JOB_LEASE_SECONDS", "7200", "is '7200'; allowed: > 0 and <= 3600"),
        ("JOB_SEED", "1.5", "is '1.5', must be a valid integer; allowed: >= 0 and < 2147483648"),
        ("JOB_STRICT", "maybe", "is 'maybe', must be a valid boolean"),
        ("JOB_DEVICE", "tpu", "is 'tpu', must be 'auto', 'cuda' or 'cpu'"),
        ("JOB_SWEEP_NAME", "x y", f"is 'x y'; {NAME_RULE}"),
    ],
)  # fmt: skip
def test_a_mistake_says_what_is_given_and_what_is_allowed_once(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, line: str
) -> None:
    assert _mistakes(monkeypatch, **REQUIRED, **{name: value}) == [f"{name}: {line}"]


def test_the_value_of_a_secret_is_not_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in REQUIRED.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        SettingsError, match="HF_TOKEN: is .*secret.*, must be a valid string"
    ) as caught:
        load_settings(hf_token=1234567)  # type: ignore[arg-type]
    assert "1234567" not in str(caught.value)


def test_the_signature_of_an_azure_address_is_masked() -> None:
    said = "url: /a/b?sv=1&sp=r&sig=abc%2Bdef%3D&comp=list (no such host)"
    assert mask_secrets(said, {}) == "url: /a/b?sv=1&sp=r&sig=***&comp=list (no such host)"
