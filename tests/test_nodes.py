"""What nodes do to a trial: volumes, users, locales, signals. `pytest tests/test_nodes.py`

Each test starts the real command in a process of its own. Those that need another user, a small
volume or a process 1 of their own are skipped where this user may not make one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runbook import check_row
from tests.volumes import small_volume

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
USER = 4_242_424  # has no passwd entry, as OpenShift's random ones


def _environ(folder: Path, **environ: str) -> dict[str, str]:
    """The least that a container gives, and a trial that ends soon: its base is no model."""
    (folder / "rows.jsonl").write_text('{"question": "a?", "answer": "b"}\n')
    (folder / "base").mkdir(exist_ok=True)
    return {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "USER": "job", "JOB_DEVICE": "cpu",
        "JOB_DATASET_URI": str(folder / "rows.jsonl"), "JOB_BASE_MODEL": str(folder / "base"),
        "JOB_OUTPUT_URI": str(folder / "out"), "JOB_WORK_DIR": str(folder / "work"),
        "JOB_LOG_FORMAT": "text", **environ,
    }  # fmt: skip


# Another user that may read everything (this one's Python may lie in a private folder) and write
# nothing that is not its own.
AS_USER = [
    "setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups",
    "--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search", "--",
]  # fmt: skip


def _can_be_another() -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run([*AS_USER, "true"], check=False, capture_output=True).returncode == 0
    return False


as_root = pytest.mark.skipif(not _can_be_another(), reason="needs the right to be another user")


def _job(*words: str, other_user: bool = False, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*(AS_USER if other_user else ()), sys.executable, "-m", "job", *words],
        env=environ, cwd="/", capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


BASE_LINE = "JOB_BASE_MODEL: "  # the trial came as far as its base


@as_root
@pytest.mark.parametrize("verb", ["run", "queue", "plan"])
def test_a_random_user_without_a_passwd_entry_can_work(tmp_path: Path, verb: str) -> None:
    environ = _environ(tmp_path, HOME=str(tmp_path / "work"), JOB_NUM_TRIALS="1")
    for name in ("work", "out"):
        (tmp_path / name).mkdir(mode=0o777)
        (tmp_path / name).chmod(0o777)
    done = _job(verb, other_user=True, **environ)
    assert done.returncode == 64, done.stderr
    assert BASE_LINE in done.stderr


WORK = {
    "foreign": (64, "cannot be written (Permission denied)"),
    "missing below a foreign one": (64, "cannot be written (Permission denied)"),
    "a file": (64, "cannot be written (it is a file)"),
    "below a file": (64, "cannot be written (Not a directory)"),
}


@as_root
@pytest.mark.parametrize("wandb", [False, True], ids=["", "with W&B"])
@pytest.mark.parametrize("name", WORK)
def test_a_work_folder_that_is_no_place_is_a_setting(
    tmp_path: Path, name: str, wandb: bool
) -> None:
    work, (code, says) = tmp_path / "work", WORK[name]
    if "file" in name:
        work.touch()
    else:
        work.mkdir(mode=0o755)
    if name in ("missing below a foreign one", "below a file"):
        work = work / "deeper"
    environ = _environ(tmp_path, JOB_WORK_DIR=str(work), HOME=str(work))
    if wandb:
        environ |= {"WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9",
                    "WANDB_SWEEP_ID": "a/b/c", "JOB_OUTAGE_MINUTES": "0.01"}  # fmt: skip
    (tmp_path / "out").mkdir(mode=0o777)
    (tmp_path / "out").chmod(0o777)
    for verb in ("run", "plan"):
        done = _job(verb, other_user=True, **environ)
        assert done.returncode == code, done.stderr
        assert (says if verb == "run" else "cannot be written (") in done.stderr
        last = done.stderr.splitlines()[-1]
        assert "JOB_WORK_DIR: " in last
        check_row("JOB_WORK_DIR: ", code)


@pytest.fixture
def full_volume(tmp_path: Path) -> Iterator[Path]:
    """A file system of one page that is full; skipped where it may not be mounted."""
    with small_volume(tmp_path / "full", "size=4k", "nr_inodes=2") as folder:
        (folder / "all").write_bytes(bytes(4096))
        yield folder


@pytest.mark.parametrize("verb", ["run", "plan"])
@pytest.mark.parametrize("wandb", [False, True], ids=["", "with W&B"])
def test_a_full_work_folder_is_an_outage(
    tmp_path: Path, full_volume: Path, verb: str, wandb: bool
) -> None:
    environ = _environ(tmp_path, JOB_WORK_DIR=str(full_volume), TMPDIR=str(full_volume))
    if wandb:
        environ |= {"WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9",
                    "WANDB_SWEEP_ID": "a/b/c", "JOB_OUTAGE_MINUTES": "0.01"}  # fmt: skip
    done = _job(verb, **environ)
    assert done.returncode == 74, done.stderr
    assert "JOB_WORK_DIR: " in done.stderr.splitlines()[-1]
    check_row("JOB_WORK_DIR: ", 74)


@pytest.mark.parametrize("verb", ["run", "plan", "report"])
def test_temporary_files_lie_in_the_work_folder_where_there_is_no_other(
    tmp_path: Path, verb: str
) -> None:
    """A stand-in for a read-only root: every folder that Python would try is refused by name."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, tempfile\n"
        "tempfile._candidate_tempdir_list = lambda: [os.environ['TMPDIR']]"
        " if os.path.isdir(os.environ.get('TMPDIR', '')) else ['/proc/none']\n"
    )
    environ = _environ(tmp_path, TMPDIR="/proc/none")
    environ["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{ROOT}"
    done = _job(verb, **environ)
    assert done.returncode == 64, done.stderr
    says = {"report": "no sweep"}.get(verb, BASE_LINE)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


ASCII = {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize(("environ", "log_format"), [
    ({"LC_ALL": "C"}, "text"), ({"LC_ALL": "POSIX"}, "json"), ({"LANG": "C"}, "text"),
    (ASCII, "text"), (ASCII, "json"),
], ids=str)  # fmt: skip
def test_a_locale_without_our_letters_ends_no_line(
    tmp_path: Path, environ: dict[str, str], log_format: str
) -> None:
    folder = tmp_path / "größe—✓"
    folder.mkdir()
    given = _environ(folder, JOB_SWEEP_NAME="s", JOB_LOG_FORMAT=log_format, **environ)
    for verb, code in (("run", 64), ("plan", 64), ("status", 0)):
        done = _job(verb, **given)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr + done.stdout


def _told_to_end(seconds: float, times: int, pause: float, tmp_path: Path) -> int:
    """Start a queue, send so many SIGTERMs after so long, return its code."""
    process = subprocess.Popen(
        [sys.executable, "-m", "job", "queue"], env=_environ(tmp_path), cwd="/",
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    time.sleep(seconds)
    for _ in range(times):
        process.send_signal(signal.SIGTERM)
        time.sleep(pause)
    process.communicate(timeout=60)
    return process.returncode


@pytest.mark.parametrize("pause", [0, 0.002, 0.02])
@pytest.mark.parametrize("seconds", [0.2, 0.5, 1.0])
def test_three_sigterms_in_a_row_end_as_one(tmp_path: Path, seconds: float, pause: float) -> None:
    assert _told_to_end(seconds, 3, pause, tmp_path) == 75


def test_a_signal_that_was_blocked_at_the_start_is_heard(tmp_path: Path) -> None:
    """`env --block-signal` keeps what comes before Python runs; a process 1 would not hear it."""
    script = (
        "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM});"
        "os.kill(os.getpid(), signal.SIGTERM);"
        "os.execv(sys.executable, [sys.executable, '-m', 'job'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=_environ(tmp_path), cwd="/",
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 75
    assert done.stderr == "exit 75 (preempted): told to end before the trial began\n"


def _keeps_sigterm(process: str) -> bool:
    """Whether a SIGTERM sent now is heard: it is blocked, or has a handler.

    Not while `unshare` has it blocked, which lifts that before it becomes `env`.
    """
    if Path(f"/proc/{process}/comm").read_text().strip() == "unshare":
        return False
    lines = dict(
        line.split(":\t") for line in Path(f"/proc/{process}/status").read_text().splitlines()
    )
    return any(int(lines[name], 16) >> (signal.SIGTERM - 1) & 1 for name in ("SigBlk", "SigCgt"))


@as_root
@pytest.mark.parametrize("seconds", [0, 0.01, 0.03, 0.05, 0.1])
def test_process_1_hears_a_sigterm_in_its_first_moments(tmp_path: Path, seconds: float) -> None:
    """In a pid namespace of its own, where signals without a handler are dropped by the kernel.

    Counted from when `env`, the image's entry point, has blocked the signal: a millisecond.
    """
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--"]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to make a pid namespace")
    process = subprocess.Popen(
        [*unshare, "env", "--block-signal=TERM", sys.executable, "-m", "job", "queue"],
        env=_environ(tmp_path), cwd="/", stderr=subprocess.DEVNULL,
    )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 10
    while not (found := children.read_text().split()) or not _keeps_sigterm(found[0]):
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    time.sleep(seconds)
    os.kill(int(found[0]), signal.SIGTERM)
    assert process.wait(60) == 75
