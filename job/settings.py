"""The `JOB_*` variables: what each sets and allows. `variables` reads them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from string import Formatter
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from job.file_uri import path_of
from job.quantization import QUANTIZATION_PATTERN, QUANTIZATION_WORDS, in_one_spelling

PREFIX = "JOB_"
NOT_NEEDED = "not-needed"  # a required URI, for verbs that do without it
# An output URI, and the name of a sweep in it.
SWEEP_FOLDER = re.compile(r"(?:(?P<output>.*[^/])/)?sweeps/(?P<sweep>[^/]+)")
_UNLESS_SWEPT = "used where the sweep does not name it"


def _check_uri(uri: str) -> str:
    """Refuse URIs that carry a secret (they end up in logs and result.json) or name nothing."""
    if len(uri) > 1024:
        raise ValueError("is longer than 1024 characters")
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", uri)
    if scheme and not re.match(r"[a-z0-9]+://[^/]|file:///[^/]", uri, re.IGNORECASE):
        raise ValueError(
            f"names nothing after {scheme[0]}; allowed: scheme://bucket/prefix, file:///folder"
        )
    if re.match(r"[a-z0-9+.-]+://[^/]*@", uri, re.IGNORECASE):
        raise ValueError("must not hold a user or password: use the cloud SDK's own credentials")
    if re.match(r"(s3|gs|https?)://[^?]*\?", uri, re.IGNORECASE):
        raise ValueError("must not hold a query (a presigned URL is a secret)")
    path_of(uri)  # refuses the files of another machine
    _check_written_out(uri)
    return uri.rstrip("/") if len(uri) > 1 else uri


def _check_written_out(text: str) -> None:
    """Refuse what only a shell makes a path of: taken literally, it names a new, empty folder."""
    if text.startswith("~"):
        raise ValueError("begins with ~, which only a shell expands; give the whole path")
    if text != text.strip():
        raise ValueError("begins or ends with a blank; remove it")
    if text.startswith(("'", '"')) or text.endswith("'") or '"' in text:
        raise ValueError("holds quotes, which nothing removes here; give it without them")
    if re.search(r"\$[({]|^\$\w|\{\{|<[\w -]+>", text):
        raise ValueError(
            "holds a place that nothing has filled in, $(NAME), ${NAME}, {{ name }} or <name>; give"
            " it in full (Kubernetes fills in $(NAME) only where NAME stands before it in `env`)"
        )


def _check_output(uri: str) -> str:
    """Refuse a relative folder in the image: it would be lost with the container."""
    in_image = "IMAGE_REVISION" in os.environ  # set by the Dockerfile
    is_relative = "://" not in uri and not uri.startswith(("/", "file:"))
    if in_image and is_relative and uri != NOT_NEEDED:
        raise ValueError(
            "is a relative path, which is lost with the container; give a bucket (s3://, gs://, az://)"
            " or the whole path of a mounted folder"
        )
    return uri


def _check_sweep_folder(uri: str) -> str:
    """Refuse what does not end as the folder of a sweep does."""
    if not SWEEP_FOLDER.fullmatch(uri):
        raise ValueError(
            f"is {uri!r}; give the folder of an earlier sweep as it lies in its bucket, that is its"
            " JOB_OUTPUT_URI, then /sweeps/ and its name: s3://bucket/prefix/sweeps/card"
        )
    return uri


def _check_path(path: Path) -> Path:
    if re.match(r"[a-z0-9]{2,}:/", str(path), re.IGNORECASE):
        raise ValueError("is a URI; give a path on this machine")
    _check_written_out(str(path))
    return path


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or ".." in name:
        raise ValueError(
            f"is {name!r}; allowed: 1 to 64 of a-z, A-Z, 0-9, '.', '_', '-', with a letter or a"
            " digit first and no '..'"
        )
    return name


def _check_prompt_template(template: str) -> str:
    """Refuse anything but text and plain column names in braces."""
    allowed = "allowed: text and column names in braces, {question}; a brace is written twice"
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"is no template ({error}); {allowed}") from error
    names = [name for _, name, _, _ in pieces if name is not None]
    plain = [re.fullmatch(r"[^.\[\]]+", name) for name in names]
    if not names or not all(plain) or any(spec or convert for _, _, spec, convert in pieces):
        raise ValueError(f"needs plain column names in braces; {allowed}")
    return template


def _check_workers(text: str) -> str:
    """Refuse anything but `auto` and a number of workers."""
    if text != "auto" and not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 64):
        raise ValueError(f"is {text!r:.80}; allowed: auto (one for every GPU), or 1 to 64")
    return text


def _check_quantization(text: str) -> str:
    if not re.fullmatch(QUANTIZATION_PATTERN, text):
        raise ValueError(f"is {text!r:.80}; allowed: {QUANTIZATION_WORDS}")
    return in_one_spelling(text)


Uri = Annotated[str, AfterValidator(_check_uri)]
OutputUri = Annotated[Uri, AfterValidator(_check_output)]
WarmStartUri = Annotated[Uri, AfterValidator(_check_sweep_folder)]
LocalPath = Annotated[Path, AfterValidator(_check_path)]
Fraction = Annotated[float, Field(gt=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
Count = Annotated[int, Field(ge=1, le=10**9)]
FewCount = Annotated[int, Field(ge=1, le=1024)]


class Settings(BaseSettings):
    """Every setting of the job. Empty variables count as unset."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,  # pydantic would print the whole environment, keys included
    )

    base_model: Uri = Field(
        "unsloth/mistral-7b-v0.3-bnb-4bit",
        description="Hugging Face id, folder or bucket URI of the base",
    )
    base_model_revision: str = Field("main", description="branch, tag or commit of the base")
    dataset_uri: Uri = Field(
        description="rows: file, glob or folder (path, s3://, gs://, az://), or a Hugging Face id"
    )
    output_uri: OutputUri = Field(description="folder or bucket prefix that holds the sweep")

    sweep_file: LocalPath | None = Field(None, description="W&B sweep YAML; default: the card's")
    sweep_name: Annotated[str, AfterValidator(_check_name)] | None = Field(
        None, description="folder of the sweep; default: W&B sweep id, else `name:` in the file"
    )
    num_trials: Annotated[int, Field(ge=1, le=9999)] = Field(12, description="slots of the sweep")
    min_gain: Annotated[float, Field(ge=0, le=100)] = Field(
        0.001,
        description="nats; a bayes sweep ends once a trial is expected to gain less; 0: never",
    )
    warm_start_uri: WarmStartUri | None = Field(
        None, description="an earlier sweep's folder, .../sweeps/NAME: its best point is tried soon"
    )
    completion_index: Annotated[int, Field(ge=0)] | None = Field(
        None, description="this run's slot; set by Kubernetes; default: the first open one"
    )

    workers: Annotated[str, AfterValidator(_check_workers)] = Field(
        "1", description="of `queue`: trials at once, a GPU each; auto: one for every GPU"
    )

    use_full_dataset: bool = Field(False, description="True: subsample fraction 1")
    subsample_fraction: Fraction = Field(0.15, description="share of the rows that is used")
    eval_fraction: OpenFraction = Field(0.2, description="share of the used rows held out")
    max_seq_length: Annotated[int, Field(ge=16)] = Field(1024, description="tokens of a sample")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(17, description="seed of everything")
    prompt_column: str | None = Field(None, description="column of the prompt")
    completion_column: str | None = Field(None, description="column of the answer")
    prompt_template: Annotated[str, AfterValidator(_check_prompt_template)] | None = Field(
        None, description="user's turn of several columns: '{context}\\n\\n{question}'"
    )
    system_prompt: str | None = Field(
        None, description="system turn of the rows without one; a row's own wins"
    )
    chat_template: str | None = Field(None, description="Jinja template, or a file that holds one")

    per_device_train_batch_size: FewCount = Field(2, description="samples of an accumulation step")
    learning_rate: Positive = Field(2e-4, description=_UNLESS_SWEPT)
    gradient_accumulation_steps: FewCount = Field(4, description=_UNLESS_SWEPT)
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description=_UNLESS_SWEPT)
    weight_decay: Annotated[float, Field(ge=0, le=10)] = Field(0.01, description=_UNLESS_SWEPT)
    lora_r: FewCount = Field(8, description=_UNLESS_SWEPT)
    lora_alpha: Positive = Field(16, description=_UNLESS_SWEPT)
    lr_scheduler: Literal["linear", "cosine", "constant"] = Field(
        "linear", description=_UNLESS_SWEPT
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = Field(0.03, description=_UNLESS_SWEPT)
    max_grad_norm: Positive = Field(1.0, description=_UNLESS_SWEPT)
    quantization: Annotated[str, AfterValidator(_check_quantization)] = Field(
        "nf4",
        description=f"the base in 4 bits (nf4), in 16 (none), or matrices of it in 16 (mixed);"
        f" {_UNLESS_SWEPT}",
    )

    max_steps: Count = Field(1500, description="optimizer steps of a trial, at most")
    num_epochs: Positive = Field(1, description="passes over the training rows, at most")
    evals_per_trial: FewCount = Field(8, description="evaluations at equal shares of the steps")
    eval_rows: Count = Field(192, description="held-out rows of an evaluation, at most")
    patience: Count = Field(3, description="evaluations without improvement before stopping")
    trial_budget_hours: Positive = Field(3, description="training clock of a trial, at most")
    sweep_budget_gpu_hours: Positive | None = Field(
        None, description="no new slot is begun for which it has no room"
    )
    sweep_budget_usd: Positive | None = Field(
        None, description="the same in dollars; needs JOB_GPU_HOURLY_USD"
    )
    gpu_hourly_usd: Annotated[float, Field(ge=0, le=1e6)] | None = Field(
        None, description="price of a GPU, kept in each attempt's account; 0: it is free"
    )

    checkpoint_minutes: Positive = Field(5, description="between background checkpoints")
    # After a SIGKILL a slot waits so long: more than an hour is a mistake in the unit.
    lease_seconds: Annotated[float, Field(gt=0, le=3600)] = Field(
        120, description="silence after which a lease is broken"
    )
    grace_seconds: Annotated[float, Field(ge=5, le=3600)] = Field(
        15, description="from SIGTERM to exit"
    )
    outage_minutes: Positive = Field(20, description="how long a failing store is retried")

    max_adapter_mb: Positive = Field(200, description="adapter size limit in 10^6 bytes")
    device: Literal["auto", "cuda", "cpu"] = Field(
        "auto", description="auto: the CUDA GPU, exit 72 without one; cpu has to be asked for"
    )
    gpu_memory_gb: Positive | None = Field(None, description="GiB; caps a bigger card to a T4's")
    work_dir: LocalPath = Field(Path("/tmp/job"), description="writable folder for all caches")  # noqa: S108
    wandb_artifact: Literal["none", "reference", "upload"] = Field(
        "reference", description="the adapter as a W&B artifact: where it is, or itself"
    )
    notify_urls: SecretStr | None = Field(
        None, description="apprise URLs that are told of the sweep's end, blanks between"
    )
    log_format: Literal["text", "json"] = Field("text", description="log lines")
    strict: bool = Field(False, description="1: any unknown JOB_* variable is an error")

    # Other tools' own variables that the job must know of. Their values are never logged.
    wandb_sweep_id: str | None = Field(None, validation_alias="WANDB_SWEEP_ID")
    wandb_api_key: SecretStr | None = Field(None, validation_alias="WANDB_API_KEY")
    wandb_entity: str | None = Field(None, validation_alias="WANDB_ENTITY")
    wandb_project: str | None = Field(None, validation_alias="WANDB_PROJECT")
    wandb_mode: Literal["online", "offline", "disabled"] = Field(
        "online", validation_alias="WANDB_MODE"
    )
    hf_token: SecretStr | None = Field(None, validation_alias="HF_TOKEN")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.completion_index is not None and self.completion_index >= self.num_trials:
            raise ValueError(
                f"JOB_COMPLETION_INDEX: is {self.completion_index}, but JOB_NUM_TRIALS is"
                f" {self.num_trials}; allowed: 0 to {self.num_trials - 1}, or raise JOB_NUM_TRIALS"
            )
        if self.sweep_budget_usd is not None and self.gpu_hourly_usd is None:
            raise ValueError(
                "JOB_SWEEP_BUDGET_USD: is set, but not JOB_GPU_HOURLY_USD, the price of a GPU here;"
                " allowed: both, with 0 where it is free"
            )
        if self.prompt_template is not None and self.prompt_column is not None:
            raise ValueError(
                "JOB_PROMPT_TEMPLATE, JOB_PROMPT_COLUMN: both are set; allowed: one of them"
            )
        is_one_missing = (self.prompt_column is None) != (self.completion_column is None)
        if self.prompt_template is None and is_one_missing:
            raise ValueError(
                "JOB_PROMPT_COLUMN, JOB_COMPLETION_COLUMN: only one is set;"
                " allowed: both (their columns' names) or none (columns are detected)"
            )
        return self

    @property
    def row_fraction(self) -> float:
        """The share of the rows that is used, `JOB_USE_FULL_DATASET` considered."""
        return 1.0 if self.use_full_dataset else self.subsample_fraction

    @property
    def hyperparameters(self) -> dict[str, float | int | str]:
        """The settings' value of each hyper-parameter, for those that the sweep does not name."""
        return {name: getattr(self, name) for name in HYPERPARAMETER_FIELDS}


# The settings that count where the sweep does not name them; a sweep may name only these.
HYPERPARAMETER_FIELDS = (
    "learning_rate",
    "gradient_accumulation_steps",
    "lora_dropout",
    "weight_decay",
    "lora_r",
    "lora_alpha",
    "lr_scheduler",
    "warmup_ratio",
    "max_grad_norm",
    "quantization",
)

# Settings that can change eval/loss: the first trial freezes them in sweep.json.
# (Model, tokenizer and rows enter it resolved: as a commit and a digest.)
IDENTITY_FIELDS = (
    *HYPERPARAMETER_FIELDS,
    "per_device_train_batch_size",
    "max_steps",
    "num_epochs",
    "evals_per_trial",
    "eval_rows",
    "patience",
    "seed",
)


# Settings that choose the rows. The identity holds the prepared rows' digest; these are kept beside
# it, so that a person sees which of them changed.
ROW_FIELDS = (
    "dataset_uri",
    "use_full_dataset",
    "subsample_fraction",
    "eval_fraction",
    "max_seq_length",
    "prompt_column",
    "completion_column",
    "prompt_template",
    "system_prompt",
    "chat_template",
)


def variable(field: str) -> str:
    """The environment variable of a settings field."""
    alias = Settings.model_fields[field].validation_alias
    return alias if isinstance(alias, str) else PREFIX + field.upper()
