"""k8s/*.yaml keep the job's contracts and the API server's rules.

`pytest tests/deploy/test_manifests.py`
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import job
from tests.deploy.manifest_rules import Check, Manifests
from tests.deploy.pod_rules import CHECKS, mistakes

ROOT = Path(__file__).parents[2]
SWEEP_JOB = (ROOT / "k8s/sweep-job.yaml").read_text()
VOLUME = (ROOT / "k8s/volume.yaml").read_text()


def read(sweep_job: str = SWEEP_JOB) -> Manifests:
    return Manifests([*yaml.safe_load_all(sweep_job), *yaml.safe_load_all(VOLUME)])


@pytest.mark.parametrize("check", CHECKS)
def test_manifests_have_no_mistakes(check: Check) -> None:
    assert list(check(read())) == []


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
        ('nvidia.com/gpu: "1"  #', 'nvidia.com/gpu: "2"  #', "nvidia.com/gpu"),
        ('nvidia.com/gpu: "1"  #', "nvidia.com/gpu: 1  #", "limits nvidia.com/gpu: 1 needs quotes"),
        ('cpu: "2"', "cpu: 2", "requests cpu: 2 needs quotes"),
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
        ("nvidia.com/gpu.product: Tesla-T4",
         "nvidia.com/gpu.product: Tesla-T4\n        spot: true", "label spot: True"),
        ('safe-to-evict: "false"', "safe-to-evict: false", "needs quotes"),
        ('safe-to-evict: "false"',
         'safe-to-evict: "false"\n        karpenter.sh/do-not-disrupt: "true"', "do-not-disrupt"),
        ("- key: nvidia.com/gpu\n          operator: Exists",
         "- key: nvidia.com/gpu\n          operator: Exists\n          value: present", "no value"),
        ("gke-spot\n          operator: Exists\n          effect: NoSchedule",
         "gke-spot\n          operator: Exists\n          effect: NoEvict",
         "effect"),
        ("- key: nvidia.com/gpu\n          operator", "- operator", "every taint"),
        ("mountPath: /dev/shm", "mountPath: dev/shm", "absolute"),
        ("mountPath: /dev/shm", "mountPath: /work", "two volumes"),
        ("medium: Memory\n            sizeLimit: 1Gi",
         "medium: Memory\n            sizeLimit: 1Gi\n          hostPath: {path: /dev/shm}",
         "exactly one source"),
        ("immutable: true", "immutable: false", "immutable"),
        ("activeDeadlineSeconds: 25200", "activeDeadlineSeconds: 3600", "JOB_TRIAL_BUDGET_HOURS"),
        ("parallelism: 1", "parallelism: 1\n  activeDeadlineSeconds: 86400", "waits for spot"),
        ("parallelism: 1", "parallelism: 4", "no queue limits"),
        ("parallelism: 1", "parallelism: 1\n  suspend: true", "no queue would wake it"),
        ("parallelism: 1", "parallelism: 1\n  backoffLimit: 6", "all indexes together"),
        ("maxFailedIndexes: 3", "maxFailedIndexes: 12", "maxFailedIndexes"),
        ("maxFailedIndexes: 3", "maxFailedIndexes: 0", "maxFailedIndexes"),
        ("JOB_OUTPUT_URI: file:///data/CHANGE-ME/sweeps", "JOB_OUTPUT_URI: /tmp/sweeps",
         "JOB_OUTPUT_URI '/tmp/sweeps'"),
        ("kind: Job\nmetadata:\n  name: qlora-sweep", "kind: Job\nmetadata:\n  name: qlora_sweep",
         "valid name"),
        ("enableServiceLinks: false", "hostNetwork: true", "job pod: host"),
        ("readOnlyRootFilesystem: true", "privileged: true", "job pod: privileged"),
    ],
)  # fmt: skip
def test_planted_mistake_is_caught(text: str, planted: str, complaint: str) -> None:
    assert SWEEP_JOB.count(text) == 1
    found = mistakes(read(SWEEP_JOB.replace(text, planted)))
    assert any(complaint in mistake for mistake in found), found


def test_what_people_apply_and_what_kustomize_reads_is_one_text() -> None:
    """Two plain files: a checkout without symbolic links would hold the path of a link as text."""
    assert (ROOT / "k8s/base/sweep-job.yaml").read_text() == SWEEP_JOB
    assert [path for path in (ROOT / "k8s").rglob("*") if path.is_symlink()] == []


@pytest.mark.parametrize(("trials", "may_be_lost"), [(1, 1), (2, 1), (12, 3), (200, 50)])
def test_any_number_of_trials_changes_the_three_marked_lines(trials: int, may_be_lost: int) -> None:
    marked = re.findall(r"^.*# trials, \d of 3.*\n", SWEEP_JOB, re.MULTILINE)
    changed = SWEEP_JOB
    for line, number in zip(marked, (trials, trials, may_be_lost), strict=True):
        changed = changed.replace(line, re.sub(r"\d+", str(number), line, count=1))
    manifests = read(changed)
    assert (manifests.job["completions"], mistakes(manifests)) == (trials, [])


@pytest.mark.parametrize("trials", [1, 2])
def test_fewer_trials_than_may_be_lost_are_caught(trials: int) -> None:
    """The real API server refused both, after the ConfigMap was made and could not be changed."""
    changed = SWEEP_JOB.replace("completions: 12", f"completions: {trials}")
    found = mistakes(read(changed.replace('NUM_TRIALS: "12"', f'NUM_TRIALS: "{trials}"')))
    assert any("maxFailedIndexes 3" in mistake for mistake in found), found


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
