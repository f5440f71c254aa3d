"""SIGKILL before and after every single store write of a trial.

`pytest tests/trial/test_faults.py`
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from job.ledger.ledger import Ledger
from job.store.base import Store, Stored
from job.store.local import LocalStore
from job.trial.train import real_training
from tests.tiny_model import make_base
from tests.workers import check_accounts, make_inputs, start_worker, wait_for

pytestmark = pytest.mark.slow


class KillingStore:
    """A store whose n-th write to keys that match kills the process, before or after it."""

    def __init__(self, store: Store, kill_at: int, *, after: bool, pattern: str = "") -> None:
        self._store = store
        self._kill_at = kill_at
        self._after = after
        self._pattern = re.compile(pattern)
        self._writes = 0

    @property
    def uri(self) -> str:
        return self._store.uri

    def get(self, key: str) -> Stored | None:
        return self._store.get(key)

    def download(self, key: str, path: Path) -> None:
        self._store.download(key, path)

    def list(self, prefix: str) -> Iterator[str]:
        return self._store.list(prefix)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return bool(self._write(self._store.put_if_absent, key, data))

    def put_if_version(self, key: str, data: bytes, version: str) -> bool:
        return bool(self._write(self._store.put_if_version, key, data, version))

    def upload(self, key: str, path: Path) -> None:
        self._write(self._store.upload, key, path)

    def delete(self, key: str) -> None:
        self._write(self._store.delete, key)

    def _write(self, operation: Any, *arguments: Any) -> Any:
        self._writes += bool(self._pattern.search(arguments[0]))
        here = self._writes == self._kill_at and self._pattern.search(arguments[0])
        if here and not self._after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = operation(*arguments)
        if here:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def _run(inputs: dict[str, Any], out: Path, kill_at: int, *, after: bool) -> int:
    settings = inputs | {
        "output_uri": str(out),
        "num_trials": 1,
        "completion_index": 0,
        "max_steps": 8,
        "evals_per_trial": 2,
    }
    return wait_for(
        start_worker(settings, lambda: KillingStore(LocalStore(out), kill_at, after=after))
    )


def _documents(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    slot = out / "sweeps/s/slots/0000"
    spec, result = (json.loads((slot / f"{n}.json").read_text()) for n in ("spec", "result"))
    assert not list(slot.glob("result.json.v*")), "committed once"
    return spec, result


def _facts(spec: dict[str, Any], result: dict[str, Any]) -> list[Any]:
    """All that a trial computed, without what differs between attempts: time, cost, owner."""
    parts = [spec[key] for key in ("params", "recipe", "data_digest")]
    return parts + [
        result[key]
        for key in ("status", "eval_loss", "best_step", "steps", "curve", "params",
                    "adapter_key", "adapter_sha256", "rows_key", "history_key")
    ]  # fmt: skip


def test_sigkill_at_every_write_boundary_ends_in_one_equal_commit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = make_inputs(tmp_path)
    assert _run(inputs, tmp_path / "calm", 10**9, after=False) == 0
    expected = _facts(*_documents(tmp_path / "calm"))
    killed = boundaries = 0
    for after in (False, True):
        for kill_at in range(1, 200):
            out = tmp_path / f"out-{kill_at}-{after}"
            code = _run(inputs, out, kill_at, after=after)
            if code == 0:
                break  # fewer writes than that: every boundary was met
            assert code == -signal.SIGKILL, (kill_at, after, code)
            killed += 1
            spec_path = out / "sweeps/s/slots/0000/spec.json"
            spec_before = spec_path.read_bytes() if spec_path.exists() else None
            assert _run(inputs, out, 10**9, after=False) == 0, (kill_at, after)
            assert _facts(*_documents(out)) == expected, (kill_at, after)
            check_accounts(Ledger(LocalStore(out), "s"), 0)
            if spec_before is not None:
                assert spec_path.read_bytes() == spec_before, (kill_at, after)
            leftovers = list((out / "sweeps/s/slots/0000").rglob("checkpoints/*/manifest.json"))
            assert len(leftovers) <= 2, "at most what one killed attempt left unnamed"
        boundaries = max(boundaries, kill_at - 1)
    with capsys.disabled():
        print(f"\n  SIGKILL at {killed} write boundaries ({boundaries} writes): 1 commit each")
    assert boundaries > 15


BOUNDARIES = [
    ("before the spec", r"spec\.json", 1, False),
    ("after the spec", r"spec\.json", 1, True),
    ("in the middle of a checkpoint", r"checkpoints/.*/optimizer", 2, False),
    ("after a checkpoint, before the lease names it", r"checkpoints/.*/manifest", 2, True),
    ("in the middle of a best adapter", r"adapter-.*/manifest", 2, False),
    ("before the result", r"result\.json", 1, False),
    ("after the result", r"result\.json", 1, True),
]


@pytest.fixture(scope="module")
def real_inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Inputs as those of the fake training, with a base that can be loaded."""
    import job.training.fit  # noqa: F401 - imported once, before the workers are forked

    folder = tmp_path_factory.mktemp("real")
    inputs = make_inputs(folder)
    make_base(folder / "base", vocab_size=600)
    return inputs | {"device": "cpu", "lora_dropout": 0.1, "max_steps": 12, "lease_seconds": 1.0}


# Modes beside the default, each at one boundary: the ledger does not know how weights are held.
CASES = [
    *((boundary, "nf4") for boundary in BOUNDARIES),
    (BOUNDARIES[2], "none"),
    (BOUNDARIES[4], "mixed:down_proj,v_proj"),
]


def _run_real(inputs: dict[str, Any], out: Path, store: Any, mode: str) -> int:
    settings = inputs | {"output_uri": str(out), "num_trials": 1, "completion_index": 0}
    settings["quantization"] = mode
    return wait_for(start_worker(settings, lambda: store, training=real_training()))


@pytest.fixture(scope="module")
def real_facts(
    real_inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[Any]]:
    """What an uninterrupted trial in a mode computes."""

    @cache
    def facts(mode: str) -> list[Any]:
        out = tmp_path_factory.mktemp("calm")
        assert _run_real(real_inputs, out, LocalStore(out), mode) == 0
        return _real_facts(out)

    return facts


def _real_facts(out: Path) -> list[Any]:
    spec, result = _documents(out)
    facts = _facts(spec, result)[:-1]  # the history holds seconds
    return [*facts, result["quantization"], result["untuned_16bit"]]


@pytest.mark.parametrize(("boundary", "mode"), CASES, ids=[f"{b[0]} in {m}" for b, m in CASES])
def test_real_training_killed_there_gives_the_same_adapter_byte_for_byte(
    tmp_path: Path,
    real_inputs: dict[str, Any],
    real_facts: Callable[[str], list[Any]],
    boundary: tuple[str, str, int, bool],
    mode: str,
) -> None:
    _, pattern, kill_at, after = boundary
    store = KillingStore(LocalStore(tmp_path), kill_at, after=after, pattern=pattern)
    assert _run_real(real_inputs, tmp_path, store, mode) == -signal.SIGKILL
    assert _run_real(real_inputs, tmp_path, LocalStore(tmp_path), mode) == 0
    assert _real_facts(tmp_path) == real_facts(mode)
