"""Pins what is named by a tag only: the base image by digest, actions by commit. `make pin`.

Looks the digest up with `docker buildx imagetools` and commits with `git ls-remote`, so it needs a
network; what cannot be looked up keeps its tag, is listed, and makes the exit code 1.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASE = re.compile(r"^FROM (?P<name>[\w./-]+:[\w.-]+)(?= AS )", re.MULTILINE)
ACTION = re.compile(r"uses: (?P<name>[\w.-]+/[\w./-]+)@(?P<tag>v[\w.]+)(?:\s+#.*)?$", re.MULTILINE)


def output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def digest_of(image: str) -> str | None:
    text = output("docker", "buildx", "imagetools", "inspect", image)
    match = re.search(r"^Digest:\s+(sha256:[0-9a-f]{64})$", text, re.MULTILINE)
    return match[1] if match else None


def commit_of(action: str, tag: str) -> str | None:
    """The commit of a tag; an annotated one is followed to it (`^{}`)."""
    repository = "/".join(action.split("/")[:2])
    url = f"https://github.com/{repository}"
    text = output("git", "ls-remote", url, f"refs/tags/{tag}", f"refs/tags/{tag}^{{}}")
    commits = dict(reversed(line.split("\t")) for line in text.splitlines() if "\t" in line)
    return commits.get(f"refs/tags/{tag}^{{}}") or commits.get(f"refs/tags/{tag}")


def main() -> int:
    left: list[str] = []

    def base(match: re.Match[str]) -> str:
        digest = digest_of(match["name"])
        if digest is None:
            left.append(f"Dockerfile: {match['name']}")
        return match[0] if digest is None else f"{match[0]}@{digest}"

    def action(match: re.Match[str]) -> str:
        commit = commit_of(match["name"], match["tag"])
        if commit is None:
            left.append(f"workflows: {match['name']}@{match['tag']}")
        return match[0] if commit is None else f"uses: {match['name']}@{commit}  # {match['tag']}"

    dockerfile = ROOT / "Dockerfile"
    dockerfile.write_text(BASE.sub(base, dockerfile.read_text()))
    for path in sorted((ROOT / ".github/workflows").glob("*.yml")):
        path.write_text(ACTION.sub(action, path.read_text()))
    print("\n".join(["not pinned, could not be looked up:", *left]) if left else "all is pinned")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
