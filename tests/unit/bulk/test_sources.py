"""Whatever images lie in, each comes once, with the id and the source that the contract names."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from captionserve_server.bulk.sources import (
    Item,
    SourceError,
    check,
    items,
    table,
    table_items,
    tables,
)
from hypothesis import given
from hypothesis import strategies as st

PNG = b"\x89PNG not looked at here"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a/c.JPG", "a/d/e.webp", "a/notes.txt", "f.tiff"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG + name.encode())
    return tmp_path / "images"


def found(*sources: object) -> list[Item]:
    return list(items([str(source) for source in sources]))


def ids(*sources: object) -> list[str]:
    return [item.id for item in found(*sources)]


def test_a_folder_keeps_its_tree(folder: Path) -> None:
    assert ids(folder) == ["b.png", "a/c.JPG", "a/d/e.webp"]
    for item in found(folder):
        assert item.source == str(folder / item.id)
        assert item.read() == PNG + item.id.encode()
        assert item.path == folder / item.id


def test_a_file_is_called_by_its_name_whatever_it_ends_in(folder: Path) -> None:
    assert ids(folder / "f.tiff") == ["f.tiff"]


def test_a_pattern_is_what_it_matches(folder: Path) -> None:
    assert ids(folder / "**" / "*.webp") == ["e.webp"]
    assert ids(folder / "a" / "[cd].*", folder / "b.*") == ["c.JPG", "b.png"]


def test_a_list_names_files_from_where_it_lies(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = folder / "list.txt"
    listed.write_text("a/c.JPG\n\n  b.png \n")
    assert [item.source for item in found(listed)] == [
        str(folder / "a" / "c.JPG"),
        str(folder / "b.png"),
    ]
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("b.png\n"))
    assert [item.source for item in found("-")] == [str(folder / "b.png")]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_table_of_paths(folder: Path, suffix: str) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "first", "path": "b.png", "caption": ""},
        {"id": "second", "path": str(folder / "a" / "c.JPG"), "caption": "a cat"},
        {"id": "third", "path": "missing.png", "caption": None},
        {"id": "fourth", "path": "", "caption": None},
    ]
    table = write_table(folder / f"table.{suffix}", rows)
    first, second, third, fourth = found(table)
    assert (first.id, first.source, first.has_caption) == ("first", "b.png", False)
    assert (second.source, second.has_caption) == (rows[1]["path"], True)
    assert first.read() == PNG + b"b.png"
    for unreadable in (third, fourth):
        with pytest.raises(OSError, match=r"No such file|names no image"):
            unreadable.read()
    assert len({item.key for item in found(table)}) == 4


def test_a_table_of_images(folder: Path) -> None:
    rows = [{"image": b"one"}, {"image": b"two"}]
    table = write_table(folder / "table.parquet", rows)
    assert [(item.id, item.read()) for item in found(table)] == [("0", b"one"), ("1", b"two")]
    assert found(table)[1].source == f"{table}#1"


def test_a_table_without_a_column_for_images_is_refused(folder: Path) -> None:
    table = write_table(folder / "table.jsonl", [{"file": "b.png"}])
    with pytest.raises(SourceError, match="column `path` or `image`"):
        found(table)


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        lines = [",".join(rows[0]), *(",".join(str(v or "") for v in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    return path


def test_a_data_set_on_disk_with_its_splits(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    for split in ("test", "train"):
        (saved / split).mkdir(parents=True)
        (saved / split / "state.json").write_text("{}")
        rows = [{"image": {"bytes": f"{split}{n}".encode(), "path": None}} for n in range(150)]
        table = pyarrow.Table.from_pylist(rows)
        path = saved / split / "data-00000-of-00001.arrow"
        with path.open("wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    read = [item.read() for item in found(saved)]
    assert read == [f"{split}{n}".encode() for split in ("test", "train") for n in range(150)]
    assert len({item.key for item in found(saved)}) == 300


def shard(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    return path


def test_a_shard_names_images_by_their_keys(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", ["a/001.jpg", "a/001.json", "a/002.seg.png", "3.txt"])
    assert [(item.id, item.source, item.read()) for item in found(path)] == [
        ("a/001", f"{path}#a/001", b"a/001.jpg"),
        ("a/002", f"{path}#a/002", b"a/002.seg.png"),
    ]


def test_a_shard_that_is_cut_off_does_not_end_the_others(tmp_path: Path) -> None:
    whole = shard(tmp_path / "1.tar", ["x.png"])
    cut = shard(tmp_path / "0.tar", ["a.png", "b.png"])
    cut.write_bytes(cut.read_bytes()[:1100])
    first, failed, last = found(cut, whole)
    assert (first.id, last.id) == ("a", "x")
    with pytest.raises(OSError, match="cut off"):
        failed.read()


def test_what_is_not_there_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for missing in ("nothing.png", "no/*.png"):
        with pytest.raises(SourceError, match="no such file"):
            check([str(tmp_path / missing)])
    check(["-", str(tmp_path)])


def parquet(path: Path, rows: list[dict[str, Any]], row_group_size: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(written, path, row_group_size=row_group_size)
    return path


@pytest.fixture(scope="module")
def rows_in_groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 rows in row groups of 70, more than are read at once and no multiple of that."""
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    return parquet(path, [{"image": str(row).encode()} for row in range(200)], 70)


@given(begin=st.integers(0, 200), end=st.integers(0, 200))
def test_a_range_of_rows_is_that_part_of_the_table(
    rows_in_groups: Path, begin: int, end: int
) -> None:
    whole = found(rows_in_groups)[begin:end]
    some = list(table_items(rows_in_groups, range(begin, end)))
    assert [(item.key, item.id, item.source) for item in some] == [
        (item.key, item.id, item.source) for item in whole
    ]
    assert [item.read() for item in some] == [item.read() for item in whole]


def test_row_groups_that_hold_none_of_the_rows_are_not_read(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [{"image": b"%03d" % row * 50} for row in range(4)], 1)
    offset = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[offset : offset + 20] = b"\xff" * 20
    path.write_bytes(damaged)
    assert [item.read()[:3] for item in table_items(path, range(2, 4))] == [b"002", b"003"]
    with pytest.raises(OSError, match=r".+"):
        list(table_items(path, range(1, 2)))


def test_tables_are_files_folders_and_patterns(tmp_path: Path) -> None:
    rows = [{"path": "x.png"}]
    first = parquet(tmp_path / "in" / "a.parquet", rows)
    second = parquet(tmp_path / "in" / "below" / "b.parquet", rows)
    (tmp_path / "in" / "notes.txt").write_text("no table")
    assert tables([str(tmp_path / "in")]) == [first, second]
    assert tables([str(tmp_path / "*" / "*.parquet"), str(first), str(second)]) == [first, second]
    for source in (first.with_name("notes.txt"), tmp_path / "in" / "no", tmp_path / "*" / "*.txt"):
        with pytest.raises(SourceError):
            tables([str(source)])


def test_a_table_is_known_by_its_footer(tmp_path: Path) -> None:
    rows = [{"path": f"{row}.png"} for row in range(30)]
    one, same = (parquet(tmp_path / f"{name}.parquet", rows) for name in "ab")
    other = parquet(tmp_path / "c.parquet", [{"path": "z.png"}, *rows[1:]])
    assert table(one) == table(same)
    assert table(one).rows == table(other).rows == 30
    assert table(one).footer != table(other).footer
    (tmp_path / "d.parquet").write_bytes(one.read_bytes()[:-9])
    with pytest.raises(SourceError, match="damaged"):
        table(tmp_path / "d.parquet")
    with pytest.raises(SourceError, match="`path` or `image`"):
        table(parquet(tmp_path / "e.parquet", [{"url": "x"}]))
