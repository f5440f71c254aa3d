"""Every file that the documents name exists, every page is listed. `pytest tests/test_docs.py`"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runbook import ROWS as RUNBOOK_ROWS

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "AGENTS.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
)
OTHERS = sorted(
    path
    for pattern in ("k8s/**/*.yaml", "Makefile", "Dockerfile", ".ci/*", ".github/**/*.yml")
    for path in ROOT.glob(pattern)
    if path.is_file()
)
# A path is named from the root, or, where a table says so, from job/ or tests/.
_FILE = re.compile(r"(?<![\w./<>*-])(?:[\w.-]+/)+[\w.-]+\.(?:py|md|ya?ml|toml|png)(?!\w)")
_ELSEWHERE = ("build/", "site/")  # made by a make target; in the image
_TEST = re.compile(r"(?<![\w./-])(test_\w+)(?:\.py)?(?![\w/])")
_LINK = re.compile(r"\]\(([^):#]*)(?:#([^)]+))?\)")


def missing_files(text: str) -> list[str]:
    """The paths of files that `text` names and that do not exist."""
    return sorted(
        name
        for name in set(_FILE.findall(text))
        if not name.startswith(_ELSEWHERE)
        and not any((ROOT / start / name).exists() for start in ("", "job", "tests", "docs"))
    )


def missing_tests(text: str) -> list[str]:
    """The names of test files without a folder, and of tests, that `text` names and nobody has."""
    paths = list(ROOT.glob("tests/**/test_*.py"))
    known = {path.stem for path in paths}
    for path in paths:
        known.update(re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE))
    return sorted(set(_TEST.findall(text)) - known)


def broken_links(page: Path, text: str) -> Iterator[str]:
    """The links of `page` whose file, or whose heading in it, does not exist."""
    for target, heading in _LINK.findall(text):
        path = page.parent / target if target else page
        if not path.exists() or (heading and heading not in _headings(path)):
            yield f"{target}#{heading}" if heading else target


def _headings(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", [*PAGES, *OTHERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_is_named_exists(path: Path) -> None:
    assert missing_files(path.read_text()) == []
    assert missing_tests(path.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"https?://[^)\s]*", "", page.read_text())
    assert list(broken_links(page, text)) == []


def test_the_table_of_contents_links_every_page() -> None:
    contents = (ROOT / "docs/README.md").read_text()
    linked = {target for target, _ in _LINK.findall(contents)}
    pages = {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"}
    assert sorted(pages - linked) == []
    assert "](docs/README.md)" in (ROOT / "README.md").read_text()


def test_every_sentence_of_the_runbook_has_a_test() -> None:
    """What a service says is tested against a server or a client that says it."""
    tests = "".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))
    joined = re.sub(r'"\s*\n\s*"', "", tests)  # sentences of several lines
    assert len(RUNBOOK_ROWS) > 50
    assert [said for said in RUNBOOK_ROWS if said not in joined] == []


def test_what_is_missing_is_seen() -> None:
    assert missing_files("see `job/gone.py` and job/errors.py, store/pace.py") == ["job/gone.py"]
    assert missing_tests("`test_lease`, `test_publisher` and test_gone.py") == [
        "test_gone",
        "test_publisher",
    ]
    page = ROOT / "README.md"
    text = "[a](docs/gone.md) [b](docs/runbook.md#exit-codes) [c](docs/runbook.md#gone)"
    assert list(broken_links(page, text)) == ["docs/gone.md", "docs/runbook.md#gone"]
