"""The Dockerfile's facts, read without building it: pytest tests/deploy/test_dockerfile.py"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import job

ROOT = Path(__file__).parents[2]


class Instruction(NamedTuple):
    stage: str
    word: str  # RUN, COPY, ...
    rest: str  # continued lines joined, comments between them dropped


def read_dockerfile(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if not re.match(r"\s*(#|$)", line)]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    instructions, stage = [], ""
    for line in joined.splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            stage = rest.partition(" AS ")[2]
        instructions.append(Instruction(stage, word, rest))
    return instructions


INSTRUCTIONS = read_dockerfile((ROOT / "Dockerfile").read_text())


def rests(word: str, stage: str | None = None) -> list[str]:
    return [i.rest for i in INSTRUCTIONS if i.word == word and stage in (None, i.stage)]


def final_environment() -> dict[str, str]:
    pairs = re.findall(r"(\w+)=(\S+)", " ".join(rests("ENV", "final")))
    return dict(pairs)


def bases() -> dict[str, str]:
    """The images that come from outside, by the variant that is built on each."""
    stages = dict(reversed(rest.split(" AS ")) for rest in rests("FROM"))
    own = {*stages, "${VARIANT}"}
    return {stage: image for stage, image in stages.items() if image not in own}


def test_each_variant_has_one_base_from_outside_with_an_exact_version() -> None:
    assert list(bases()) == ["cu126", "cu130"]
    pinned = r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d\d\.04(@sha256:\w{64})?"
    assert all(re.fullmatch(pinned, image) for image in bases().values())
    assert "${VARIANT} AS base" in rests("FROM")
    assert rests("FROM")[-1].endswith(" AS final")
    assert INSTRUCTIONS[0] == Instruction("", "ARG", "VARIANT=cu126")  # before any stage


def test_torch_is_built_for_the_cuda_of_the_base() -> None:
    arguments = rests("ARG", "dependencies")
    assert "TORCH_INDEX=https://download.pytorch.org/whl/${VARIANT}" in arguments
    assert arguments.index("VARIANT") < len(arguments) - 1, "a stage sees what it declares"
    for variant, image in bases().items():
        cuda = re.search(r"nvidia/cuda:(\d+)\.(\d+)", image)
        assert cuda
        assert variant == f"cu{cuda[1]}{cuda[2]}"


def test_base_name_label_is_the_base() -> None:
    for variant, image in bases().items():
        (label,) = rests("LABEL", variant)
        name = image.partition("@")[0]
        assert label == f'org.opencontainers.image.base.name="docker.io/{name}"'
    (labels,) = rests("LABEL", "final")
    assert {'version="$VERSION"', 'revision="$REVISION"'} <= set(re.findall(r"\w+=\S+", labels))


def test_runs_as_a_numeric_user_that_is_not_root() -> None:
    (user,) = rests("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    words = [i.word for i in INSTRUCTIONS]
    assert "RUN" not in words[words.index("USER") :]


def test_entry_point_is_the_job_itself_in_exec_form() -> None:
    (entry_point,) = rests("ENTRYPOINT")
    assert json.loads(entry_point) == [
        "/usr/bin/env", "--block-signal=TERM", "/opt/venv/bin/python", "-m", "job",
    ]  # fmt: skip
    assert rests("CMD") == []
    assert final_environment()["PYTHONUNBUFFERED"] == "1"


def test_packages_are_those_of_the_constraints_and_need_no_compiler() -> None:
    installs = [rest for rest in rests("RUN") if "pip" in rest and " install " in rest]
    installs = [rest for rest in installs if "apt-get" not in rest]
    assert len(installs) == 2
    for install in installs:
        assert "--constraint constraints.txt" in install
        assert "--only-binary :all:" in install
        assert "--mount=type=cache,target=/root/.cache/pip" in install
    assert '--index-url "$TORCH_INDEX" torch' in installs[0]


def test_final_image_installs_nothing() -> None:
    assert rests("RUN", "final") == ["mkdir --mode=1777 /work"]
    for rest in rests("RUN"):
        if "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert rest.endswith("rm -rf /var/lib/apt/lists/*")
        assert not re.search(r"gcc|g\+\+|build-essential|curl|wget", rest)
    assert rests("ADD") == []  # fetches and unpacks; COPY does neither


def test_what_no_t4_can_use_is_removed_before_the_final_stage() -> None:
    (prune,) = [rest for rest in rests("RUN", "dependencies") if "libbitsandbytes" in rest]
    assert prune in rests("RUN", "dependencies")[-1:]  # pip would see gaps, and check after it
    # One library each must be left: the CPU's, and the one that torch's own CUDA version names.
    assert '! -name libbitsandbytes_cpu.so ! -name "libbitsandbytes_cuda${cuda:-none}.so"' in prune
    assert 'test -e "$site/bitsandbytes/libbitsandbytes_${cuda:+cuda}${cuda:-cpu}.so"' in prune
    assert '"$site/triton"' in prune  # without a compiler its kernels cannot start
    assert "\\( -name 'libcusolverMg.so*' -o -name 'libnvrtc.alt.so*' \\) -delete" in prune
    assert '"$site" -mindepth 2 -type d -name tests' in prune  # of packages, no package "tests"


def test_version_names_the_commit_of_the_image() -> None:
    assert final_environment()["IMAGE_REVISION"] == "$REVISION"
    environ = {"PATH": os.environ["PATH"], "IMAGE_REVISION": "0123abc"}
    done = subprocess.run(
        [sys.executable, "-m", "job", "--version"],
        env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == f"job {job.__version__} (commit: 0123abc)\n"


def test_source_is_in_no_stage_that_installs_packages() -> None:
    assert rests("COPY", "dependencies") == [
        "constraints.txt ./",
        "--from=requirements /requirements.txt ./",
    ]
    final = rests("COPY", "final")
    assert [rest.split()[-1] for rest in final] == ["/opt/venv", "/app"]  # packages, then source


def test_everything_written_goes_under_the_work_folder() -> None:
    environment = final_environment()
    assert environment["JOB_WORK_DIR"] == environment["TMPDIR"] == environment["HOME"] == "/work"
    places = {k: v for k, v in environment.items() if re.search(r"HOME|DIR$", k)}
    assert len(places) >= 11
    assert {k: v for k, v in places.items() if not re.match(r"/work(/|$)", v)} == {}
    assert rests("WORKDIR", "final") == ["/work"]


def test_context_holds_what_is_copied_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    allowed = {line.removeprefix("!") for line in patterns if line.startswith("!")}
    copied = {rest.split()[0] for rest in rests("COPY") if not rest.startswith("--from")}
    assert allowed == copied
    assert all((ROOT / name).exists() for name in copied)


def test_health_check_is_refused_on_purpose() -> None:
    assert rests("HEALTHCHECK") == ["NONE"]


def test_reader_joins_lines_and_drops_comments() -> None:
    text = "FROM a:1 AS x\n# why\nRUN one \\\n    # inside\n    && two\n\nUSER 5:5\n"
    assert read_dockerfile(text) == [
        Instruction("x", "FROM", "a:1 AS x"),
        Instruction("x", "RUN", "one && two"),
        Instruction("x", "USER", "5:5"),
    ]
