"""Rules that a sweep's manifests must keep: the job's contracts and the API server's own.

`kubernetes-validate` knows only the schema and lets most of what is refused here through. The rules
are those of pkg/apis/batch/validation and pkg/apis/core/validation in kubernetes/kubernetes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import job.errors
from job.errors import ExitCode, SettingsError
from job.settings import Settings, variable
from job.variables import load_settings

Json = dict[str, Any]

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
# What n1-standard-4, g4dn.xlarge and NC4as_T4_v3 leave to pods, less the cluster's own pods.
NODE = {"cpu": 3.0, "memory": 11 * 2**30, "nvidia.com/gpu": 1}
# How each kind of cluster names its T4 nodes.
T4_LABELS = {
    ("nvidia.com/gpu.product", "Tesla-T4"),
    ("cloud.google.com/gke-accelerator", "nvidia-tesla-t4"),
    ("karpenter.k8s.aws/instance-gpu-name", "t4"),
    ("node.kubernetes.io/instance-type", "g4dn.xlarge"),
    ("node.kubernetes.io/instance-type", "Standard_NC4as_T4_v3"),
}
# Not the job's own settings, but read by boto3 and Azure's SDK.
OTHER_VARIABLES = {
    "AWS_REGION", "AZURE_CLIENT_ID", "AZURE_FEDERATED_TOKEN_FILE", "AZURE_STORAGE_ACCOUNT",
    "AZURE_TENANT_ID",
}  # fmt: skip


class Manifests:
    """The documents of a sweep, found by kind; there is one of each."""

    def __init__(self, documents: list[Json]) -> None:
        self.by_kind: dict[str, Json] = {document["kind"]: document for document in documents}
        assert len(self.by_kind) == len(documents)
        self.job: Json = self.by_kind["Job"]["spec"]
        self.pod: Json = self.job["template"]["spec"]
        (self.container,) = self.pod["containers"]
        self.settings: Json = self.by_kind["ConfigMap"]["data"]
        # The pod of volume.yaml, where it belongs to what is checked.
        self.pods = [self.pod, *(d["spec"] for d in documents if d["kind"] == "Pod")]

    @property
    def rules(self) -> list[Json]:
        return self.job["podFailurePolicy"]["rules"]


def exit_codes_by_action() -> dict[str, set[int]]:
    """Action → exit codes, from the comments behind job.errors.ExitCode's members."""
    source = Path(job.errors.__file__).read_text()
    found = re.findall(r"^    ([A-Z]+) = (\d+)  # (\w+)", source, re.MULTILINE)
    assert {name: int(code) for name, code, _ in found} == ExitCode.__members__
    actions: dict[str, set[int]] = {}
    for _, code, action in found:
        actions.setdefault(action, set()).add(int(code))
    return actions


def quantity(text: object) -> float:
    """A quantity of Kubernetes as a number, for the units that are used here."""
    match = re.fullmatch(r"([\d.]+|inf)(m|[KMG]i)?", str(text))
    assert match, text
    return float(match[1]) * {None: 1.0, "m": 1e-3, **UNITS}[match[2]]


def check_failure_policy_is_the_exit_code_contract(manifests: Manifests) -> Iterator[str]:
    contract = exit_codes_by_action()
    actions = [rule["action"] for rule in manifests.rules]
    if actions != ["Ignore", "FailJob", "FailIndex", "Ignore"]:
        yield f"order of the failure rules: {actions}"
    if [pattern["type"] for pattern in manifests.rules[0].get("onPodConditions", [])] != [
        "DisruptionTarget"
    ]:
        yield "the first failure rule is not the one on DisruptionTarget"
    found: dict[str, set[int]] = {}
    for rule in manifests.rules:
        if on_exit_codes := rule.get("onExitCodes"):
            found.setdefault(rule["action"], set()).update(on_exit_codes["values"])
    for action in ("FailJob", "FailIndex", "Ignore"):
        if found.get(action, set()) != contract[action]:
            yield f"exit codes of {action}: {found.get(action)}, job.errors says {contract[action]}"
    if listed := set().union(*found.values()) & (contract["Complete"] | contract["Count"]):
        yield f"exit codes that no rule may name: {listed}"


def check_failure_rules_are_valid(manifests: Manifests) -> Iterator[str]:
    """Refuse what the API server does (validatePodFailurePolicy), and one thing it lets through."""
    for rule in manifests.rules:
        if ("onExitCodes" in rule) == ("onPodConditions" in rule):
            yield f"a failure rule has either exit codes or conditions: {rule}"
        for pattern in rule.get("onPodConditions", []):
            if pattern.get("status") != "True":
                yield f"status of a pod condition is the string 'True': {pattern}"
        if on_exit_codes := rule.get("onExitCodes"):
            values = on_exit_codes["values"]
            if on_exit_codes["operator"] != "In":
                yield f"operator is not In: {rule}"  # NotIn would make 0 and 137 match
            if values != sorted(set(values)) or not all(0 < code < 256 for code in values):
                yield f"exit codes are ascending, unique and 1 to 255: {values}"
            # Without a name the codes of an injected sidecar count too.
            if on_exit_codes.get("containerName") != manifests.container["name"]:
                yield f"containerName is not {manifests.container['name']!r}: {rule}"


def check_job_is_valid(manifests: Manifests) -> Iterator[str]:
    spec = manifests.job
    if spec.get("completionMode") != "Indexed":
        yield "completionMode is not Indexed, which backoffLimitPerIndex needs"
    if manifests.pod.get("restartPolicy") != "Never":
        yield "restartPolicy is not Never, which podFailurePolicy needs"
    if spec.get("podReplacementPolicy") != "Failed":
        yield "podReplacementPolicy is not Failed, the only one beside a podFailurePolicy"
    if spec.get("backoffLimitPerIndex") != 6:
        yield f"backoffLimitPerIndex is {spec.get('backoffLimitPerIndex')}, not 6"
    if "backoffLimit" in spec:
        yield "backoffLimit would end the Job after so many failures of all indexes together"
    yield from check_numbers_of_trials(manifests)
    if "activeDeadlineSeconds" in spec:
        yield "a deadline of the Job would end a sweep that waits for spot machines"
    if not spec.get("ttlSecondsAfterFinished"):
        yield "ttlSecondsAfterFinished is missing: finished pods would stay for ever"
    metadata = manifests.by_kind["Job"]["metadata"]
    queue = metadata["labels"].get("kueue.x-k8s.io/queue-name")
    standby = "qlora-sweep-job/standby" in metadata.get("annotations", {})
    if spec.get("parallelism") != (2 if standby else 1) and not queue:
        yield "parallelism is not 1, and no queue limits what it costs"
    if spec.get("suspend", False) and not queue:
        yield "the Job is suspended, and no queue would wake it"
    if "selector" in spec or "manualSelector" in spec:
        yield "the Job chooses its own selector; Kubernetes makes one that is unique"


def check_numbers_of_trials(manifests: Manifests) -> Iterator[str]:
    """Three numbers that belong together; the API server refuses more failed than completions."""
    completions, most = manifests.job["completions"], manifests.job.get("maxFailedIndexes", 0)
    if str(completions) != manifests.settings["JOB_NUM_TRIALS"]:
        yield "completions differ from JOB_NUM_TRIALS"
    if not 1 <= most <= max(1, completions // 4):
        yield f"maxFailedIndexes {most} is not 1 to a quarter of completions {completions}"


def check_settings_load(manifests: Manifests) -> Iterator[str]:
    known = {variable(field) for field in Settings.model_fields} | OTHER_VARIABLES
    for name, value in manifests.settings.items():
        if not isinstance(value, str):
            yield f"{name}: a ConfigMap holds strings only, {value!r} needs quotes"
        if name not in known:
            yield f"{name} is no setting"
        if re.search(r"TOKEN|SECRET|PASSWORD|KEY", name) and not name.endswith("_FILE"):
            yield f"{name} belongs in the Secret"
    if manifests.settings.get("JOB_STRICT") != "1":
        yield "JOB_STRICT is not 1"
    if manifests.by_kind["ConfigMap"].get("immutable") is not True:
        yield "the ConfigMap is not immutable"
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("JOB_")]:
            patch.delenv(name)
        for name, value in manifests.settings.items():
            patch.setenv(name, str(value))
        for entry in manifests.container["env"]:
            patch.setenv(entry["name"], entry.get("value", "0"))
        try:
            settings, warnings = load_settings()
        except SettingsError as error:
            yield f"settings do not load: {error}"
            return
    yield from warnings
    grace = manifests.pod.get("terminationGracePeriodSeconds", 30)
    if grace <= settings.grace_seconds:
        yield f"terminationGracePeriodSeconds {grace} is not over JOB_GRACE_SECONDS"
    deadline = manifests.pod.get("activeDeadlineSeconds", 0)
    if deadline <= 2 * 3600 * settings.trial_budget_hours:  # the job's own limit, over attempts
        yield f"activeDeadlineSeconds {deadline} is not over twice JOB_TRIAL_BUDGET_HOURS"


def check_slot_comes_from_the_annotation(manifests: Manifests) -> Iterator[str]:
    sources = {entry["name"]: entry.get("valueFrom") for entry in manifests.container["env"]}
    path = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    if sources.get("JOB_COMPLETION_INDEX") != {"fieldRef": {"fieldPath": path}}:
        yield "JOB_COMPLETION_INDEX is not the pod's completion index"
    if manifests.pod.get("enableServiceLinks") is not False:
        yield "enableServiceLinks is not false: a Service could set JOB_* variables"


Check = Callable[[Manifests], Iterator[str]]
CONTRACT_CHECKS: tuple[Check, ...] = (
    check_failure_policy_is_the_exit_code_contract,
    check_failure_rules_are_valid,
    check_job_is_valid,
    check_settings_load,
    check_slot_comes_from_the_annotation,
)
