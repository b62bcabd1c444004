"""What is written: a table, aside and then in one step into its place, and sidecars."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from captionserve_server.bulk.rows import COLUMNS, Row

ALT_TEXT_COLUMNS = ("alt_text", "alt_text_warnings")
"""What follows the other columns where alt text is asked for."""

_ROWS_AT_ONCE = 4096

_Values: TypeAlias = "dict[str, Any]"
"""A row's, by its columns."""


class OutputError(ValueError):
    """An output cannot be written; the message says why."""


def writer_for(
    path: Path, alt_text_chars: int | None = None, aside: Path | None = None
) -> Callable[[Iterable[Row]], None]:
    """What writes all rows to a file, by its suffix.

    Args:
        path: the file.
        alt_text_chars: how long alt texts may be; None for none.
        aside: where it is written until it is whole, on the same file system; None for a hidden
            file beside it. Those who may write the same file at once want one each.

    Raises:
        OutputError: if the suffix is none that is known, or pyarrow is wanted and not there.
    """
    writers = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}
    write = writers.get(path.suffix.lower())
    if write is None:
        raise OutputError(f"{path.name}: an output ends in {', '.join(writers)}")
    if write is _write_parquet:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise OutputError(
                f"{path.name} needs pyarrow: pip install 'captionserve-server[bulk]'"
            ) from error

    columns = COLUMNS if alt_text_chars is None else (*COLUMNS, *ALT_TEXT_COLUMNS)

    def written(rows: Iterable[Row]) -> None:
        with _in_place(path, aside) as file:
            write(file, columns, (_values(row, alt_text_chars) for row in rows))

    return written


def _values(row: Row, alt_text_chars: int | None) -> _Values:
    values: _Values = dict(vars(row))
    if alt_text_chars is not None:
        found = row.alt_text(alt_text_chars)
        # Not part of a row that is kept: it follows from the caption.
        values["alt_text"] = None if found is None else found.text
        values["alt_text_warnings"] = found and tuple(each.value for each in found.warnings)
    return values


def sidecar_of(image: Path) -> Path:
    """Where the caption of an image lies beside it."""
    return image.with_suffix(".txt")


def write_sidecar(image: Path, text: str) -> None:
    """Write an image's text beside it."""
    with _in_place(sidecar_of(image)) as aside:
        aside.write_text(f"{text}\n", encoding="utf-8")


def read_parquet(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file that was written here."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS_AT_ONCE):
            for values in batch.to_pylist():
                captions = values["captions"]
                yield Row(**values | {"captions": None if captions is None else tuple(captions)})


@contextmanager
def _in_place(path: Path, aside: Path | None = None) -> Iterator[Path]:
    """A file that takes the place of another one once it is whole and on disk."""
    # Always the same name: what a killed run leaves there, the next one writes over.
    aside = aside or path.with_name(f".{path.name}.partial")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        with suppress(FileNotFoundError):
            aside.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_jsonl(path: Path, columns: Sequence[str], rows: Iterable[_Values]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for values in rows:
            file.write(json.dumps(values, ensure_ascii=False) + "\n")


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[_Values]) -> None:
    """As the csv module writes it: None is an empty field, lists are JSON."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for values in rows:
            writer.writerow(
                {
                    name: json.dumps(value, ensure_ascii=False)
                    if isinstance(value, tuple)
                    else value
                    for name, value in values.items()
                }
            )


def _write_parquet(path: Path, columns: Sequence[str], rows: Iterable[_Values]) -> None:
    import pyarrow
    from pyarrow import parquet

    kinds = {
        "width": pyarrow.int32(),
        "height": pyarrow.int32(),
        "captions": pyarrow.list_(pyarrow.string()),
        "score": pyarrow.float64(),
        "confidence": pyarrow.float64(),
        "degenerate": pyarrow.bool_(),
        "alt_text_warnings": pyarrow.list_(pyarrow.string()),
    }
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in columns])
    remaining = iter(rows)
    with parquet.ParquetWriter(path, schema) as writer:
        while some := list(islice(remaining, _ROWS_AT_ONCE)):
            writer.write_table(pyarrow.Table.from_pylist(some, schema=schema))
