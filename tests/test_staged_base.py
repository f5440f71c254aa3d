"""A base staged once, taken by every worker, never wrong. `pytest tests/test_staged_base.py`

The hub is tests/servers/hub.py. What asks it runs in a process of its own, because the client reads
its variables at import; a worker's process has a HOME, and so a cache, of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from job.base_model import BaseModel
from job.errors import SettingsError
from job.ledger.garbage import collect
from job.ledger.ledger import Ledger
from job.process.workspace import filling
from job.progress import size
from job.staged_base import fetch_weights, find_staged, resolve_base, staged_key
from job.store.local import LocalStore
from tests import forked
from tests.ledger.documents import make_identity
from tests.servers.hub import COMMIT, Hub, hub_server
from tests.test_weights import weights
from tests.tiny_tokenizer import byte_level_tokenizer
from tests.workers import wait_for

ROOT = Path(__file__).parent.parent
NAME = "owner/model"
TAKE = """
import sys
from pathlib import Path
from job.log import set_up_logging
from job.staged_base import resolve_base
from job.store.local import LocalStore
set_up_logging("text")
out, name, revision, work = sys.argv[1:]
base = resolve_base(LocalStore(Path(out)), name, revision, Path(work),
                    outage_seconds=0.5, should_stop=lambda: None)
print(base.location, base.revision, base.hub_revision)
"""
FETCH = """
import sys
from pathlib import Path
from job.base_model import BaseModel
from job.staged_base import fetch_weights
name, commit, work, told = sys.argv[1:]
fetch_weights(BaseModel(name, name, commit, {}), Path(work), outage_seconds=60,
              should_stop=Path(told).touch)
"""
FILES = {
    "config.json": json.dumps({"model_type": "llama"}).encode(),
    "model-00001-of-00002.safetensors": weights(b"x"),
    "model-00002-of-00002.safetensors": weights(b"y"),
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors",
                        "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "tokenizer.json": b"{}",
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
LEFT_OUT = ["consolidated.safetensors", "pytorch_model.bin", "README.md", "original/x.safetensors"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as hub:
        left_out = {name: weights(b"z") for name in LEFT_OUT}
        hub.repositories[f"models/{NAME}"] = {**FILES, **left_out}
        yield hub


class Place:
    """A bucket, and machines with empty disks."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.folder, self.hub = folder, hub
        self.store = LocalStore(folder / "out")
        self.key = staged_key(NAME, COMMIT)

    def environ_of(self, machine: str, **environ: str) -> dict[str, str]:
        home = self.folder / machine
        home.mkdir(exist_ok=True)
        return {
            "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(home),
            "HF_HOME": str(home / "hf"), "HF_ENDPOINT": self.hub.endpoint, **environ,
        }  # fmt: skip

    def stage(
        self, machine: str = "laptop", *options: str, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        settings = {
            "JOB_BASE_MODEL": NAME, "JOB_OUTPUT_URI": str(self.folder / "out"),
            "JOB_SWEEP_NAME": "s", "JOB_OUTAGE_MINUTES": "0.01",
            "JOB_WORK_DIR": str(self.folder / machine), **environ,
        }  # fmt: skip
        return _run(
            [sys.executable, "-m", "job", "stage", *options], self.environ_of(machine, **settings)
        )

    def take(
        self, machine: str = "worker", revision: str = COMMIT, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        work = self.folder / machine / "work"
        arguments = [str(self.folder / "out"), NAME, revision, str(work)]
        return _run([sys.executable, "-c", TAKE, *arguments], self.environ_of(machine, **environ))

    def object(self, file: str) -> Path:
        return self.folder / "out" / self.key / file


def _run(command: list[str], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return forked.run(command, env=environ, cwd="/", timeout=120)


@pytest.fixture
def place(tmp_path: Path, hub: Hub) -> Place:
    return Place(tmp_path, hub)


@pytest.mark.slow
def test_a_staged_base_is_taken_by_a_worker_that_reaches_no_hub(place: Place) -> None:
    done = place.stage()
    assert done.returncode == 0, done.stderr
    assert (
        f"5 files sent, 0 were there, every sha256 holds; with JOB_BASE_MODEL_REVISION={COMMIT}"
        in (done.stderr + done.stdout)
    )
    staged = find_staged(place.store, NAME, COMMIT)
    assert staged is not None
    assert set(staged.files) == set(FILES), "one copy of the weights, nothing that is not loaded"
    place.hub.asked.clear()
    taken = place.take()
    assert taken.returncode == 0, taken.stderr
    location, revision, hub_revision = taken.stdout.split()
    assert (revision, hub_revision) == (COMMIT, "None"), "the sweep's identity stays the hub's"
    assert {path.name: path.read_bytes() for path in Path(location).iterdir()} == FILES
    assert place.hub.asked_about(NAME) == []
    inodes = [path.stat().st_ino for path in sorted(Path(location).iterdir())]
    again = place.take()
    assert "from" not in again.stderr, "what is on this disk is not fetched again"
    assert inodes == [path.stat().st_ino for path in sorted(Path(location).iterdir())]


@pytest.mark.slow
def test_main_is_asked_of_the_hub_and_then_taken_from_the_bucket(place: Place) -> None:
    place.stage()
    place.hub.asked.clear()
    taken = place.take(revision="main")
    assert taken.stdout.split()[1:] == [COMMIT, "None"]
    assert place.hub.asked_about("safetensors") == []


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flipped", "missing", "manifest", "names", "another"])
def test_what_is_not_as_written_is_left_and_the_hub_asked(place: Place, damage: str) -> None:
    place.stage()
    shard = place.object("model-00002-of-00002.safetensors")
    manifest = place.object("manifest.json")
    if damage == "flipped":
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    elif damage == "missing":
        shard.unlink()
    elif damage == "manifest":
        manifest.write_text('{"files": 3}')
    elif damage == "another":
        manifest.write_text(manifest.read_text().replace(NAME, "owner/other"))
    else:
        manifest.write_text(manifest.read_text().replace("tokenizer.json", "../tokenizer.json"))
    taken = place.take()
    assert taken.stdout.split() == [NAME, COMMIT, COMMIT], taken.stderr
    assert "job stage" in taken.stderr or "is damaged" in taken.stderr
    assert not list((place.folder / "worker").rglob(".part-*"))
    if damage in ("flipped", "missing"):
        mended = place.stage()
        assert "1 files sent, 4 were there" in mended.stderr + mended.stdout
        assert place.take(machine="another").stdout.split()[2] == "None"


@pytest.mark.slow
def test_a_program_is_told_what_lies_where_as_the_schema_says(place: Place) -> None:
    schema = json.loads((Path(__file__).parents[1] / "docs/verbs.schema.json").read_text())
    content = json.loads(place.stage("laptop", "--json").stdout)
    Draft202012Validator({"$ref": "#/$defs/stage", "$defs": schema["$defs"]}).validate(content)
    again = json.loads(place.stage("laptop", "--json").stdout)
    assert (content["files_sent"], again["files_sent"]) == (content["files"], 0)
    assert again | {"files_sent": content["files_sent"]} == content


def test_staging_goes_on_where_an_earlier_one_ended(place: Place) -> None:
    """Two files are there, one of them cut by a store that is no store of ours; no manifest."""
    for file in ("config.json", "model-00001-of-00002.safetensors"):
        (place.folder / "f").write_bytes(FILES[file][: None if "config" in file else 50])
        place.store.upload(f"{place.key}/{file}", place.folder / "f")
    assert place.take().stdout.split() == [NAME, COMMIT, COMMIT], "not whole: nobody takes it"
    done = place.stage()
    assert "4 files sent, 1 were there" in done.stderr + done.stdout
    assert place.take(machine="another").stdout.split()[2] == "None"
    assert "0 files sent, 5 were there" in (again := place.stage()).stderr + again.stdout


@pytest.mark.slow
def test_two_at_once_leave_one_whole_copy(place: Place) -> None:
    done: list[subprocess.CompletedProcess[str]] = []
    threads = [
        threading.Thread(target=lambda m=machine: done.append(place.stage(m)))
        for machine in ("laptop", "desktop")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    assert place.take().stdout.split()[2] == "None"


@pytest.mark.slow
def test_what_the_hubs_cache_holds_is_not_fetched_from_the_bucket(place: Place) -> None:
    place.stage()
    taken = place.take(machine="laptop")
    assert taken.stdout.split() == [NAME, COMMIT, COMMIT]
    assert "from" not in taken.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environ", "code", "says"),
    [
        ({"JOB_BASE_MODEL": "s3://bucket/model"}, 64, "is no model of the Hugging Face hub"),
        ({"JOB_BASE_MODEL": "owner/absent"}, 64, "neither a path here nor on the Hugging Face hub"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, 74, "cannot be reached"),
    ],
)
def test_what_cannot_be_staged_is_told(
    place: Place, environ: dict[str, str], code: int, says: str
) -> None:
    done = place.stage(**environ)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert list(place.store.list("bases/")) == []


@pytest.mark.parametrize(
    "index", ["{", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": []}}']
)
def test_a_damaged_index_in_the_hubs_cache_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    folder = tmp_path / "hf" / f"models--{NAME.replace('/', '--')}" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder / "model.safetensors.index.json").write_text(index)
    base = BaseModel(NAME, NAME, COMMIT, {})
    with pytest.raises(SettingsError, match=r"model\.safetensors\.index\.json: names no weights"):
        fetch_weights(base, tmp_path, outage_seconds=1, should_stop=lambda: None)


class SlowStore(LocalStore):
    """Notes each download of a worker; only the second one to come is not held up."""

    def __init__(self, folder: Path, worker: str) -> None:
        super().__init__(folder / "out")
        self._folder, self._worker = folder, worker

    def download(self, key: str, path: Path) -> None:
        with (self._folder / "downloads").open("a") as file:
            file.write(f"{self._worker} {key.rpartition('/')[2]}\n")
        if self._worker != "second" and key.endswith(".safetensors"):
            is_killed = self._worker == "killed"
            _until(lambda: not is_killed and (self._folder / "waited").exists())
        super().download(key, path)

    def take(self) -> None:
        """Take the base and leave; as a worker that is the second to come, tell of each wait."""
        told = self._folder / "waited"
        resolve_base(
            self, NAME, COMMIT, self._folder / "work", outage_seconds=60,
            should_stop=told.touch if self._worker == "second" else lambda: None,
        )  # fmt: skip


def _until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _fork(act: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return pid


@pytest.mark.parametrize("is_killed", [False, True])
def test_of_two_workers_on_one_disk_one_fetches_and_the_other_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_killed: bool
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    store, key = LocalStore(tmp_path / "out"), staged_key(NAME, COMMIT)
    for file, data in FILES.items():
        store.put_if_absent(f"{key}/{file}", data)
    files = {f: {"bytes": len(d), "sha256": sha256(d).hexdigest()} for f, d in FILES.items()}
    manifest = {"base_model": NAME, "revision": COMMIT, "files": files}
    store.put_if_absent(f"{key}/manifest.json", json.dumps(manifest).encode())
    log = tmp_path / "downloads"
    first = _fork(SlowStore(tmp_path, "killed" if is_killed else "first").take)
    _until(lambda: log.exists() and ".safetensors" in log.read_text())
    second = _fork(SlowStore(tmp_path, "second").take)
    if is_killed:
        _until((tmp_path / "waited").exists)
        os.kill(first, signal.SIGKILL)
    assert wait_for(first) == (-signal.SIGKILL if is_killed else 0)
    assert wait_for(second) == 0
    (folder,) = (path for path in (tmp_path / "work/models").iterdir() if path.is_dir())
    whole = {path.name: path.read_bytes() for path in folder.iterdir() if path.name in FILES}
    assert whole == FILES
    fetched = Counter(line.split()[1] for line in log.read_text().splitlines())
    twice = {file for file, times in fetched.items() if times > 1}
    assert set(fetched) == set(FILES)
    assert len(twice) == is_killed, "only the file at which the first one was killed"


@pytest.mark.slow
def test_a_hubs_weights_are_waited_for_as_well(place: Place) -> None:
    """The hub's client would wait without a sign of life, which the watchdog takes for a hang."""
    home, told = place.folder / "worker", place.folder / "waited"
    folder = home / "work/models" / place.key.rpartition("/")[2]
    arguments = [NAME, COMMIT, str(home / "work")]
    with contextlib.ExitStack() as waited_for, filling(folder, limit_seconds=1):
        workers = [
            waited_for.enter_context(subprocess.Popen(
                [sys.executable, "-c", FETCH, *arguments, f"{told}-{n}"],
                env=place.environ_of("worker"), cwd="/",
            ))
            for n in range(2)
        ]  # fmt: skip
        for n in range(2):
            _until(Path(f"{told}-{n}").exists)
        assert place.hub.asked_about(NAME) == []
    assert [worker.returncode for worker in workers] == [0, 0]
    asked = Counter(path for path in place.hub.asked if path.endswith(".safetensors"))
    assert list(asked.values()) == [2, 2], "of either shard its HEAD and its content, once"
    again = _run(
        [sys.executable, "-c", FETCH, *arguments, str(told)],
        place.environ_of("worker", HF_ENDPOINT="http://127.0.0.1:9"),
    )
    assert again.returncode == 0, "what is in the cache needs no hub"


def test_gc_leaves_a_sweeps_base_and_takes_one_that_none_uses(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    ledger.open_sweep(
        make_identity(
            JOB_BASE_MODEL={"revision": COMMIT}, _base_model=NAME, JOB_DATASET_URI={"prepared": "a"}
        )
    )
    used, unused = staged_key(NAME, COMMIT), staged_key(NAME, "b" * 40)
    for key in (used, unused):
        for file in ("model.safetensors", "manifest.json"):
            ledger.store.put_if_absent(f"{key}/{file}", b"x")
    said: list[str] = []
    for hours in (24.0, 0.0):
        collect(ledger, dry_run=False, old_generations=False, unused_hours=hours, say=said.append)
    assert [line.split(":")[0].split()[-1] for line in said] == [unused, unused]
    assert "kept for now" in said[0]
    assert {key.rpartition("/")[0] for key in ledger.store.list("bases/")} == {used}


def _plan(place: Place) -> str:
    """What `job plan` says of the base, on a machine that has none of its weights."""
    rows = place.folder / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "{a}+1?", "answer": "{a + 1}"}}\n' for a in range(99)))
    environ = place.environ_of(
        "desk",
        JOB_BASE_MODEL=NAME, JOB_DATASET_URI=str(rows), JOB_OUTPUT_URI=str(place.folder / "out"),
        JOB_SWEEP_NAME="s", JOB_NUM_TRIALS="12", JOB_USE_FULL_DATASET="1",
        JOB_WORK_DIR=str(place.folder / "desk/work"), JOB_OUTAGE_MINUTES="0.01",
    )  # fmt: skip
    forked.with_torch()
    done = _run([sys.executable, "-m", "job", "plan", "--json"], environ)
    assert done.returncode == 0, done.stderr
    base: str = json.loads(done.stdout)["sections"]["base"]
    assert base.splitlines()[-1] in done.stderr, "where people read it"
    return base


@pytest.mark.slow
def test_plan_says_what_staging_would_save_and_that_it_is_done(
    place: Place, tmp_path: Path
) -> None:
    byte_level_tokenizer().save_pretrained(tmp_path / "tokenizer")
    files = {path.name: path.read_bytes() for path in (tmp_path / "tokenizer").iterdir()}
    files |= {"config.json": json.dumps(LLAMA).encode(), "model.safetensors": weights(b"x")}
    place.hub.repositories[f"models/{NAME}"] = files
    num_bytes = sum(map(len, files.values()))
    assert f"fetches {size(num_bytes)} from the hub, up to {size(12 * num_bytes)}" in _plan(place)
    place.stage()
    staged = f"staged: workers take its {size(num_bytes)} from {place.store.uri}, not the hub"
    assert staged in _plan(place).splitlines()
