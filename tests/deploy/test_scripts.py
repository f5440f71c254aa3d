"""The Python inside the scripts of .ci/ imports what there is.

`pytest tests/deploy/test_scripts.py`
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from tests.deploy.job_controller import ROOT

PROGRAMS = re.findall(
    r"python \"\$image\" -c '\n(.*?)'", (ROOT / ".ci/smoke").read_text(), re.DOTALL
)


def test_there_is_such_a_program() -> None:
    assert PROGRAMS


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_name_that_a_program_imports_is_in_its_module(program: str) -> None:
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("job", "tests")):
            spec = importlib.util.find_spec(str(node.module))
            assert spec is not None, node.module
            assert spec.origin is not None
            tree = ast.parse(Path(spec.origin).read_text())
            names = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
            assert {alias.name for alias in node.names} <= names, node.module
