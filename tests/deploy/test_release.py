"""Release manifests, and what `make pin` writes: pytest tests/deploy/test_release.py

`docker` and `git` are small scripts on the PATH that answer as the real ones do.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

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
    assert f"-base-ubuntu24.04@{DIGEST} AS base" in dockerfile
    assert dockerfile.count(DIGEST) == 1  # the stages of its own have no digest
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
