"""The documents of a sweep in its bucket, as records: what each holds, and which values it allows.

    sweeps/<sweep>/sweep.json                        Identity   create-once
    sweeps/<sweep>/ended.json                        Ended      create-once: it gains too little
    sweeps/<sweep>/answers-<sha256>.json             Answers    swapped as rows are answered
    sweeps/<sweep>/slots/<NNNN>/spec.json            Spec       create-once
                                lease.json           Lease      only by compare-and-swap
                                attempts/<e>-<o>.json Account   created open, swapped once
                                rows-<sha256>.json   RowLosses  under the hash of its content
                                result.json          Result     create-once: THE COMMIT
                                failed.json          Closure    create-once: given up
                                merge.json           MergeLosses  swapped by `job best --merge`
                                excluded.json        Closure    create-once: by a person

Keys that every version of the code has written are required. A later key has a default: what its
absence stood for. Keys that this version does not know are kept as they are, so that an older
worker beside a newer one destroys nothing. A document that does not fit is damaged: `pydantic`
refuses it where the ledger reads.
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from job.file_uri import absolute
from job.quantization import in_one_spelling, params_in_one_spelling
from job.store.base import check_key

Status = Literal["completed", "truncated", "stopped", "diverged", "infeasible"]


def _check_moment(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("should have a time zone")
    return text


Moment = Annotated[str, AfterValidator(_check_moment)]  # ISO 8601, UTC: for people, never compared
Key = Annotated[str, AfterValidator(check_key)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Dollars = Annotated[float, Field(ge=0)]
Number = int | float  # as it was written: 16 stays 16
Hyperparameter = bool | int | float | str
# Modes of JOB_QUANTIZATION are read as they are compared, whatever spelling the document holds.
Quantization = Annotated[str, AfterValidator(in_one_spelling)]
Params = Annotated[dict[str, Hyperparameter], AfterValidator(params_in_one_spelling)]


class Record(BaseModel):
    """A JSON object in the bucket. Its JSON holds the keys that were read or given, no others."""

    model_config = ConfigDict(
        frozen=True, extra="allow", allow_inf_nan=False, populate_by_name=True
    )

    def to_json(self) -> dict[str, Any]:
        """The document's content; keys that this version does not know come last."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def changed(self, **changes: Any) -> Self:
        """A copy with other values, checked as those of a new record are."""
        return type(self).model_validate({**self.to_json(), **changes})


class Recipe(Record):
    """All that fixes what a trial computes: its hyper-parameters, planned steps and seed."""

    learning_rate: Number
    gradient_accumulation_steps: int = Field(ge=1)
    lora_dropout: Number
    weight_decay: Number
    lora_r: int = Field(ge=1)
    lora_alpha: Number
    lr_scheduler: Literal["linear", "cosine", "constant"]  # each after a linear warm-up
    warmup_ratio: Number
    max_grad_norm: Number
    # The base's weights: nf4, none (16 bits), or mixed: with the matrices in 16 bits named.
    quantization: Quantization = "nf4"
    per_device_train_batch_size: int = Field(ge=1)
    seed: int
    planned_steps: int = Field(ge=1)  # optimizer steps; fixed here, never recomputed from speed
    eval_steps: tuple[int, ...]  # optimizer steps after which eval/loss is measured
    patience: int = Field(ge=1)  # evaluations without improvement before stopping

    @property
    def samples_per_step(self) -> int:
        """The number of samples in an optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


class Spec(Record):
    """`spec.json`: what a slot computes, frozen before its first attempt trains."""

    params: Params  # the slot's point of the sweep
    recipe: Recipe
    # Measure the untuned model, too: only the first slot drawn in a precision does.
    measure_step_0: bool = False
    # Measure it with its weights in 16 bits as well: one slot of a sweep does.
    measure_16bit: bool = False
    # What earlier slots had measured of it when this one was drawn: in this slot's precision, and
    # in 16 bits.
    untuned: float | None = None
    untuned_16bit: float | None = None
    data_digest: str  # the digest of the prepared rows
    wandb_run_id: str
    # entity/project/id; None: drawn by the built-in engine.
    wandb_sweep: Annotated[str, Field(pattern=r"^[^/]+/[^/]+/[^/]+$")] | None = None
    code_version: str = ""
    created_at: Moment


class Result(Record):
    """`result.json`: how a trial ended. Whoever creates it has committed the slot."""

    status: Status
    reason: str | None = None
    eval_loss: float | None  # the adapter's; None when there is no adapter
    best_step: int | None = None
    steps: Count
    adapter_key: Key | None
    adapter_sha256: str | None = None  # its manifest's sha256; that holds every file's
    adapter_bytes: Count | None = None
    gpu_seconds: Seconds  # of all attempts at the slot
    wasted_gpu_seconds: Seconds = 0.0  # for steps done twice, restarts and waiting
    training_seconds: Seconds | None = None  # on the training clock: steps and evaluations
    tokens_per_second: float | None = None
    peak_memory_bytes: Count | None = None
    curve: tuple[tuple[int, float | None], ...]  # (step, eval/loss); None: it overflowed
    # The untuned base's eval/loss with its weights in 16 bits; None: not measured here.
    untuned_16bit: float | None = None
    eval_rows: Count | None = None  # held-out rows that every eval/loss is of
    phase_seconds: dict[str, float] = {}
    params: Params = {}
    quantization: Quantization = "nf4"  # how the base's weights were held, as in the recipe
    wandb_run_id: str | None = None
    attempts: Count = 0
    data_digest: str | None = None
    base_model: str
    base_model_revision: str
    code_version: str = ""
    history_key: Key
    rows_key: Key | None = (
        None  # of the RowLosses; None: without an adapter, or of an earlier version
    )
    committed_at: Moment | None = None

    @model_validator(mode="after")
    def _check_adapter(self) -> Self:
        if self.adapter_key is not None and None in (self.adapter_sha256, self.eval_loss):
            raise ValueError("it has an adapter, but not its adapter_sha256 and eval_loss")
        return self

    @property
    def finite_curve(self) -> tuple[tuple[int, float], ...]:
        """The evaluations that gave a number, as (step, eval/loss)."""
        return tuple((step, loss) for step, loss in self.curve if loss is not None)


class RowLosses(Record):
    """`rows-<sha256>.json`: a trial's evaluation at its best step, by held-out row.

    Trials of a sweep have the same rows in the same order, so they can be compared in pairs.
    """

    step: Count  # the best step
    nll: Annotated[tuple[float, ...], Field(min_length=1)]  # nats, summed over the row's targets
    targets: tuple[Annotated[int, Field(ge=1)], ...]  # target tokens

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len(self.nll) != len(self.targets):
            raise ValueError(f"it has {len(self.nll)} nll and {len(self.targets)} targets")
        return self

    @property
    def loss(self) -> float:
        """The eval/loss of all rows together."""
        return math.fsum(self.nll) / sum(self.targets)


class MergeLosses(Record):
    """`merge.json`: what a slot's adapter and its merges give on the held-out rows, as eval/loss.

    None stands for what was not measured.
    """

    untuned_16bit: float | None = None  # the base's own weights
    untuned_4bit: float | None = None
    adapter_4bit: float | None = None  # base and adapter as in training
    merged_16bit: float | None = None  # added to the base's own weights
    merged_4bit: float | None = None  # added to the 4-bit base, dequantised
    written: Literal["16bit", "4bit"] | None = None  # which of the merges was written
    original: str | None = None  # name and revision of a pre-quantised base's original
    num_rows: Count
    measured_at: Moment | None = None


class AnswerRow(Record):
    """A held-out prompt, the answer that its row has, and those of the models, by model."""

    row: Count  # its number among the held-out rows
    prompt: str  # as the model reads it, control tokens included
    reference: str
    answers: dict[str, str] = {}


class AnsweringModel(Record):
    """Who answered: a slot's adapter, or the untuned base."""

    slot: int | None = None  # None: the untuned base
    eval_loss: float | None = None


class Answers(Record):
    """`answers-<sha256>.json`: what the untuned base and some adapters say to held-out prompts.

    Its name is a hash of what decides a base's answers: rows, base and length. Models are known by
    their adapter's sha256; `base` is the untuned one in 4 bits, `base-none` say in 16. Versions
    that knew one base kept it in any precision as `base`.
    """

    data_digest: str
    base_model: str
    base_model_revision: str
    max_new_tokens: int
    match: str | None = None  # the rule by which answers were last compared with the references
    models: dict[str, AnsweringModel] = {}
    rows: tuple[AnswerRow, ...] = ()
    written_at: Moment


class Checkpoint(Record):
    """A checkpoint that a lease names: a folder of the bucket under the hash of its content."""

    key: Key
    sha256: str  # its manifest's
    step: Count
    best: Key | None  # the best adapter so far, which the checkpoint refers to
    clock_seconds: Seconds = 0.0  # the training clock when it was taken


class AttemptProgress(Record):
    """The progress of an attempt, as the holder of the lease tells it at every renewal."""

    node: str | None = None
    worker: Count | None = None  # its number on the node; None: the only one
    gpu: str | None = None  # the card's name; None: a CPU, or none was opened yet
    hourly_usd: Dollars | None = None  # the price of its GPU; None: not told
    code_version: str | None = None
    started_at: Moment | None = None
    heard_at: Moment | None = None  # when the lease was last renewed
    clock_before: Seconds = 0.0  # the training clock that the attempt began with
    num_gpus: Annotated[int, Field(ge=1)] = (
        1  # more: written by a version that shared a step among GPUs
    )
    patience_seconds: Seconds | None = None  # fruitless if it trained so long without a checkpoint
    first_step: Count | None = None
    step: Count | None = None
    published_step: int = -1  # of the newest checkpoint that this attempt published
    trained_seconds: Seconds = 0.0  # on the training clock, in this attempt
    tokens_per_second: float | None = None
    eval_loss: float | None = None  # of the last evaluation
    gpu_seconds: Seconds = 0.0
    # Less than nothing where a trial was begun again from an earlier checkpoint than the one found.
    useful_seconds: float | None = None  # of the GPU-seconds, those that the commit rests on
    exit_code: int | None = None
    reason: str | None = None
    ended_at: Moment | None = None


class Account(Record):
    """`attempts/<epoch>-<owner>.json`: what an attempt cost and why it ended, for people."""

    epoch: Count
    owner: str
    node: str | None = None
    worker: Count | None = None  # its number on the node; None: the only one
    gpu: str | None = None  # the card's name; None: a CPU, or none was opened yet
    hourly_usd: Dollars | None = None  # the price of its GPU; None: not told
    code_version: str | None = None
    started_at: Moment | None = None
    heard_at: Moment | None = None
    state: Literal["open", "ended"]
    first_step: Count | None = None
    last_step: Count | None = None
    gpu_seconds: Seconds = 0.0
    ended_at: Moment | None = None
    exit_code: int | None = None
    reason: str | None = None
    saved_step: Count | None = None  # of the newest checkpoint when it ended
    wasted_gpu_seconds: Seconds | None = None  # those on which nothing later rests


class Closure(Record):
    """`failed.json` and `excluded.json`: why nobody is to work on the slot any more."""

    reason: str = "no reason is told"


class Lease(Record):
    """`lease.json`: whose slot it is, which checkpoints count, what all attempts cost so far."""

    owner: str
    epoch: Count  # number of the attempt, from 1; 0 before the first
    state: Literal["held", "released"] = "released"
    beat: Count = 0  # renewals of this epoch
    checkpoints: tuple[Checkpoint, ...] = ()  # newest first
    gpu_seconds_before: Seconds = 0.0  # of all earlier attempts
    seconds_before: Seconds = (
        0.0  # wall-clock seconds of all earlier attempts, on any number of GPUs
    )
    wasted_gpu_seconds_before: Seconds = 0.0  # those on which no later attempt could build
    usd_before: Dollars = 0.0  # of all earlier attempts whose price is known
    priced_gpu_seconds_before: Seconds = 0.0  # of those attempts
    ended: tuple[Account, ...] = ()  # earlier attempts whose documents may not be written yet
    fruitless: Count = 0  # attempts in a row that trained long and published no later checkpoint
    startless: Count = 0  # attempts in a row that never finished a step
    attempt: AttemptProgress = AttemptProgress()  # the current attempt

    @property
    def is_held(self) -> bool:
        """Whether nobody has released it; its holder may be dead all the same."""
        return self.state == "held"


class Ended(Record):
    """`ended.json`: another trial was expected to gain too little, so no new slot is begun.

    It only remembers what the results say: where it is lost, the next worker finds it again.
    """

    gain: float = Field(ge=0)  # nats of eval/loss that another trial was expected to gain
    gain_before: float = Field(ge=0)  # the same without the last result
    results: Count  # how many slots had ended
    min_gain: float = Field(ge=0)  # JOB_MIN_GAIN, nats
    trial_gpu_seconds: Seconds | None = None  # the median of the sweep's trials
    ended_at: Moment | None = None

    def holds(self, min_gain: float) -> bool:
        """Whether the sweep stays ended under this `JOB_MIN_GAIN`; never under 0."""
        return max(self.gain, self.gain_before) < min_gain


class WarmStart(Record):
    """The best trial of an earlier sweep, as a point of this one."""

    params: Params
    slot: Count  # of the earlier sweep
    eval_loss: float  # on the earlier sweep's rows


class Frozen(Record):
    """A part of the identity that is known by what it was resolved to."""

    revision: str | None = None  # the base model's commit, or a hash of its files
    prepared: str | None = None  # the digest of the prepared rows


WARM_START = "JOB_WARM_START_URI"


class Identity(Record):
    """`sweep.json`: all that can change eval/loss, frozen by a sweep's first trial.

    Beside these keys it holds every setting of `settings.IDENTITY_FIELDS` under its variable's
    name. Names that begin with `_` are information and not compared.
    """

    base_model: Annotated[Frozen, Field(alias="JOB_BASE_MODEL")] = Frozen()
    dataset: Annotated[Frozen, Field(alias="JOB_DATASET_URI")] = Frozen()
    sweep_file: Annotated[dict[str, Any] | None, Field(alias="JOB_SWEEP_FILE")] = None
    # The settings that decide the prepared rows.
    rows: Annotated[dict[str, Any], Field(alias="_rows")] = {}
    base_model_name: Annotated[str, Field(alias="_base_model")] = ""
    # The revision that the settings ask for, before it was resolved to a commit.
    asked_revision: Annotated[str, Field(alias="_base_model_revision")] = ""
    warm_start: Annotated[WarmStart | None, Field(alias="_warm_start")] = None
    # A sha256 of the tokenizer's tokens and their ids; none in sweeps of earlier versions.
    vocabulary: Annotated[str | None, Field(alias="_vocabulary")] = None
    quantization: Annotated[Quantization, Field(alias="JOB_QUANTIZATION")] = "nf4"
    # The matrices that `mixed` keeps in 16 bits in this sweep: the first trial's card decided.
    mixed: Annotated[str | None, Field(alias="_mixed")] = None
    ledger_schema: int = 1

    def compared(self) -> dict[str, Any]:
        """The values that a later trial's settings have to equal, by name."""
        given = {name: value for name, value in self.to_json().items() if not name.startswith("_")}
        if self.sweep_file is not None:
            given["JOB_SWEEP_FILE"] = self.searched
        if isinstance(uri := given.get(WARM_START), str):
            given[WARM_START] = absolute(uri)  # earlier versions froze it as it was written
        return {"JOB_QUANTIZATION": self.quantization, **given}

    @property
    def searched(self) -> dict[str, Any]:
        """What the sweep file searches, with the modes of `quantization` as they are compared."""
        return _modes_in_one_spelling(self.sweep_file or {})


def _modes_in_one_spelling(sweep_file: dict[str, Any]) -> dict[str, Any]:
    """A sweep file's content with every mode once, in the spelling in which it is compared."""
    parameters = sweep_file.get("parameters")
    entry = parameters.get("quantization") if isinstance(parameters, dict) else None
    if not isinstance(parameters, dict) or not isinstance(entry, dict):
        return sweep_file
    changed = {key: in_one_spelling(value) for key, value in entry.items()}
    if isinstance(values := entry.get("values"), list):
        modes = [in_one_spelling(value) for value in values]
        if "probabilities" not in entry:  # each value has one of those
            modes = [mode for index, mode in enumerate(modes) if mode not in modes[:index]]
        changed["values"] = modes
    return {**sweep_file, "parameters": {**parameters, "quantization": changed}}


def damage(error: ValidationError) -> str:
    """The first thing that is wrong with a document: `curve.0: should be a valid tuple`."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    what = first["msg"].removeprefix("Value error, ").removeprefix("Input ").lower()
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {what}{more}" if where else f"{what}{more}"
