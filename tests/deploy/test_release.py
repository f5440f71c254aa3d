"""Release manifests, and what `make pin` writes: pytest tests/deploy/test_release.py

`docker` and `git` are small scripts on the PATH that answer as the real ones do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

import job

ROOT = Path(__file__).parents[2]
DIGEST = "sha256:" + "a" * 64
COMMIT = "b" * 40


def run(script: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env=dict(os.environ) | environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def release(out: Path, image: str, digest: str) -> subprocess.CompletedProcess[str]:
    return run(ROOT / ".ci/release_manifest.py", image, digest, str(out))


def test_release_names_the_image_by_digest_everywhere(tmp_path: Path) -> None:
    done = release(tmp_path, "ghcr.io/Some-One/qlora-sweep-job", DIGEST)
    assert done.returncode == 0, done.stderr
    image = f"ghcr.io/some-one/qlora-sweep-job@{DIGEST}"
    for name in ("sweep-job.yaml", "volume.yaml"):
        text = (tmp_path / name).read_text()
        assert f"image: {image}\n" in text
        assert "ghcr.io/CHANGE-ME" not in text
    with tarfile.open(tmp_path / "k8s.tar.gz") as archive:
        assert "k8s/overlays/gke/kustomization.yaml" in archive.getnames()
    for path in (tmp_path / "k8s/overlays").rglob("kustomization.yaml"):
        assert not re.search(r"newTag|newName: \S*CHANGE-ME", path.read_text())


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_a_released_overlay_renders_with_the_digest(tmp_path: Path) -> None:
    release(tmp_path, "ghcr.io/some-one/qlora-sweep-job", DIGEST)
    overlay = tmp_path / "k8s/overlays/aks"
    done = subprocess.run(
        ["kubectl", "kustomize", str(overlay)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert f"image: ghcr.io/some-one/qlora-sweep-job@{DIGEST}\n" in done.stdout


@pytest.mark.parametrize(
    ("image", "digest", "complaint"),
    [("ghcr.io/x/y", "", "DIGEST"), ("ghcr.io/x/y", "sha256:12", "DIGEST"), ("", DIGEST, "IMAGE"),
     ("no spaces/x", DIGEST, "IMAGE")],
)  # fmt: skip
def test_a_release_without_a_digest_is_refused(
    image: str, digest: str, complaint: str, tmp_path: Path
) -> None:
    done = release(tmp_path / "out", image, digest)
    assert done.returncode != 0
    assert done.stderr.startswith(complaint)
    assert not (tmp_path / "out").exists()


def checkout(tmp_path: Path, docker: str, git: str) -> tuple[Path, dict[str, str]]:
    """A copy of all that is pinned, with one action by tag, and the two tools."""
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    shutil.copytree(ROOT / ".github", tmp_path / ".github")
    dockerfile = re.sub(r"@sha256:\w+", "", (ROOT / "Dockerfile").read_text())
    (tmp_path / "Dockerfile").write_text(dockerfile)
    ci = tmp_path / ".github/workflows/ci.yml"
    ci.write_text(re.sub(r"@\w{40}  # (v\S+)", r"@\1", ci.read_text(), count=1))
    for name, script in (("docker", docker), ("git", git)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    return tmp_path / ".ci/pin.py", {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


def test_pin_writes_digest_and_commit(tmp_path: Path) -> None:
    tag = f'printf \'{"c" * 40}\\t%s\\n{COMMIT}\\t%s\\n\' "$3" "$4"'  # an annotated tag, its commit
    script, environ = checkout(tmp_path, f"echo 'Name: x'; echo 'Digest:    {DIGEST}'", tag)
    done = run(script, **environ)
    assert (done.returncode, done.stdout) == (0, "all is pinned\n"), done.stderr
    dockerfile = (tmp_path / "Dockerfile").read_text()
    assert f"-base-ubuntu24.04@{DIGEST} AS cu126" in dockerfile
    assert dockerfile.count(f"@{DIGEST} AS cu1") == dockerfile.count(DIGEST) == 2  # not our stages
    assert f"@{COMMIT}  # v" in (tmp_path / ".github/workflows/ci.yml").read_text()


def test_pin_invents_nothing(tmp_path: Path) -> None:
    script, environ = checkout(tmp_path, "echo 'Digest: unknown'", "exit 128")
    before = [(tmp_path / name).read_text() for name in ("Dockerfile", ".github/workflows/ci.yml")]
    done = run(script, **environ)
    assert done.returncode == 1
    assert "nvidia/cuda:" in done.stdout
    assert "workflows: actions/checkout@v" in done.stdout
    after = [(tmp_path / name).read_text() for name in ("Dockerfile", ".github/workflows/ci.yml")]
    assert after == before


def _made(*words: str, **environ: str) -> str:
    """What make would run for a target, as one line a command."""
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *words],
        env=dict(os.environ) | environ, cwd=ROOT, capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    return done.stdout.replace("\\\n", " ")


PIP = """#!/bin/sh
echo "$@" >>"${0%/bin/pip}/pip.log"
grep '^torch==' "${0%/bin/pip}/constraints.txt" >>"${0%/bin/pip}/pip.log"
"""


def _set_up(venv: Path, *words: str) -> list[str]:
    """The lines that a `make setup` gives to pip, and the torch that is asked for at each."""
    (venv / "pip.log").write_text("")
    subprocess.run(
        ["make", "setup", f"VENV={venv}", f"PYTHON={sys.executable}", *words],
        env={"PATH": os.environ["PATH"]}, cwd=ROOT, capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    return (venv / "pip.log").read_text().splitlines()


def test_setup_installs_anew_for_another_torch_and_only_then(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/pip").write_text(PIP)
    (tmp_path / "bin/pip").chmod(0o755)
    (tmp_path / "bin/python").symlink_to(sys.executable)
    pinned = _set_up(tmp_path)
    assert len(pinned) == 4, "two installations"
    assert _set_up(tmp_path) == []
    index = "TORCH_INDEX=https://torch.test/whl/cpu"
    for words in (["TORCH=2.11.0"], [index], ["TORCH=2.12.0", index]):
        away, _, torch, asked, *_ = _set_up(tmp_path, *words)
        assert away.startswith("uninstall ")
        assert away.endswith(" torch"), "pip is content with the build that is there"
        assert torch.startswith("install ")
        if index in words:
            assert "--extra-index-url https://torch.test/whl/cpu torch" in torch
        version = words[0].removeprefix("TORCH=") if words[0] != index else "2.11.0"
        assert asked == f"torch=={version}", "a value that is not given stays as it was"
        assert _set_up(tmp_path, *words) == []
        assert _set_up(tmp_path) == [], "what is there is kept"
    assert _set_up(tmp_path, "TORCH=", "TORCH_INDEX=")[2:] == pinned


@pytest.mark.parametrize(("variant", "suffix"), [("cu126", ""), ("cu130", "-cu130")])
def test_each_variant_is_pushed_under_its_own_tag_and_told_apart(variant: str, suffix: str) -> None:
    version = job.__version__
    commands = _made(
        "release-image", f"TAG=v{version}", "IMAGE=ghcr.io/Some-One/job", VARIANT=variant
    )
    assert f"--tag ghcr.io/some-one/job:{version}{suffix} " in commands
    assert f"--build-arg VARIANT={variant} " in commands
    assert f"ref=ghcr.io/some-one/job:buildcache-{variant}" in commands
    assert f'"digest=$digest" "{variant}=$digest"' in commands


def test_the_release_builds_every_variant_and_names_the_default_one() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    variants = workflow["jobs"]["image"]["strategy"]["matrix"]["variant"]
    assert [f"AS {v}\n" in (ROOT / "Dockerfile").read_text() for v in variants] == [True, True]
    assert set(workflow["jobs"]["image"]["outputs"]) == set(variants)
    digest = workflow["jobs"]["release"]["env"]["DIGEST"]
    assert digest == "${{ needs.image.outputs.cu126 }}", "the manifests' image runs everywhere"


RENOVATE = json.loads((ROOT / ".github/renovate.json").read_text())


def test_renovate_finds_the_pin_of_torch_and_every_other() -> None:
    (pattern,) = RENOVATE["pip_requirements"]["managerFilePatterns"]
    assert re.search(pattern[1:-1], "constraints.txt")
    pins = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert len(pins) == 1
    for name in ("Makefile", "pyproject.toml", "Dockerfile"):
        stated = re.findall(r"^[^#\n]*\btorch==(\d[\d.]*)", (ROOT / name).read_text(), re.MULTILINE)
        assert not stated, f"{name}: a second pin would be left behind"


def test_renovate_finds_every_pin_of_the_makefile() -> None:
    text = (ROOT / "Makefile").read_text()
    pins = re.findall(r"([\w.-]+)(==|@)(\d[\w.-]*)", text)
    assert {name for name, *_ in pins} >= {"azurite", "skypilot"}
    found = []
    for manager in RENOVATE["customManagers"]:
        (path,), (pattern,) = manager["managerFilePatterns"], manager["matchStrings"]
        assert manager["customType"] == "regex"
        assert re.search(path[1:-1], "Makefile")
        sign = {"pypi": "==", "npm": "@"}[manager["datasourceTemplate"]]
        matches = re.finditer(pattern.replace("(?<", "(?P<"), text)
        found += [(match["depName"], sign, match["currentValue"]) for match in matches]
    assert sorted(found) == sorted(pins)


def test_renovate_keeps_each_variant_on_its_cuda() -> None:
    rules = [r for r in RENOVATE["packageRules"] if r.get("matchPackageNames") == ["nvidia/cuda"]]
    for tag in re.findall(r"nvidia/cuda:(\S+) AS", (ROOT / "Dockerfile").read_text()):
        (rule,) = [r for r in rules if re.search(r["matchCurrentVersion"][1:-1], tag)]
        allowed = re.compile(rule["allowedVersions"][1:-1])
        assert allowed.search(tag)
        assert not allowed.search("14.0.0-base-ubuntu24.04")
