"""Tables in batches of rows, each of which becomes one part of an output folder.

1. A batch is always the same rows, and its part's name says which they are.
2. A part is written aside and renamed: it is there whole, or not at all.

So it is seen from names alone what is left to do, nothing is counted twice that is captioned twice,
as may happen around a death, and those who caption need know nothing of each other.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from captionserve import GenerationOptions

from captionserve_server.bulk.captioners import Captioner
from captionserve_server.bulk.journal import Journal
from captionserve_server.bulk.outputs import read_parquet, writer_for
from captionserve_server.bulk.run import Progress, Run, still_to_do
from captionserve_server.bulk.sources import Table, row_key, table_items

_PATTERN = "part-*.parquet"
# Hidden from whoever reads the folder as one table.
_ATTEMPTS = ".attempts"
# So often a process may end while it captions a batch; what else ended it is rarely so stubborn.
_MOST_DEATHS = 3


class ClusterError(RuntimeError):
    """Those who should caption cannot be had, or are lost; the message says what happened."""


class DeadlyBatchError(RuntimeError):
    """Whoever captions a batch dies of it, it seems; the message says which rows they are."""


@dataclass(frozen=True)
class Batch:
    """Rows of a table that are captioned together.

    Attributes:
        table: the absolute path of the Parquet file.
        begin: number of the first row.
        end: that after the last row.
    """

    table: str
    begin: int
    end: int

    def __len__(self) -> int:
        """How many rows there are."""
        return self.end - self.begin

    @property
    def rows(self) -> range:
        """Their numbers."""
        return range(self.begin, self.end)


def batches(tables: Mapping[Path, Table], size: int) -> Iterator[Batch]:
    """All rows, so many in a batch; the last one of a table has what is left."""
    for path, table in tables.items():
        for begin in range(0, table.rows, size):
            yield Batch(str(path), begin, min(begin + size, table.rows))


class Parts:
    """The parts of an output folder."""

    def __init__(self, folder: Path) -> None:
        """The folder need not be there yet; an absolute path is the same for every process."""
        self.folder = folder
        self._attempts = folder / _ATTEMPTS

    def path(self, batch: Batch) -> Path:
        """Where the part of a batch lies."""
        table = hashlib.sha256(batch.table.encode()).hexdigest()[:16]
        return self.folder / f"part-{table}-{batch.begin:012}.parquet"

    def are_there(self) -> bool:
        """Whether there are any."""
        return next(self.folder.glob(_PATTERN), None) is not None

    def left_of(self, all_of_them: Iterable[Batch], *, retry_failed: bool) -> list[Batch]:
        """The batches without a part, or also those of whose rows some have failed."""
        done = set(self.folder.glob(_PATTERN))
        if retry_failed:
            done -= {part for part, _ in self.failures()}
        return [batch for batch in all_of_them if self.path(batch) not in done]

    def failures(self) -> Iterator[tuple[Path, str]]:
        """The part and the reason of each row without a caption."""
        from pyarrow import dataset

        paths = sorted(map(str, self.folder.glob(_PATTERN)))
        if not paths:
            return
        rows = dataset.dataset(paths, format="parquet").scanner(
            columns=["__filename", "error_reason"], filter=dataset.field("error_code").is_valid()
        )
        for some in rows.to_batches():
            for row in some.to_pylist():
                yield Path(row["__filename"]), row["error_reason"]

    def remove(self) -> None:
        """Forget what earlier runs have done."""
        for part in self.folder.glob(_PATTERN):
            part.unlink()

    @contextmanager
    def attempted(self) -> Iterator[None]:
        """Prepare the folder for attempts, and at the end forget those that were not finished."""
        shutil.rmtree(self._attempts, ignore_errors=True)
        self._attempts.mkdir(parents=True)
        try:
            yield
        finally:
            shutil.rmtree(self._attempts, ignore_errors=True)

    @contextmanager
    def attempt(self, batch: Batch) -> Iterator[Path]:
        """Where the part of a batch is written until it is whole.

        Raises:
            DeadlyBatchError: if too many attempts have not come to their end, good or bad.
        """
        part = self.path(batch)
        if len(list(self._attempts.glob(f"{part.name}.*"))) >= _MOST_DEATHS:
            raise DeadlyBatchError(
                f"{_MOST_DEATHS} processes have ended while they captioned rows {batch.begin} to "
                f"{batch.end - 1} of {batch.table}"
            )
        aside = self._attempts / f"{part.name}.{uuid.uuid4().hex}"
        aside.touch()
        try:
            yield aside
        finally:
            with suppress(FileNotFoundError):
                aside.unlink()


@dataclass(frozen=True)
class BatchWork:
    """Makes parts of batches.

    Attributes:
        parts: where they go.
        options: of all captions.
        fingerprint: of the options.
        retry_failed: whether of a part that is there the failed rows are tried again.
    """

    parts: Parts
    options: GenerationOptions
    fingerprint: str
    retry_failed: bool

    def caption(self, batch: Batch, captioners: Sequence[Captioner]) -> Progress:
        """Make the part of a batch; what was done for that.

        Raises:
            DeadlyBatchError: as `Parts.attempt`.
            CaptionError: as `Run.caption`, and likewise the others.
        """
        part, progress = self.parts.path(batch), Progress()
        with self.parts.attempt(batch) as aside, Journal(None) as journal:
            if part.exists():
                if not self.retry_failed:  # Only the report of it was lost.
                    return Progress(seen=len(batch), done_before=len(batch))
                keys = (row_key(Path(batch.table), number) for number in batch.rows)
                journal.put(zip(keys, read_parquet(part), strict=True))
            run = Run(
                journal,
                captioners,
                self.options,
                self.fingerprint,
                progress=progress,
                kept=lambda item, row: None,
                told=lambda progress: None,
            )
            items = table_items(Path(batch.table), batch.rows)
            run.caption(still_to_do(items, journal, progress, retry_failed=self.retry_failed))
            writer_for(part, aside=aside)(journal.rows())
        return progress
