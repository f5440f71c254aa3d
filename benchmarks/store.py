"""Our S3 transfers against `aws s3 cp`, on the same local server in one run.

`python -m benchmarks.store --aws PATH`: PATH is the `aws` of an environment of its own. Both sides
start as new processes and take turns. Prints a table; stops if any byte differs.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from job.store import open_store

LARGE_BYTES = 500_000_000
NUM_SMALL, SMALL_BYTES = 2000, 50_000
THREADS = 10  # as many as the AWS CLI takes for many files
LIMIT_SECONDS = 300
FOLDERS = ("large", "small")


def main() -> None:
    arguments = _parse()
    if arguments.transfer:
        direction, uri, folder = arguments.transfer
        _transfer(direction, uri, Path(folder))
        return
    from tests.servers.s3 import moto_server  # not for the process of --transfer

    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        folder = Path(name)
        _write_files(folder)
        with moto_server(folder) as endpoint:
            use(endpoint)
            seconds = _measure(folder, arguments.aws, arguments.rounds)
    version = subprocess.run(
        [arguments.aws, "--version"], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    _print(seconds, version.split()[0], arguments.rounds)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--aws", default="aws", help="the AWS CLI's executable")
    parser.add_argument("--rounds", type=int, default=3, help="of each side; medians are shown")
    parser.add_argument("--dir", help="where the files are written")
    parser.add_argument("--transfer", nargs=3, help=argparse.SUPPRESS)  # our side, in a process
    return parser.parse_args()


def _measure(
    folder: Path, aws: str, rounds: int
) -> dict[tuple[str, str, str], list[tuple[float, float]]]:
    """Wall and CPU seconds of every round, by what is moved, direction and side."""
    seconds: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    sides = [("ours", our_command), ("aws s3 cp", aws_command(aws))]
    for _ in range(rounds):
        sides.reverse()  # who goes first also waits for what the disk has not written yet
        for what in FOLDERS:
            for side, command in sides:
                uri = f"s3://trials/{side.split()[0]}/{what}"
                back = folder / "back"
                shutil.rmtree(back, ignore_errors=True)
                back.mkdir()
                for direction, files in (("up", folder / what), ("down", back)):
                    started, cpu_started = time.monotonic(), children_seconds()
                    subprocess.run(
                        command(direction, uri, files), check=True, timeout=LIMIT_SECONDS
                    )
                    took = time.monotonic() - started
                    rows = seconds.setdefault((what, direction, side), [])
                    rows.append((took, children_seconds() - cpu_started))
                _compare(folder / what, back)
    return seconds


def children_seconds() -> float:
    """CPU seconds of the clients so far; the server still runs and is not in it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def our_command(direction: str, uri: str, files: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.store", "--transfer", direction, uri, str(files)]


def aws_command(aws: str) -> Callable[[str, str, Path], list[str]]:
    def command(direction: str, uri: str, files: Path) -> list[str]:
        places = (str(files), uri) if direction == "up" else (uri, str(files))
        return [aws, "s3", "cp", "--recursive", "--only-show-errors", *places]

    return command


def _transfer(direction: str, uri: str, folder: Path) -> None:
    """Move every file of a folder, some at once, as publishing a folder's files would."""
    store = open_store(uri)
    with ThreadPoolExecutor(THREADS) as threads:
        if direction == "up":
            moves = [threads.submit(store.upload, p.name, p) for p in sorted(folder.iterdir())]
        else:
            moves = [threads.submit(store.download, k, folder / k) for k in store.list("")]
        for move in moves:
            move.result()


def _write_files(folder: Path) -> None:
    for what in FOLDERS:
        (folder / what).mkdir()
    (folder / "large/object.bin").write_bytes(os.urandom(LARGE_BYTES))
    for number in range(NUM_SMALL):
        (folder / f"small/{number:04d}.bin").write_bytes(os.urandom(SMALL_BYTES))


def _compare(sent: Path, back: Path) -> None:
    names = [path.name for path in sent.iterdir()]
    _, differing, missing = filecmp.cmpfiles(sent, back, names, shallow=False)
    if differing or missing:
        raise SystemExit(f"{len(differing)} files differ, {len(missing)} are missing")


def use(endpoint: str) -> None:
    from tests.servers.s3 import ACCESS_KEY, SECRET_KEY

    os.environ |= {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
    }


def _print(
    seconds: dict[tuple[str, str, str], list[tuple[float, float]]], peer: str, rounds: int
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=100, highlight=False)
    console.print(
        f"{time.strftime('%Y-%m-%d', time.gmtime())}: {platform.machine()}, {os.cpu_count()} cores,"
        f" Python {platform.python_version()}, {peer}, moto's server, medians of {rounds}"
    )
    columns = ("what", "ours s", "theirs s", "ratio", "ours CPU s", "theirs CPU s")
    table = Table(*columns, box=box.MARKDOWN)
    titles = {"large": "500 MB object", "small": "2,000 objects of 50 kB"}
    for what in FOLDERS:
        for direction in ("up", "down"):
            ours, our_cpu = _medians(seconds[what, direction, "ours"])
            theirs, their_cpu = _medians(seconds[what, direction, "aws s3 cp"])
            numbers = (ours, theirs, theirs / ours, our_cpu, their_cpu)
            table.add_row(f"{titles[what]}, {direction}", *(f"{n:.2f}" for n in numbers))
    console.print(table)


def _medians(rounds: list[tuple[float, float]]) -> tuple[float, ...]:
    return tuple(statistics.median(column) for column in zip(*rounds, strict=True))


if __name__ == "__main__":
    main()
