"""What docs/runbook.md says of a sentence that a person may see."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/runbook.md").read_text()
# | `the sentence` | code | way out |; a code per place where they differ: 65 (rows), 64
ROWS = {
    said: {int(code) for code in re.findall(r"\b\d\d?\b", codes)}
    for said, codes in re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", TEXT, re.MULTILINE)
}


def check_row(said: str, code: int) -> None:
    """Fail unless the runbook has a row for what a service said, with this exit code."""
    rows = {row: codes for row, codes in ROWS.items() if row in said}
    assert rows, f"docs/runbook.md has no row for {said!r}"
    assert any(code in codes for codes in rows.values()), (code, rows)
