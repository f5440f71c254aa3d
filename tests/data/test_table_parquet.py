"""A table is a file and comes back. `pytest tests/data/test_table_parquet.py`"""

from __future__ import annotations

import collections
import resource
from pathlib import Path

import numpy as np
import pytest

from job.data.samples import SampleTable
from job.data.table_parquet import TableWriter, read_table
from job.data.table_parquet import content_sha256 as file_content_sha256
from job.data.tokens import Sample
from job.errors import OutageError
from tests.data.table_content import content_sha256
from tests.data.test_build import ROWS, build, settings_for, write_lines


@pytest.mark.parametrize("num_samples", [0, 1, 999, 1000, 2001])
def test_a_table_survives_its_file_in_any_number_of_row_groups(
    tmp_path: Path, num_samples: int
) -> None:
    rng = np.random.default_rng(num_samples)
    samples = []
    for length in rng.integers(2, 9, num_samples):
        is_target = rng.random(length) < 0.5
        is_target[0] = False
        ids = rng.integers(0, 32_000, length, dtype=np.int32)
        samples.append(Sample(ids, is_target, truncated=False))
    for name in ("a", "b"):
        writer = TableWriter(tmp_path / name)
        for sample in samples:
            writer.add(sample)
        writer.close()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    expected = SampleTable.concatenate(
        [sample.input_ids for sample in samples], [sample.is_target for sample in samples]
    )
    again = read_table(tmp_path / "a")
    assert again.input_ids.tolist() == expected.input_ids.tolist()
    assert again.is_target.tolist() == expected.is_target.tolist()
    assert (again.input_ids.dtype, again.is_target.dtype) == (np.int32, np.bool_)
    assert again.offsets.tolist() == expected.offsets.tolist()
    assert file_content_sha256(writer.lengths, tmp_path / "b") == content_sha256(expected)


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path: Path) -> None:
    writer = TableWriter(tmp_path / "whole")
    writer.add(Sample(np.arange(20_000, dtype=np.int32), np.arange(20_000) > 0, truncated=False))
    writer.close()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))  # EFBIG, the nearest to a full disk
    sample = Sample(np.arange(5000, dtype=np.int32), np.arange(5000) > 0, truncated=False)
    broken = TableWriter(tmp_path / "broken")
    try:
        with pytest.raises(OutageError, match="JOB_WORK_DIR.*free disk space"):
            read_table(tmp_path / "whole")
        with pytest.raises(OutageError, match="JOB_WORK_DIR.*free disk space"):
            collections.deque(map(broken.add, [sample] * 1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    broken.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_the_content_of_a_table_is_pinned(tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", ROWS)
    """As it was when tables were still written at once: running sweeps name it."""
    train, held_out, _ = build(settings_for(rows))
    assert (
        content_sha256(train) == "cacdd58ef57bccdfd9f08bf1aad3e61832b970fe2a99f4578a4d26eeb90a304c"
    )
    assert (
        content_sha256(held_out)
        == "cbf348b7a120f32a08863f3c8a76f3f2985384475ade38739e2bb6e88dc2fddc"
    )
