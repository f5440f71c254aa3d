"""k8s/*.yaml keep the job's contracts and the API server's rules: pytest tests/test_manifests.py"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import job.errors
from job.errors import ExitCode, SettingsError
from job.settings import Settings, load_settings, variable

ROOT = Path(__file__).parents[1]
SWEEP_JOB = (ROOT / "k8s/sweep-job.yaml").read_text()
VOLUME = (ROOT / "k8s/volume.yaml").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()

Json = dict[str, Any]
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
# What n1-standard-4 (GKE) and g4dn.xlarge (EKS) leave to pods, less the cluster's own pods.
NODE = {"cpu": 3.0, "memory": 11 * 2**30, "nvidia.com/gpu": 1}


class Manifests:
    """The documents of both files, found by kind; there is one of each."""

    def __init__(self, sweep_job: str = SWEEP_JOB, volume: str = VOLUME) -> None:
        documents = [*yaml.safe_load_all(sweep_job), *yaml.safe_load_all(volume)]
        self.by_kind: dict[str, Json] = {document["kind"]: document for document in documents}
        assert len(self.by_kind) == len(documents)
        self.job: Json = self.by_kind["Job"]["spec"]
        self.pod: Json = self.job["template"]["spec"]
        (self.container,) = self.pod["containers"]
        self.files_pod: Json = self.by_kind["Pod"]["spec"]
        self.settings: Json = self.by_kind["ConfigMap"]["data"]

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
    """What the API server refuses (validatePodFailurePolicy), and one thing it lets through."""
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
    if not 0 < spec.get("maxFailedIndexes", 0) < spec["completions"]:
        yield "maxFailedIndexes is not between 0 and completions"
    if spec.get("parallelism") != 1:
        yield "parallelism is not 1"
    if str(spec["completions"]) != manifests.settings["JOB_NUM_TRIALS"]:
        yield "completions differ from JOB_NUM_TRIALS"
    if not spec.get("ttlSecondsAfterFinished"):
        yield "ttlSecondsAfterFinished is missing: finished pods would stay for ever"


def check_settings_load(manifests: Manifests) -> Iterator[str]:
    known = [variable(field) for field in Settings.model_fields]
    for name, value in manifests.settings.items():
        if not isinstance(value, str):
            yield f"{name}: a ConfigMap holds strings only, {value!r} needs quotes"
        if name.startswith("JOB_") and name not in known:
            yield f"{name} is no setting"
        if re.search(r"TOKEN|SECRET|PASSWORD|KEY", name):
            yield f"{name} belongs in the Secret"
    if manifests.settings.get("JOB_STRICT") != "1":
        yield "JOB_STRICT is not 1"
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


def check_slot_comes_from_the_annotation(manifests: Manifests) -> Iterator[str]:
    sources = {entry["name"]: entry.get("valueFrom") for entry in manifests.container["env"]}
    path = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    if sources.get("JOB_COMPLETION_INDEX") != {"fieldRef": {"fieldPath": path}}:
        yield "JOB_COMPLETION_INDEX is not the pod's completion index"
    if manifests.pod.get("enableServiceLinks") is not False:
        yield "enableServiceLinks is not false: a Service could set JOB_* variables"


def check_resources_fit_the_node(manifests: Manifests) -> Iterator[str]:
    requests = {k: quantity(v) for k, v in manifests.container["resources"]["requests"].items()}
    limits = {k: quantity(v) for k, v in manifests.container["resources"]["limits"].items()}
    if not requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu") == 1:
        yield "nvidia.com/gpu: request and limit are not both 1"
    yield from (
        f"{name}: request over limit" for name in limits if requests.get(name, 0) > limits[name]
    )
    yield from (
        f"{name}: request does not fit the node" for name in NODE if requests[name] > NODE[name]
    )
    for volume in manifests.pod["volumes"]:
        empty_dir = volume.get("emptyDir")
        if empty_dir is None:
            continue
        resource = "memory" if empty_dir.get("medium") == "Memory" else "ephemeral-storage"
        if quantity(empty_dir.get("sizeLimit", "inf")) > limits[resource]:
            yield f"volume {volume['name']}: sizeLimit over the limit of {resource}"


def quantity(text: object) -> float:
    """Kubernetes' quantities, as far as they are used here."""
    match = re.fullmatch(r"([\d.]+|inf)(m|[KMG]i)?", str(text))
    assert match, text
    return float(match[1]) * {None: 1.0, "m": 1e-3, **UNITS}[match[2]]


def check_volumes_are_mounted(manifests: Manifests) -> Iterator[str]:
    for pod in (manifests.pod, manifests.files_pod):
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        names = [volume["name"] for volume in pod["volumes"]]
        if sorted(names) != sorted(mounts) or len(container["volumeMounts"]) != len(mounts):
            yield f"volumes {sorted(names)} are not the mounts {sorted(mounts)}"
        if len(set(mounts.values())) != len(mounts):
            yield "two volumes are mounted at one path"
    job_mounts = {m["mountPath"]: m["name"] for m in manifests.container["volumeMounts"]}
    work_dir = re.findall(r"JOB_WORK_DIR=(\S+)", DOCKERFILE)
    if not set(work_dir) <= set(job_mounts):
        yield f"the image's JOB_WORK_DIR {work_dir} is not mounted: the root is read-only"
    for name in ("JOB_DATASET_URI", "JOB_OUTPUT_URI"):
        if not manifests.settings[name].startswith("file:///data/") or "/data" not in job_mounts:
            yield f"{name} is not on the volume at /data"


def check_references_resolve(manifests: Manifests) -> Iterator[str]:
    def exists(kind: str, name: str) -> bool:
        return manifests.by_kind[kind]["metadata"]["name"] == name

    if not exists("ServiceAccount", manifests.pod.get("serviceAccountName", "default")):
        yield "serviceAccountName names no ServiceAccount of the file"
    for source in manifests.container["envFrom"]:
        reference = source.get("configMapRef")
        if reference and not exists("ConfigMap", reference["name"]):
            yield "configMapRef names no ConfigMap of the file"
        if source.get("secretRef", {}).get("optional", True) is not True:
            yield "secretRef is not optional, and the file holds no Secret"
    if not any("configMapRef" in source for source in manifests.container["envFrom"]):
        yield "no configMapRef: the settings do not reach the pod"
    for pod in (manifests.pod, manifests.files_pod):
        for volume in pod["volumes"]:
            claim = volume.get("persistentVolumeClaim")
            if claim and not exists("PersistentVolumeClaim", claim["claimName"]):
                yield "claimName names no PersistentVolumeClaim of volume.yaml"


def check_pods_are_restricted(manifests: Manifests) -> Iterator[str]:
    """The Pod Security Standard "restricted", a read-only root and no API token."""
    users = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    for name, pod in (("job", manifests.pod), ("files", manifests.files_pod)):
        of_pod = pod.get("securityContext", {})
        of_container = pod["containers"][0].get("securityContext", {})
        facts = {
            "runAsNonRoot": of_pod.get("runAsNonRoot") is True,
            "runAsUser": [(str(of_pod.get("runAsUser")), str(of_pod.get("runAsGroup")))] == users,
            "fsGroup": of_pod.get("fsGroup") == of_pod.get("runAsGroup"),
            "seccompProfile": of_pod.get("seccompProfile") == {"type": "RuntimeDefault"},
            "capabilities": of_container.get("capabilities") == {"drop": ["ALL"]},
            "allowPrivilegeEscalation": of_container.get("allowPrivilegeEscalation") is False,
            "readOnlyRootFilesystem": of_container.get("readOnlyRootFilesystem") is True,
            "automountServiceAccountToken": pod.get("automountServiceAccountToken") is False,
        }
        yield from (f"{name} pod: {fact}" for fact, holds in facts.items() if not holds)


def check_pods_reach_the_same_t4_nodes(manifests: Manifests) -> Iterator[str]:
    if manifests.pod.get("nodeSelector") != {"nvidia.com/gpu.product": "Tesla-T4"}:
        yield "nodeSelector does not choose T4 nodes"
    for key in ("nodeSelector", "tolerations"):  # or the disk ends up in a zone without T4s
        if manifests.pod.get(key) != manifests.files_pod.get(key):
            yield f"{key} of the job pod and of the files pod differ"
    tolerated = {toleration["key"] for toleration in manifests.pod.get("tolerations", [])}
    if "nvidia.com/gpu" not in tolerated:
        yield "the taint of GPU nodes is not tolerated"


CHECKS: tuple[Callable[[Manifests], Iterator[str]], ...] = (
    check_failure_policy_is_the_exit_code_contract,
    check_failure_rules_are_valid,
    check_job_is_valid,
    check_settings_load,
    check_slot_comes_from_the_annotation,
    check_resources_fit_the_node,
    check_volumes_are_mounted,
    check_references_resolve,
    check_pods_are_restricted,
    check_pods_reach_the_same_t4_nodes,
)


def mistakes(manifests: Manifests) -> list[str]:
    return [mistake for check in CHECKS for mistake in check(manifests)]


@pytest.mark.parametrize("check", CHECKS)
def test_manifests_have_no_mistakes(check: Callable[[Manifests], Iterator[str]]) -> None:
    assert list(check(Manifests())) == []


DISRUPTION_RULE = """\
      - action: Ignore
        onPodConditions:
          - type: DisruptionTarget
            status: "True"
"""


@pytest.mark.parametrize(
    ("text", "planted", "complaint"),
    [
        ("values: [64, 65, 77]", "values: [64, 65]", "exit codes of FailJob"),
        ("values: [64, 65, 77]", "values: [64, 65, 70, 77]", "that no rule may name: {70}"),
        ("values: [64, 65, 77]", "values: [64, 77, 65]", "ascending"),
        ("values: [75]", "values: [0, 75]", "that no rule may name: {0}"),
        ("values: [75]", "values: [74]", "exit codes of Ignore"),
        ("action: FailIndex", "action: Count", "order of the failure rules"),
        (DISRUPTION_RULE, "", "order of the failure rules"),
        ('status: "True"', "status: true", "the string 'True'"),
        ("operator: In\n          values: [69]", "operator: NotIn\n          values: [69]", "In:"),
        ("containerName: trial\n          operator: In\n          values: [75]",
         "operator: In\n          values: [75]", "containerName is not 'trial'"),
        ("- name: trial", "- name: main", "containerName is not 'main'"),
        ("restartPolicy: Never", "restartPolicy: OnFailure", "restartPolicy"),
        ("podReplacementPolicy: Failed", "podReplacementPolicy: TerminatingOrFailed",
         "podReplacementPolicy"),
        ("completionMode: Indexed", "completionMode: NonIndexed", "completionMode"),
        ("backoffLimitPerIndex: 6", "backoffLimit: 6", "backoffLimitPerIndex is None"),
        ("completions: 12", "completions: 10", "JOB_NUM_TRIALS"),
        ('JOB_NUM_TRIALS: "12"', "JOB_NUM_TRIALS: 12", "needs quotes"),
        ("JOB_LOG_FORMAT: json", "JOB_LOG_FORMT: json", "did you mean JOB_LOG_FORMAT"),
        ("JOB_LOG_FORMAT: json", "JOB_LOG_FORMAT: xml", "settings do not load"),
        ('JOB_STRICT: "1"', 'JOB_STRICT: "0"', "JOB_STRICT"),
        ('JOB_STRICT: "1"', 'JOB_STRICT: "1"\n  HF_TOKEN: hf_x', "belongs in the Secret"),
        ('JOB_GRACE_SECONDS: "15"', 'JOB_GRACE_SECONDS: "30"', "over JOB_GRACE_SECONDS"),
        ("batch.kubernetes.io/job-completion-index']", "job-completion-index']",
         "completion index"),
        ("nvidia.com/gpu: 1  #", "nvidia.com/gpu: 2  #", "nvidia.com/gpu"),
        ("memory: 10Gi\n              ephemeral-storage: 12Gi",
         "memory: 14Gi\n              ephemeral-storage: 12Gi", "memory: request over limit"),
        ("- name: work\n              mountPath", "- name: wrk\n              mountPath",
         "are not the mounts"),
        ("mountPath: /work", "mountPath: /scratch", "JOB_WORK_DIR"),
        ("sizeLimit: 12Gi", "sizeLimit: 100Gi", "sizeLimit over"),
        ("claimName: qlora-sweep", "claimName: sweep", "claimName"),
        ("serviceAccountName: qlora-sweep", "serviceAccountName: sweep", "serviceAccountName"),
        ("- configMapRef:\n                name: qlora-sweep",
         "- configMapRef:\n                name: settings", "configMapRef"),
        ("optional: true", "optional: false", "secretRef"),
        ("drop: [ALL]", "drop: [NET_RAW]", "job pod: capabilities"),
        ("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "readOnlyRoot"),
        ("runAsUser: 10001", "runAsUser: 1000", "job pod: runAsUser"),
        ("nvidia.com/gpu.product: Tesla-T4", "nvidia.com/gpu.product: T4", "nodeSelector"),
    ],
)  # fmt: skip
def test_planted_mistake_is_caught(text: str, planted: str, complaint: str) -> None:
    assert SWEEP_JOB.count(text) == 1
    found = mistakes(Manifests(SWEEP_JOB.replace(text, planted)))
    assert any(complaint in mistake for mistake in found), found


def test_placeholders_are_the_only_values_left_to_the_user() -> None:
    values = re.findall(r"^\s*[^#\n]*?: (\S*CHANGE-ME\S*)", SWEEP_JOB, re.MULTILINE)
    assert values == [
        "file:///data/CHANGE-ME/rows.jsonl",
        "file:///data/CHANGE-ME/sweeps",
        "ghcr.io/CHANGE-ME/qlora-sweep-job:0.1.0",
    ]
    assert f"image: {values[-1]}\n" in VOLUME


def test_image_tag_is_the_version_of_the_code() -> None:
    assert re.findall(r"image: \S+:(\S+)", SWEEP_JOB + VOLUME) == [job.__version__] * 2
