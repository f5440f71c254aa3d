"""The alerts' own unit tests can fail: pytest tests/deploy/test_alerts.py

`make check-manifests` runs tests/deploy/alerts_test.yaml with promtool (Debian's package
`prometheus`); here each mistake that was made once is planted and has to be found.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.job_controller import ROOT

ALERTS = (ROOT / "k8s/alerts.yaml").read_text()
pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool (Debian: apt-get install prometheus)"
)


def unit_tests(alerts: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    tests = tmp_path / "tests/deploy/alerts_test.yaml"
    for folder in (tests.parent, tmp_path / "build"):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "tests/deploy/alerts_test.yaml", tests)
    (tmp_path / "build/alerts.yaml").write_text(yaml.safe_dump(yaml.safe_load(alerts)["spec"]))
    return subprocess.run(
        ["promtool", "test", "rules", str(tests)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_alerts_pass_their_unit_tests(tmp_path: Path) -> None:
    done = unit_tests(ALERTS, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


OF_JOBS = 'kube_job_status_failed{job_name=~"qlora-sweep.*"}'
PLANTED = {
    "delete and apply counts as a failure": (
        '(increase(kube_job_status_failed{job_name=~"qlora-sweep.*", reason=""}[1h]))',
        f"(max_over_time({OF_JOBS}[1h]) - min_over_time({OF_JOBS}[1h]))",
    ),
    "every Job counts as one whose number is gone": (
        "unless on (namespace, job_name) kube_job_status_failed\n",
        "\n",
    ),
    "kube-state-metrics before 2.14 tells of nothing": (
        'kube_job_created{job_name=~"qlora-sweep.*"}',
        'kube_job_created{job_name="none"}',
    ),
    "another reason is another alert": ("max without (reason)", "max without ()"),
    "a pod of any sweep hides the others": (
        "unless on (namespace, job_name)\n            label_replace",
        "unless on (namespace)\n            label_replace",
    ),
    "an hour is late": ("> 600", "> 3600"),
}


@pytest.mark.parametrize(("text", "planted"), PLANTED.values(), ids=PLANTED)
def test_planted_mistake_is_found(text: str, planted: str, tmp_path: Path) -> None:
    assert text in ALERTS
    done = unit_tests(ALERTS.replace(text, planted), tmp_path)
    assert "FAILED" in done.stdout + done.stderr
    assert done.returncode == 1
