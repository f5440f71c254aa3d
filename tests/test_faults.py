"""SIGKILL before and after every single store write of a trial. `pytest tests/test_faults.py`"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from job.store.base import Store, Stored
from job.store.local import LocalStore
from tests.workers import make_inputs, start_worker, wait_for

pytestmark = pytest.mark.slow


class KillingStore:
    """A store whose n-th write kills the process, before or after it is applied."""

    def __init__(self, store: Store, kill_at: int, *, after: bool) -> None:
        self._store = store
        self._kill_at = kill_at
        self._after = after
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
        self._writes += 1
        here = self._writes == self._kill_at
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


def _course(spec: dict[str, Any], result: dict[str, Any]) -> list[Any]:
    parts = [spec[key] for key in ("params", "recipe", "data_digest")]
    return parts + [
        result[key]
        for key in ("status", "eval_loss", "best_step", "steps", "curve", "params",
                    "adapter_key", "adapter_sha256", "history_key")
    ]  # fmt: skip


def test_sigkill_at_every_write_boundary_ends_in_one_equal_commit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = make_inputs(tmp_path)
    assert _run(inputs, tmp_path / "calm", 10**9, after=False) == 0
    expected = _course(*_documents(tmp_path / "calm"))
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
            assert _course(*_documents(out)) == expected, (kill_at, after)
            if spec_before is not None:
                assert spec_path.read_bytes() == spec_before, (kill_at, after)
            leftovers = list((out / "sweeps/s/slots/0000").rglob("checkpoints/*/manifest.json"))
            assert len(leftovers) <= 2, "at most what one killed attempt left unnamed"
        boundaries = max(boundaries, kill_at - 1)
    with capsys.disabled():
        print(f"\n  SIGKILL at {killed} write boundaries ({boundaries} writes): 1 commit each")
    assert boundaries > 15
