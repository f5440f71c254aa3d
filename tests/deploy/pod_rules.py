"""Rules that the pods of a sweep's manifests must keep: see manifest_rules.py."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.deploy.manifest_rules import (
    CONTRACT_CHECKS,
    DOCKERFILE,
    NODE,
    T4_LABELS,
    Check,
    Json,
    Manifests,
    quantity,
)

DNS_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
LABEL_VALUE = r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?"


def check_names_and_labels_are_valid(manifests: Manifests) -> Iterator[str]:
    for kind, document in manifests.by_kind.items():
        if not re.fullmatch(DNS_LABEL, document["metadata"]["name"]):
            yield f"{kind}: {document['metadata']['name']!r} is no valid name"
    template = manifests.job["template"]["metadata"]
    labels = [
        manifests.by_kind["Job"]["metadata"]["labels"],
        template["labels"],
        manifests.pod.get("nodeSelector", {}),
    ]
    for key, value in [pair for group in labels for pair in group.items()]:
        if not isinstance(value, str) or not re.fullmatch(LABEL_VALUE, value):
            yield f"label {key}: {value!r} is no label value (quotes?)"
    for key, value in template.get("annotations", {}).items():
        if not isinstance(value, str):
            yield f"annotation {key}: {value!r} needs quotes"


def check_tolerations_are_valid(manifests: Manifests) -> Iterator[str]:
    for toleration in manifests.pod.get("tolerations", []):
        if toleration.get("operator") == "Exists" and "value" in toleration:
            yield f"a toleration that Exists has no value: {toleration}"
        if toleration.get("effect") not in ("NoSchedule", "NoExecute", "PreferNoSchedule"):
            yield f"no such effect of a taint: {toleration}"
        if not toleration.get("key"):
            yield f"tolerates every taint, those of broken nodes too: {toleration}"


def check_quantities_are_strings(manifests: Manifests) -> Iterator[str]:
    """The API server gives quantities back as strings; a number reads as a change at each apply."""
    for pod in manifests.pods:
        for container in pod["containers"]:
            for part, quantities in container["resources"].items():
                for name, value in quantities.items():
                    if not isinstance(value, str):
                        yield f"{part} {name}: {value!r} needs quotes: a number changes the Job"


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


def check_volumes_are_mounted(manifests: Manifests) -> Iterator[str]:
    for pod in manifests.pods:
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        names = [volume["name"] for volume in pod["volumes"]]
        if sorted(names) != sorted(mounts) or len(container["volumeMounts"]) != len(mounts):
            yield f"volumes {sorted(names)} are not the mounts {sorted(mounts)}"
        if len(set(mounts.values())) != len(mounts):
            yield "two volumes are mounted at one path"
        for path in mounts.values():
            if not re.fullmatch(r"(/[\w.-]+)+", path):
                yield f"mountPath {path!r} is no absolute path"
        for volume in pod["volumes"]:
            if len(volume) != 2:
                yield f"volume {volume['name']} has not exactly one source"
    job_mounts = {m["mountPath"]: m["name"] for m in manifests.container["volumeMounts"]}
    work_dir = re.findall(r"JOB_WORK_DIR=(\S+)", DOCKERFILE)
    if not set(work_dir) <= set(job_mounts):
        yield f"the image's JOB_WORK_DIR {work_dir} is not mounted: the root is read-only"
    if "/dev/shm" not in job_mounts:  # noqa: S108
        yield "no shared memory is mounted: the 64 MB of a container are too little"


def check_rows_and_results_are_in_reach(manifests: Manifests) -> Iterator[str]:
    paths = [mount["mountPath"] for mount in manifests.container["volumeMounts"]]
    scheme = r"file:///data/.|(s3|gs|az)://[^/]"
    for name in ("JOB_DATASET_URI", "JOB_OUTPUT_URI"):
        uri = manifests.settings.get(name, "")
        if not re.match(scheme, uri) or (uri.startswith("file:") and "/data" not in paths):
            yield f"{name} {uri!r} is neither in a bucket nor on the volume at /data"


def check_references_resolve(manifests: Manifests) -> Iterator[str]:
    def exists(kind: str, name: str) -> bool:
        return manifests.by_kind.get(kind, {}).get("metadata", {}).get("name") == name

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
    for pod in manifests.pods:
        for volume in pod["volumes"]:
            claim = volume.get("persistentVolumeClaim")
            if not claim:
                continue
            if claim["claimName"] != "qlora-sweep":
                yield "claimName names no PersistentVolumeClaim of volume.yaml"
    names = [entry["name"] for entry in manifests.container["env"]]
    if set(names) & set(manifests.settings) or len(set(names)) != len(names):
        yield f"a variable is set twice: {names}"


def check_pods_are_restricted(manifests: Manifests) -> Iterator[str]:
    """The Pod Security Standard "restricted", a read-only root and no API token."""
    users = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    for name, pod in zip(("job", "files"), manifests.pods, strict=False):
        of_pod = pod.get("securityContext", {})
        of_container = pod["containers"][0].get("securityContext", {})
        has_claim = any("persistentVolumeClaim" in volume for volume in pod["volumes"])
        facts = {
            "runAsNonRoot": of_pod.get("runAsNonRoot") is True,
            "runAsUser": [(str(of_pod.get("runAsUser")), str(of_pod.get("runAsGroup")))] == users,
            # A group of the volume's, and none to be applied where there is no volume.
            "fsGroup": of_pod.get("fsGroup") == (of_pod.get("runAsGroup") if has_claim else None),
            "seccompProfile": of_pod.get("seccompProfile") == {"type": "RuntimeDefault"},
            "capabilities": of_container.get("capabilities") == {"drop": ["ALL"]},
            "allowPrivilegeEscalation": of_container.get("allowPrivilegeEscalation") is False,
            "readOnlyRootFilesystem": of_container.get("readOnlyRootFilesystem") is True,
            "automountServiceAccountToken": pod.get("automountServiceAccountToken") is False,
            "host": not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")),
            "hostPath": not any("hostPath" in volume for volume in pod["volumes"]),
            "privileged": not of_container.get("privileged"),
        }
        yield from (f"{name} pod: {fact}" for fact, holds in facts.items() if not holds)


def check_pods_reach_the_same_t4_nodes(manifests: Manifests) -> Iterator[str]:
    if not T4_LABELS & set(manifests.pod.get("nodeSelector", {}).items()):
        yield "nodeSelector does not choose T4 nodes"
    for key in ("nodeSelector", "tolerations"):  # or the disk ends up in a zone without T4s
        if any(pod.get(key) != manifests.pod.get(key) for pod in manifests.pods):
            yield f"{key} of the job pod and of the files pod differ"
    tolerated = {toleration.get("key") for toleration in manifests.pod.get("tolerations", [])}
    if "nvidia.com/gpu" not in tolerated:
        yield "the taint of GPU nodes is not tolerated"
    annotations: Json = manifests.job["template"]["metadata"].get("annotations", {})
    if "karpenter.sh/do-not-disrupt" in annotations:
        yield "karpenter.sh/do-not-disrupt: the pod would not be evicted on a spot notice either"


CHECKS: tuple[Check, ...] = (
    *CONTRACT_CHECKS,
    check_names_and_labels_are_valid,
    check_tolerations_are_valid,
    check_quantities_are_strings,
    check_resources_fit_the_node,
    check_volumes_are_mounted,
    check_rows_and_results_are_in_reach,
    check_references_resolve,
    check_pods_are_restricted,
    check_pods_reach_the_same_t4_nodes,
)


def mistakes(manifests: Manifests) -> list[str]:
    return [mistake for check in CHECKS for mistake in check(manifests)]
