"""Batches and their parts: what is left is seen from names, and each row is there once."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from captionserve import GenerationOptions
from captionserve_server.bulk.outputs import read_parquet
from captionserve_server.bulk.parts import Batch, BatchWork, DeadlyBatchError, Parts, batches
from captionserve_server.bulk.run import Progress
from captionserve_server.bulk.sources import Table
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.bulk.fake_captioner import FakeCaptioner, StoppedError


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Ten rows, of which each fifth fails."""
    names = ["bad" if row % 5 == 4 else "image" for row in range(10)]
    rows = [{"image": f"{name} {row}".encode()} for row, name in enumerate(names)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    return tmp_path / "in.parquet"


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path / "out")


def caption(
    parts: Parts, batch: Batch, captioner: FakeCaptioner | None = None, *, retry: bool = False
) -> Progress:
    work = BatchWork(parts, GenerationOptions(), "f" * 16, retry_failed=retry)
    return work.caption(batch, [captioner or FakeCaptioner()])


def captions(part: Path) -> list[str | None]:
    return [row.caption for row in read_parquet(part)]


@given(rows=st.lists(st.integers(0, 60), min_size=1, max_size=4), size=st.integers(1, 25))
def test_each_row_of_each_table_is_in_one_batch(rows: list[int], size: int) -> None:
    tables = {Path(f"/{name}"): Table(count, "") for name, count in enumerate(rows)}
    found = list(batches(tables, size))
    assert [(batch.table, row) for batch in found for row in batch.rows] == [
        (str(path), row) for path, table in tables.items() for row in range(table.rows)
    ]
    assert all(0 < len(batch) <= size for batch in found)
    parts = {Parts(Path("/out")).path(batch) for batch in found}
    assert len(parts) == len(found)


def test_a_part_has_the_rows_of_its_batch(table: Path, parts: Parts) -> None:
    batch = Batch(str(table), 2, 6)
    with parts.attempted():
        done = caption(parts, batch)
    rows = list(read_parquet(parts.path(batch)))
    assert [row.id for row in rows] == ["2", "3", "4", "5"]
    assert [row.caption for row in rows] == ["image 2", "image 3", None, "image 5"]
    assert rows[0].captions == ("image 2",)
    assert rows[2].source == f"{table}#4"
    assert rows[2].error_reason == "UNREADABLE"
    assert (done.seen, done.captioned, done.failed) == (4, 3, {"UNREADABLE": 1})
    assert [path.name for path in parts.folder.iterdir()] == [parts.path(batch).name]


def test_what_has_a_part_is_done(table: Path, parts: Parts) -> None:
    whole, failed, missing = (Batch(str(table), begin, begin + 2) for begin in (0, 4, 6))
    everything = [whole, failed, missing]
    assert parts.left_of(everything, retry_failed=True) == everything
    with parts.attempted():
        caption(parts, whole)
        caption(parts, failed)
    assert parts.left_of(everything, retry_failed=False) == [missing]
    assert parts.left_of(everything, retry_failed=True) == [failed, missing]
    assert list(parts.failures()) == [(parts.path(failed), "UNREADABLE")]


def test_a_batch_is_not_captioned_again(table: Path, parts: Parts) -> None:
    # As when the actor died after its part was there, before it could tell.
    batch, captioner = Batch(str(table), 0, 4), FakeCaptioner()
    with parts.attempted():
        caption(parts, batch)
        done = caption(parts, batch, captioner)
    assert captioner.seen == []
    assert (done.seen, done.done_before, done.captioned) == (4, 4, 0)


def test_only_what_failed_is_tried_again(table: Path, parts: Parts) -> None:
    batch, captioner = Batch(str(table), 3, 6), FakeCaptioner()
    with parts.attempted():
        caption(parts, batch)
        before = list(read_parquet(parts.path(batch)))
        done = caption(parts, batch, captioner, retry=True)
    assert captioner.seen == [b"bad 4"]
    assert list(read_parquet(parts.path(batch))) == before
    assert (done.done_before, done.failed) == (2, {"UNREADABLE": 1})


def test_who_fails_leaves_nothing(table: Path, parts: Parts) -> None:
    batch = Batch(str(table), 0, 4)
    with parts.attempted():
        for _ in range(5):
            with pytest.raises(StoppedError):
                caption(parts, batch, FakeCaptioner(most=1))
        assert list(parts.folder.rglob("*.*")) == [parts.folder / ".attempts"]
        caption(parts, batch)
    assert len(captions(parts.path(batch))) == 4


def test_who_dies_again_and_again_is_not_asked_for_ever(table: Path, parts: Parts) -> None:
    batch, other = (Batch(str(table), begin, begin + 4) for begin in (0, 4))
    with parts.attempted():
        for _ in range(3):
            # Never left, as by the death of the process.
            parts.attempt(batch).__enter__().write_text("cut o")
        with pytest.raises(DeadlyBatchError, match=f"rows 0 to 3 of {table}"):
            caption(parts, batch)
        caption(parts, other)
    # Another run tries again.
    with parts.attempted():
        caption(parts, batch)
    assert parts.left_of([batch, other], retry_failed=False) == []


def test_two_may_make_the_same_part_at_once(table: Path, parts: Parts) -> None:
    # As when Ray takes an actor for dead that only cannot be reached.
    batch = Batch(str(table), 0, 4)
    with parts.attempted(), parts.attempt(batch) as slow:
        slow.write_bytes(b"half of a par")
        caption(parts, batch)
        assert len(captions(parts.path(batch))) == 4
        assert slow.read_bytes() == b"half of a par"


def test_to_begin_anew_removes_parts_alone(table: Path, parts: Parts) -> None:
    batch = Batch(str(table), 0, 4)
    with parts.attempted():
        caption(parts, batch)
    (parts.folder / "notes.txt").write_text("mine")
    assert parts.are_there()
    parts.remove()
    assert not parts.are_there()
    assert [path.name for path in parts.folder.iterdir()] == ["notes.txt"]
