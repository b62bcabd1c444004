"""What has become of each item so far, on disk: a run that was interrupted goes on from it.

An SQLite database beside the output. Rows are written in transactions, so that whatever happens a
row is there whole or not at all; looking one up takes no memory that grows with their number.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from captionserve_server.bulk.rows import COLUMNS, Row

if TYPE_CHECKING:
    from typing_extensions import Self

_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS about (what TEXT PRIMARY KEY, json TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS rows (key TEXT PRIMARY KEY, {", ".join(COLUMNS)});
CREATE INDEX IF NOT EXISTS captioned ON rows (sha256) WHERE error_code IS NULL;
"""
_PLACES = ", ".join("?" * (1 + len(COLUMNS)))
_SUFFIX = ".journal"


class DifferentRunError(ValueError):
    """The journal is of another model or of other options; the message says what differs."""


class Journal:
    """The rows of one output; may be used by several threads."""

    def __init__(self, path: Path | None) -> None:
        """Open it, or begin one; None for one that is forgotten at the end.

        Raises:
            sqlite3.Error: if the file cannot be used.
        """
        self._lock = threading.Lock()
        self._database = sqlite3.connect(path or "", check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.executescript(_SCHEMA)

    @staticmethod
    def of(output: Path) -> Path:
        """Where the journal of an output lies."""
        return output.with_name(output.name + _SUFFIX)

    @staticmethod
    def remove(path: Path) -> None:
        """Begin anew: forget what is in a journal."""
        for each in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
            each.unlink(missing_ok=True)

    def hold_to(self, about: Mapping[str, Mapping[str, object]]) -> None:
        """Say what the captions are made with; all runs must say the same.

        Args:
            about: "model" and "options", each as JSON values by name.

        Raises:
            DifferentRunError: naming what differs.
        """
        with self._lock, self._database as database:
            before = dict(database.execute("SELECT what, json FROM about"))
            for what, values in about.items():
                database.execute(
                    "INSERT OR IGNORE INTO about VALUES (?, ?)", (what, json.dumps(values))
                )
        differing = []
        for what in about.keys() & before.keys():
            # As JSON has it: tuples are lists.
            then, now = json.loads(before[what]), json.loads(json.dumps(about[what]))
            differing += [
                f"{what}.{name} was {then.get(name)}, is {now.get(name)}"
                for name in then.keys() | now.keys()
                if then.get(name) != now.get(name)
            ]
        if differing:
            raise DifferentRunError("; ".join(sorted(differing)))

    def is_done(self, key: str, *, retry_failed: bool) -> bool:
        """Whether nothing is to be done for an item."""
        with self._lock:
            found = self._database.execute(
                "SELECT error_code FROM rows WHERE key = ?", (key,)
            ).fetchone()
        return found is not None and not (retry_failed and found[0] is not None)

    def same_image(self, sha256: str) -> Row | None:
        """A row of a captioned image with these bytes."""
        with self._lock:
            found = self._database.execute(
                f"SELECT {', '.join(COLUMNS)} FROM rows"
                " WHERE sha256 = ? AND error_code IS NULL LIMIT 1",
                (sha256,),
            ).fetchone()
        return None if found is None else _row(found)

    def put(self, rows: Iterable[tuple[str, Row]]) -> None:
        """Keep rows by their items' keys, all of them or none; replaces those of failed items."""
        with self._lock, self._database as database:
            database.executemany(
                f"INSERT OR REPLACE INTO rows VALUES ({_PLACES})",
                ((key, *_values(row)) for key, row in rows),
            )

    def rows(self) -> Iterator[Row]:
        """All rows, in the order of their keys: the same whatever came in between."""
        for values in self._database.execute(f"SELECT {', '.join(COLUMNS)} FROM rows ORDER BY key"):
            yield _row(values)

    def failures(self) -> Counter[str]:
        """How many rows have which reason."""
        with self._lock:
            return Counter(
                dict(
                    self._database.execute(
                        "SELECT error_reason, count(*) FROM rows WHERE error_code IS NOT NULL"
                        " GROUP BY error_reason"
                    )
                )
            )

    def __len__(self) -> int:
        """How many rows there are."""
        with self._lock:
            (count,) = self._database.execute("SELECT count(*) FROM rows").fetchone()
        return int(count)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def __enter__(self) -> Self:
        """Use it until the end of the block."""
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()


def _values(row: Row) -> list[Any]:
    values = [getattr(row, name) for name in COLUMNS]
    return [json.dumps(value) if isinstance(value, tuple) else value for value in values]


def _row(values: Iterable[Any]) -> Row:
    named = dict(zip(COLUMNS, values, strict=True))
    if named["captions"] is not None:
        named["captions"] = tuple(json.loads(named["captions"]))
        named["degenerate"] = bool(named["degenerate"])
    return Row(**named)
