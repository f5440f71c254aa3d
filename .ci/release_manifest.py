"""Writes the manifests of a release, the image by its digest: release_manifest.py IMAGE DIGEST OUT.

A tag can be moved, a digest not: what is applied from a release is what was built for it.
"""

from __future__ import annotations

import re
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACEHOLDER = r"ghcr\.io/CHANGE-ME/qlora-sweep-job"


def pinned(text: str, image: str, digest: str) -> str:
    """The text of a manifest or kustomization with every mention of the image pinned."""
    text = re.sub(rf"image: {PLACEHOLDER}:\S+", f"image: {image}@{digest}", text)
    return re.sub(
        rf"newName: {PLACEHOLDER}\n(\s+)newTag: \S+",
        lambda match: f"newName: {image}\n{match[1]}digest: {digest}",
        text,
    )


def main(image: str, digest: str, out: Path) -> None:
    image = image.lower()  # GitHub's owners may have capitals, image names may not
    if not re.fullmatch(r"[a-z0-9.:-]+(/[a-z0-9._-]+)+", image):
        sys.exit(f"IMAGE: {image!r} is no name of an image; wanted: registry/owner/name")
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        sys.exit(f"DIGEST: {digest!r} is no digest; wanted: sha256:<64 hex digits>")
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "k8s").rglob("*.yaml")):
        target = out / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(pinned(path.read_text(), image, digest))
    for name in ("sweep-job.yaml", "volume.yaml"):
        (out / name).write_text((out / "k8s" / name).read_text())
    with tarfile.open(out / "k8s.tar.gz", "w:gz") as archive:
        archive.add(out / "k8s", "k8s")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
