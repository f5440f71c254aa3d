"""Finds the demo's base model in the cache, or pre-trains it now."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from job.demo.docstrings import read_corpus
from job.demo.pretraining import PretrainingPlan, pretrain
from job.store.base import file_sha256

# Raise it when the code, but no number of `PretrainingPlan`, changes the weights.
PLAN_VERSION = 1
DONE_MARKER = "base.json"  # written last, and only then is the folder given its name


@dataclass(frozen=True)
class BaseInfo:
    """A base model that `AutoModelForCausalLM` and `AutoTokenizer` load from `model_dir`."""

    model_dir: Path
    steps: int
    held_out_loss_before: float
    held_out_loss_after: float
    seconds: float  # what the pre-training took, then or now
    was_cached: bool


def ensure_base(
    cache_dir: Path,
    *,
    on_progress: Callable[[int, int, float], None] | None = None,
    plan: PretrainingPlan | None = None,
) -> BaseInfo:
    """Return the base model for this Python, torch and plan; pre-train it if there is none yet.

    `on_progress` is called after each optimizer step with the step, the planned steps and the
    train loss. An interrupted call leaves nothing behind that a later one takes for a model.
    Raises DataError without the sources of Python's standard library.
    """
    plan = plan or PretrainingPlan()
    text = read_corpus().text
    model_dir = cache_dir / f"base-{_cache_key(text, plan)}"
    if (info := _finished(model_dir)) is not None:
        return info
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".base-", dir=cache_dir) as temporary:
        building_dir = Path(temporary) / "model"
        building_dir.mkdir()
        start = time.monotonic()
        losses = pretrain(text, building_dir, plan, on_progress=on_progress)
        marker = {
            "steps": plan.num_steps,
            "held_out_loss_before": losses.held_out_before,
            "held_out_loss_after": losses.held_out_after,
            "seconds": time.monotonic() - start,
            "files": {path.name: file_sha256(path) for path in sorted(building_dir.iterdir())},
        }
        (building_dir / DONE_MARKER).write_text(json.dumps(marker, indent=1))
        _publish(building_dir, model_dir)
    info = _finished(model_dir)
    assert info is not None
    return BaseInfo(**{**asdict(info), "was_cached": False})


def _cache_key(text: tuple[str, ...], plan: PretrainingPlan) -> str:
    """A digest of everything that decides the weights."""
    parts = {
        "recipe_version": PLAN_VERSION,
        "recipe": asdict(plan),
        "text_sha256": hashlib.sha256("\n".join(text).encode()).hexdigest(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "machine": platform.machine(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _finished(model_dir: Path) -> BaseInfo | None:
    """The model in `model_dir`, or None where it is missing, unfinished or damaged."""
    marker_path = model_dir / DONE_MARKER
    try:
        marker = json.loads(marker_path.read_text())
    except (FileNotFoundError, ValueError):  # ValueError: cut short when the machine went down
        return None
    for name, sha256 in marker.pop("files").items():
        path = model_dir / name
        if not path.is_file() or file_sha256(path) != sha256:
            return None
    return BaseInfo(model_dir=model_dir, was_cached=True, **marker)


def _publish(building_dir: Path, model_dir: Path) -> None:
    """Rename `building_dir`, unless another process has published the same model meanwhile."""
    if _finished(model_dir) is not None:
        return
    shutil.rmtree(model_dir, ignore_errors=True)  # damaged
    try:
        building_dir.rename(model_dir)
    except OSError:  # not empty: another process was faster
        if _finished(model_dir) is None:
            raise
