"""The rooms and their import order. `pytest tests/test_layout.py`"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Imports point from right to left only. A room is a module or a package of job/.
ROOMS = [
    "errors",
    "file_uri",
    "environment",
    "log",
    "progress",
    "process",
    "quantization",
    "settings",
    "variables",
    "store",
    "hub",
    "base_model",
    "staged_base",
    "data",
    "ledger",
    "sweep",
    "wandb",
    "training",
    "trial",
    "winner",
    "report",
    "plan",
    "demo",
    "child",
    "supervisor",
    "verbs",
    "cli",
    "__main__",
]
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
TORCH_PACKAGES = {"torch", "peft", "bitsandbytes"}
# Of the training room: what people may ask before they pay for a GPU.
TORCH_FREE = {
    "__init__", "eta", "families", "footprint", "memory", "quantization", "recipe", "shape",
    "state",
}  # fmt: skip
PACKAGE = Path(__file__).parent.parent / "job"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def misplaced_imports(source: str, room: str) -> list[str]:
    """Imports of rooms that stand to the right of `room`."""
    rooms_used = {
        name.split(".")[1] for name in _imports(ast.parse(source)) if name.startswith("job.")
    }
    allowed = ROOMS[: ROOMS.index(room) + 1]
    return sorted(used for used in rooms_used & set(ROOMS) if used not in allowed)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_left(path: Path) -> None:
    assert _room(path) in ROOMS, "a new room needs its place in the order"
    assert misplaced_imports(path.read_text(), _room(path)) == []


def test_an_import_to_the_right_is_seen() -> None:
    assert misplaced_imports("from job.trial.run import run_trial", "ledger") == ["trial"]
    assert misplaced_imports("def f():\n    import job.supervisor", "demo") == ["supervisor"]
    assert misplaced_imports("from job.errors import JobError", "errors") == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_training_imports_torch_at_module_level(path: Path) -> None:
    tree = ast.parse(path.read_text())
    outside_functions = ast.Module([n for n in tree.body if not isinstance(n, ast.FunctionDef)], [])
    outside_functions.body = [n for n in outside_functions.body if not _is_typing_only(n)]
    used = {name.split(".")[0] for name in _imports_at_top(outside_functions)}
    if _room(path) != "training" or path.stem in TORCH_FREE:
        assert not used & TORCH_PACKAGES


def _is_typing_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _imports_at_top(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from _imports(ast.Module([node], []))


def test_no_pickle_and_no_torch_load_anywhere() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            assert name not in ("torch.load", "torch.save"), path
        assert not {"pickle", "dill", "cloudpickle", "joblib"} & {
            name.split(".")[0] for name in _imports(ast.parse(path.read_text()))
        }, path


def private_names(tree: ast.AST) -> list[str]:
    """Names of PyTorch and its like that begin with an underscore: they move without a word."""
    names = [name for name in _imports(tree) if name.split(".")[0] in LIBRARIES]
    names += [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    private = re.compile(r"(torch|bnb|" + "|".join(LIBRARIES) + r")[\w.]*\._(?!_)\w+(\.\w+)*")
    return sorted(name for name in names if private.fullmatch(name))


def test_public_names_of_the_training_libraries_do() -> None:
    for path in MODULES:
        assert private_names(ast.parse(path.read_text())) == [], path
    seen = "from torch._subclasses import x\ntorch.nn.Module._apply\ntorch.__version__"
    assert len(private_names(ast.parse(seen))) == 2


IMPORTED = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
    assert not {"torch", "wandb"} & set(sys.modules), module
"""


def test_what_people_look_at_starts_without_torch() -> None:
    modules = ("job.__main__", "job.supervisor", "job.report", "job.trial.run")
    subprocess.run([sys.executable, "-c", IMPORTED, *modules], timeout=60, check=True)
