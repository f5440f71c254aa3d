"""Each overlay, rendered by the real `kubectl kustomize`: pytest tests/deploy/test_overlays.py"""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.manifest_rules import Json, Manifests
from tests.deploy.pod_rules import mistakes
from tests.tiers import slow

K8S = Path(__file__).parents[2] / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
CLOUDS = ["aks", "eks-karpenter", "eks-nodegroup", "gke"]
# How long a pod has from SIGTERM to the end of the machine, in seconds.
NOTICE = {"gke": 15, "eks-karpenter": 120, "eks-nodegroup": 120, "aks": 30}
SPOT = {
    "gke": ("cloud.google.com/gke-spot", "true"),
    "eks-karpenter": ("karpenter.sh/capacity-type", "spot"),
    "eks-nodegroup": ("eks.amazonaws.com/capacityType", "SPOT"),
    "aks": ("kubernetes.azure.com/scalesetpriority", "spot"),
}
# Addresses and ports by which each cloud hands out the pod's identity; AKS needs none.
IDENTITY = {
    "gke": {("169.254.169.252/32", 987), ("169.254.169.252/32", 988), ("169.254.169.254/32", 53),
            ("169.254.169.254/32", 80), ("169.254.169.254/32", 8080)},
    "eks-karpenter": {("169.254.170.23/32", 80), ("fd00:ec2::23/128", 80)},
    "eks-nodegroup": {("169.254.170.23/32", 80), ("fd00:ec2::23/128", 80)},
    "aks": set(),
}  # fmt: skip
EVERYWHERE = {("169.254.20.10/32", 53), ("0.0.0.0/0", 443), ("::/0", 443)}


def kustomize(folder: Path) -> list[Json]:
    command = ["kubectl", "kustomize", str(folder)]
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl on the PATH (GitHub's runners have it)")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@functools.cache
def rendered(overlay: str) -> Manifests:
    return Manifests(kustomize(K8S / "overlays" / overlay))


def with_component(overlay: str, component: str, tmp_path: Path) -> Manifests:
    """The overlay with one line more in its `components`, as its comment tells people to."""
    if not (tmp_path / "k8s").exists():
        shutil.copytree(K8S, tmp_path / "k8s")
    path = tmp_path / "k8s/overlays" / overlay / "kustomization.yaml"
    line = f"  - ../../components/{overlay}\n"
    text = path.read_text()
    assert text.count(line) == 1
    path.write_text(text.replace(line, line + f"  - ../../components/{component}\n"))
    return Manifests(kustomize(path.parent))


def open_addresses(manifests: Manifests) -> set[tuple[str, int]]:
    return {
        (peer["ipBlock"]["cidr"], port["port"])
        for rule in manifests.by_kind["NetworkPolicy"]["spec"]["egress"]
        for peer in rule["to"]
        if "ipBlock" in peer
        for port in rule["ports"]
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_keeps_every_rule(overlay: str) -> None:
    assert mistakes(rendered(overlay)) == []
    kinds = {"ServiceAccount", "ConfigMap", "Job", "NetworkPolicy"}
    assert set(rendered(overlay).by_kind) == kinds


@pytest.mark.parametrize("overlay", CLOUDS)
def test_cloud_asks_for_spot_and_leaves_the_grace_it_gives(overlay: str) -> None:
    manifests = rendered(overlay)
    assert SPOT[overlay] in manifests.pod["nodeSelector"].items()
    assert "nvidia.com/gpu.product" not in manifests.pod["nodeSelector"]
    assert int(manifests.settings["JOB_GRACE_SECONDS"]) <= NOTICE[overlay]
    scheme = {"gke": "gs://", "aks": "az://"}.get(overlay, "s3://")
    assert all(manifests.settings[f"JOB_{n}_URI"].startswith(scheme) for n in ("DATASET", "OUTPUT"))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_network_lets_nothing_in_and_names_https_and_identity_out(overlay: str) -> None:
    manifests = rendered(overlay)
    policy = manifests.by_kind["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert not policy.get("ingress")
    labels = manifests.job["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert open_addresses(manifests) == EVERYWHERE | IDENTITY.get(overlay, set())
    link_local = [
        peer["ipBlock"].get("except", [])
        for rule in policy["egress"]
        for peer in rule["to"]
        if peer.get("ipBlock", {}).get("cidr") == "0.0.0.0/0"
    ]
    assert link_local == [["169.254.0.0/16"]]


def test_aks_pod_holds_a_token_for_entra_id_and_none_for_the_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifests = rendered("aks")
    (volume,) = [v for v in manifests.pod["volumes"] if "projected" in v]
    (source,) = volume["projected"]["sources"]
    token = source["serviceAccountToken"]
    assert token["audience"] == "api://AzureADTokenExchange"
    assert token["expirationSeconds"] >= 600  # the API server's least
    (mount,) = [m for m in manifests.container["volumeMounts"] if m["name"] == volume["name"]]
    path = f"{mount['mountPath']}/{token['path']}"
    assert manifests.settings["AZURE_FEDERATED_TOKEN_FILE"] == path
    assert mount["readOnly"] is True
    identity = pytest.importorskip("azure.identity")
    from azure.core.exceptions import ClientAuthenticationError

    for name, value in manifests.settings.items():
        if name.startswith("AZURE_"):
            monkeypatch.setenv(name, value)
    with pytest.raises(ClientAuthenticationError) as caught:
        identity.DefaultAzureCredential().get_token("https://storage.azure.com/.default")
    assert path in str(caught.value), "the SDK finds the identity by these very variables"


@pytest.mark.parametrize("overlay", ["gke", *slow("aks", "eks-karpenter", "eks-nodegroup")])
def test_on_demand_leaves_no_way_to_a_spot_node(overlay: str, tmp_path: Path) -> None:
    manifests = with_component(overlay, "on-demand", tmp_path)
    assert mistakes(manifests) == []
    assert SPOT[overlay][0] not in manifests.pod["nodeSelector"]
    affinity = manifests.pod["affinity"]["nodeAffinity"]
    required = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = required["nodeSelectorTerms"]
    refused = {e["key"]: e.get("values") for e in term["matchExpressions"]}
    key, value = SPOT[overlay]
    assert refused[key] == (None if overlay == "gke" else [value])


@pytest.mark.parametrize("overlay", ["aks", *slow("eks-karpenter", "eks-nodegroup", "gke")])
def test_kueue_runs_several_trials_at_once_on_every_cloud(overlay: str, tmp_path: Path) -> None:
    manifests = with_component(overlay, "kueue", tmp_path)
    assert mistakes(manifests) == []
    assert manifests.job["parallelism"] > 1
    assert manifests.job["suspend"] is True


@pytest.mark.parametrize(("trials", "may_be_lost"), [(1, 1), (2, 1), (12, 3), (200, 50)])
def test_the_number_of_trials_is_changed_in_one_file(
    trials: int, may_be_lost: int, tmp_path: Path
) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    path = tmp_path / "k8s/components/trials/kustomization.yaml"
    text = path.read_text().replace('JOB_NUM_TRIALS: "12"', f'JOB_NUM_TRIALS: "{trials}"')
    path.write_text(text.replace("maxFailedIndexes: 3", f"maxFailedIndexes: {may_be_lost}"))
    manifests = with_component("gke", "trials", tmp_path)
    assert mistakes(manifests) == []
    assert manifests.settings["JOB_NUM_TRIALS"] == str(trials)
    assert (manifests.job["completions"], manifests.job["maxFailedIndexes"]) == (
        trials,
        may_be_lost,
    )


@pytest.mark.parametrize("overlay", ["gke", *slow("aks", "eks-karpenter", "eks-nodegroup")])
def test_standby_adds_a_second_pod_and_nothing_else(overlay: str, tmp_path: Path) -> None:
    manifests = with_component(overlay, "standby", tmp_path)
    assert mistakes(manifests) == []
    assert manifests.job == rendered(overlay).job | {"parallelism": 2}


def test_the_queue_covers_what_the_pods_request() -> None:
    queue = K8S / "components/kueue/queue.yaml"
    documents: dict[str, Any] = {d["kind"]: d for d in yaml.safe_load_all(queue.read_text())}
    manifests = rendered("kueue")
    label = manifests.by_kind["Job"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert documents["LocalQueue"]["metadata"]["name"] == label
    cluster_queue = documents["ClusterQueue"]
    assert documents["LocalQueue"]["spec"]["clusterQueue"] == cluster_queue["metadata"]["name"]
    (group,) = cluster_queue["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    assert flavor["name"] == documents["ResourceFlavor"]["metadata"]["name"]
    requests = manifests.container["resources"]["requests"]
    quota = {r["name"]: str(r["nominalQuota"]) for r in flavor["resources"]}
    assert set(group["coveredResources"]) == set(requests) == set(quota)
    pods = manifests.job["parallelism"]
    for name, request in requests.items():
        number, unit = str(request).removesuffix("Gi"), "Gi" if str(request)[-1] == "i" else ""
        assert quota[name] == f"{pods * int(number)}{unit}"


def test_karpenter_may_start_the_nodes_that_its_overlay_asks_for() -> None:
    path = K8S / "components/eks-karpenter/nodepool.yaml"
    documents = {d["kind"]: d["spec"] for d in yaml.safe_load_all(path.read_text())}
    pool = documents["NodePool"]["template"]["spec"]
    offered = {r["key"]: r["values"] for r in pool["requirements"]}
    manifests = rendered("eks-karpenter")
    for key, value in manifests.pod["nodeSelector"].items():
        assert value in offered[key]
    tolerated = {toleration["key"] for toleration in manifests.pod["tolerations"]}
    assert {taint["key"] for taint in pool["taints"]} <= tolerated
    assert documents["NodePool"]["disruption"]["consolidationPolicy"] == "WhenEmpty"


def test_a_second_sweep_is_the_same_under_another_name(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    path = tmp_path / "k8s/overlays/gke/kustomization.yaml"
    path.write_text(path.read_text() + "nameSuffix: -b\n")
    manifests = Manifests(kustomize(path.parent))
    assert mistakes(manifests) == []
    names = {document["metadata"]["name"] for document in manifests.by_kind.values()}
    assert names == {"qlora-sweep-b"}
    assert manifests.container["envFrom"][1]["secretRef"]["name"] == "qlora-sweep"


def test_a_mistake_in_an_overlay_is_caught(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    path = tmp_path / "k8s/overlays/gke/kustomization.yaml"
    path.write_text(path.read_text().replace("JOB_OUTPUT_URI: gs:", "JOB_OUTPUT_URL: gs:"))
    found = mistakes(Manifests(kustomize(path.parent)))
    assert any("JOB_OUTPUT_URL" in mistake for mistake in found), found


def test_placeholders_of_a_cloud_are_all_in_its_own_file() -> None:
    for overlay in CLOUDS:
        text = yaml.safe_dump_all(rendered(overlay).by_kind.values())
        own = (K8S / "overlays" / overlay / "kustomization.yaml").read_text()
        left = {word for line in text.splitlines() for word in line.split() if "CHANGE-ME" in word}
        assert left
        for word in left:
            assert word.partition(":0.1.0")[0] in own
