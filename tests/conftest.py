"""What every test shares: one thread, no network, and a clear word on skipped GPU tests."""

from __future__ import annotations

import os

import pytest

# With more threads than idle cores a training step takes ten times longer.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing may be fetched; a test that tries fails at once instead of waiting.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU: run `make test-gpu` on a machine with one")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
