"""Where images come from: files, folders, globs, lists, tables, webdataset shards, data sets.

Everything is read as it is needed, in an order that is the same the next time.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".pbm", ".pgm", ".ppm", ".pnm"}
)
STDIN = "-"

_LIST_SUFFIXES = (".txt", ".lst")
_DATASET_FILES = ("dataset_dict.json", "dataset_info.json", "state.json")
# Of a table with images in it so many rows are in memory at once.
_ROWS_AT_ONCE = 64
# More take a while to be counted, for a bar that hardly moves.
_MOST_COUNTED = 10**6


class SourceError(ValueError):
    """A source is none that can be read; the message says which, and what is wanted."""


@dataclass(frozen=True)
class Item:
    """One image that is to be captioned.

    Attributes:
        key: tells it from all other items, and is the same the next time.
        id: as in Row.
        source: likewise.
        read: gives the file's bytes, or raises OSError.
        path: the image's file, where it has one of its own.
        has_caption: whether a table has a caption for it already.
    """

    key: str
    id: str
    source: str
    read: Callable[[], bytes]
    path: Path | None = None
    has_caption: bool = False


def items(sources: Sequence[str]) -> Iterator[Item]:
    """The items of all sources, one source after the other.

    Raises:
        SourceError: if a source is not there, or is of no kind that is known.
    """
    for source in sources:
        yield from _items_of(source)


def check(sources: Sequence[str]) -> None:
    """Refuse what `items` would refuse at the first sight of it.

    Raises:
        SourceError: likewise.
    """
    for source in sources:
        if source != STDIN and not Path(source).exists() and not _matches(source):
            raise SourceError(f"{source}: there is no such file or folder")
        if Path(source).suffix == ".parquet" or _is_dataset(Path(source)):
            _pyarrow(source)


def count(sources: Sequence[str]) -> int | None:
    """How many items there are; None where images would have to be read for that."""
    if not all(map(_is_quick, sources)):
        return None
    counted = sum(1 for _ in islice(items(sources), _MOST_COUNTED + 1))
    return counted if counted <= _MOST_COUNTED else None


def tables(sources: Sequence[str]) -> list[Path]:
    """The Parquet files that sources are: files, folders with all below them, and globs.

    Raises:
        SourceError: if a source is not there, or is or has none.
    """
    check(sources)
    found: dict[Path, None] = {}
    for source in sources:
        paths = [Path(source)] if Path(source).exists() else map(Path, _matches(source))
        files = [
            _absolute(file)
            for path in paths
            for file in (sorted(path.rglob("*.parquet")) if path.is_dir() else [path])
        ]
        if not files or any(file.suffix.lower() != ".parquet" for file in files):
            raise SourceError(f"{source}: Parquet files are wanted")
        found |= dict.fromkeys(files)
    return list(found)


@dataclass(frozen=True)
class Table:
    """What is known of a Parquet file without its rows.

    Attributes:
        rows: how many there are.
        footer: SHA-256 of its footer, in hexadecimal: another one where the rows are others.
    """

    rows: int
    footer: str


def table(path: Path) -> Table:
    """What a Parquet file says of itself.

    Raises:
        SourceError: if it is none, or has no column that names an image.
    """
    pyarrow = _pyarrow(str(path))
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names, rows = file.schema_arrow.names, file.metadata.num_rows
            footer_bytes = file.metadata.serialized_size
    except pyarrow.ArrowInvalid as error:
        raise SourceError(f"{path}: this is no Parquet file, or a damaged one") from error
    _check_columns(path, names)
    with path.open("rb") as opened:
        # After the footer come its length and four letters.
        opened.seek(-(footer_bytes + 8), os.SEEK_END)
        return Table(rows, hashlib.sha256(opened.read(footer_bytes)).hexdigest())


def table_items(path: Path, rows: range) -> Iterator[Item]:
    """The items of so many rows of a Parquet file, as `items` gives them."""
    yield from _table(path, _parquet_rows(path, rows), rows.start)


def row_key(path: Path, number: int) -> str:
    """The key of a table's row; the absolute path is wanted."""
    return f"{path}#{number:012}"


def _is_quick(source: str) -> bool:
    """Whether a source names its images without having them in itself, and may be read twice."""
    path = Path(source)
    if path.is_dir():
        return not _is_dataset(path)
    return path.is_file() and path.suffix.lower() not in {".tar", ".parquet"}


def _items_of(source: str) -> Iterator[Item]:
    path = Path(source)
    if source == STDIN:
        yield from _listed(sys.stdin, Path())
    elif path.is_dir():
        yield from _dataset(path) if _is_dataset(path) else _folder(path)
    elif path.is_file():
        yield from _file_items(path)
    else:
        for match in _matches(source):
            yield from _items_of(match)


def _matches(source: str) -> list[str]:
    if not glob.has_magic(source):
        return []
    return sorted(glob.glob(source, recursive=True))  # noqa: PTH207  # It may be absolute.


def _absolute(path: Path) -> Path:
    """The path from the root; a link keeps its name."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def _file_items(path: Path) -> Iterator[Item]:
    suffix = path.suffix.lower()
    if suffix == ".tar":
        yield from _shard(path)
    elif suffix == ".parquet":
        yield from _table(path, _parquet_rows(path))
    elif suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield from _table(path, csv.DictReader(file))
    elif suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            yield from _table(path, map(json.loads, filter(str.strip, file)))
    elif suffix in _LIST_SUFFIXES:
        with path.open(encoding="utf-8") as file:
            yield from _listed(file, path.parent)
    else:
        yield _file(path, path.name)


def _file(path: Path, id: str) -> Item:
    absolute = _absolute(path)
    return Item(str(absolute), id, str(absolute), absolute.read_bytes, absolute)


def _listed(lines: Iterable[str], base: Path) -> Iterator[Item]:
    """A path a line; relative ones are meant from where the list lies."""
    for line in lines:
        if name := line.strip():
            yield _file(base / name, name)


def _folder(folder: Path) -> Iterator[Item]:
    """All images below a folder, folder by folder."""
    for directory, names, files in os.walk(folder):
        names.sort()
        for name in sorted(files):
            path = Path(directory, name)
            if path.suffix.lower() in IMAGE_SUFFIXES:
                yield _file(path, path.relative_to(folder).as_posix())


def _shard(path: Path) -> Iterator[Item]:
    """The images of a tar file; a file's key is its name up to the first dot."""
    absolute = _absolute(path)
    try:
        with tarfile.open(path, "r|*") as shard:
            for member in shard:
                folder, _, name = member.name.rpartition("/")
                key, _, extension = name.partition(".")
                suffix = "." + extension.rpartition(".")[2].lower()
                if not member.isfile() or suffix not in IMAGE_SUFFIXES:
                    continue
                file = shard.extractfile(member)
                assert file is not None, "it is a file"
                key = f"{folder}/{key}" if folder else key
                source = f"{absolute}#{key}"
                yield Item(source, key, source, _given(file.read()))
        # Where a header is cut off, tarfile takes it for the end.
        if path.stat().st_size % tarfile.BLOCKSIZE:
            raise tarfile.ReadError("the last block is not whole")
    except (tarfile.TarError, EOFError) as error:
        # What came before is captioned; the next run reads the rest, if it is there then.
        yield Item(
            f"{absolute}#", path.name, str(absolute), _failing("the shard is cut off", error)
        )


def _table(path: Path, rows: Iterable[Mapping[str, Any]], first: int = 0) -> Iterator[Item]:
    """Rows of a table with a column `path` or `image`, and perhaps `id` and `caption`."""
    absolute = _absolute(path)
    for number, row in enumerate(rows, first):
        _check_columns(path, row)
        id = str(number if row.get("id") is None else row["id"])
        value = row["path"] if row.get("path") else row.get("image")
        if isinstance(value, Mapping):  # As Hugging Face's data sets keep images.
            value = value.get("bytes") or value.get("path")
        key, has_caption = row_key(absolute, number), bool(row.get("caption"))
        if isinstance(value, bytes):
            yield Item(key, id, f"{absolute}#{id}", _given(value), has_caption=has_caption)
        elif isinstance(value, str) and value:
            file = _absolute(path.parent / value)
            yield Item(key, id, value, file.read_bytes, file, has_caption)
        else:
            yield Item(key, id, "", _failing("the row names no image"), has_caption=has_caption)


def _check_columns(path: Path, names: Container[str]) -> None:
    if "path" not in names and "image" not in names:
        raise SourceError(f"{path}: a column `path` or `image` is wanted")


def _parquet_rows(path: Path, rows: range | None = None) -> Iterator[Mapping[str, Any]]:
    """All rows of a file, or those that are wanted; row groups without one are not read."""
    parquet = _pyarrow(str(path)).parquet
    with parquet.ParquetFile(path) as file:
        wanted = range(file.metadata.num_rows) if rows is None else rows
        groups: list[int] = []
        first = begin = 0
        for group in range(file.num_row_groups):
            end = begin + file.metadata.row_group(group).num_rows
            if begin < wanted.stop and end > wanted.start:
                first = first if groups else begin
                groups.append(group)
            begin = end
        columns = _wanted(file.schema_arrow.names)
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=columns):
            skipped = min(max(wanted.start - first, 0), batch.num_rows)
            yield from batch.slice(skipped, max(wanted.stop - first - skipped, 0)).to_pylist()
            first += batch.num_rows
            if first >= wanted.stop:
                return


def _is_dataset(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in _DATASET_FILES)


def _dataset(folder: Path) -> Iterator[Item]:
    """A data set that Hugging Face's `datasets` has saved to disk, or several splits of one."""
    for file in sorted(folder.rglob("*.arrow")):
        if not file.name.startswith("cache-"):
            yield from _table(file, _arrow_rows(file))


def _arrow_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    pyarrow = _pyarrow(str(path))
    with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as reader:
        columns = _wanted(reader.schema.names)
        for batch in reader:
            for begin in range(0, batch.num_rows, _ROWS_AT_ONCE):
                yield from batch.select(columns).slice(begin, _ROWS_AT_ONCE).to_pylist()


def _wanted(names: Iterable[str]) -> list[str]:
    """The columns that are read; a table may have many more."""
    return [name for name in names if name in {"id", "path", "image", "caption"}]


def _pyarrow(source: str) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise SourceError(
            f"{source} needs pyarrow: pip install 'captionserve-server[bulk]'"
        ) from error
    return pyarrow


def _given(encoded: bytes) -> Callable[[], bytes]:
    return io.BytesIO(encoded).getvalue


def _failing(message: str, cause: Exception | None = None) -> Callable[[], bytes]:
    def read() -> bytes:
        raise OSError(0, message) from cause

    return read
