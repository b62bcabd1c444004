"""Captioning everything that is still to be done, and keeping what becomes of it.

Each captioner pulls images in a thread of its own, reading ahead of what it captions, so that
reading, decoding and captioning overlap; nothing that is kept in memory grows with the number of
images. Rows are kept a few at a time: what a death undoes is captioned again by the next run.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import TypeAlias

from captionserve import GenerationOptions, Outcome

from captionserve_server.bulk.captioners import Captioner
from captionserve_server.bulk.journal import Journal
from captionserve_server.bulk.rows import Row
from captionserve_server.bulk.sources import Item
from captionserve_server.core.errors import CaptionServeError
from captionserve_server.core.image_files import open_image_file, orientation_turn, turned_size

# Rows that are kept together: at most so many, and after so many seconds.
_ROWS_AT_ONCE = 256
_SECONDS_AT_MOST = 1.0
# Files that are read at once, and read but not yet captioned, for each captioner.
_READERS = 4
_AHEAD = 32
# Read and not kept yet, duplicates that wait for their caption among them.
_MOST_UNKEPT = 512
_END_SECONDS = 30.0

# What is known of an item from its file, and the file's bytes.
_Reading: TypeAlias = "Future[tuple[Row, bytes]]"


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        seen: items that the sources gave.
        done_before: of those, how many had nothing to be done for them.
        captioned: images that have a caption now and had none.
        duplicates: of those, how many got it from an image of the same bytes.
        failed: how many images have failed in this run, by their reason.
    """

    seen: int = 0
    done_before: int = 0
    captioned: int = 0
    duplicates: int = 0
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, other: Progress) -> None:
        """Count also what another run has done."""
        self.seen += other.seen
        self.done_before += other.done_before
        self.captioned += other.captioned
        self.duplicates += other.duplicates
        self.failed += other.failed


def options_fingerprint(options: Mapping[str, object], model: Mapping[str, object]) -> str:
    """The same for the same options and the same defaults of the model; 16 hexadecimal digits."""
    text = json.dumps([options, model["defaults"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Run:
    """One run over items."""

    def __init__(
        self,
        journal: Journal,
        captioners: Sequence[Captioner],
        options: GenerationOptions,
        fingerprint: str,
        *,
        progress: Progress,
        kept: Callable[[Item, Row], None],
        told: Callable[[Progress], None],
    ) -> None:
        """Prepare.

        Args:
            journal: where rows are kept.
            captioners: share the work.
            options: of all captions.
            fingerprint: of the options.
            progress: kept up to date.
            kept: called with each item and its row before it is kept.
            told: called now and then.
        """
        self._journal = journal
        self._captioners = captioners
        self._options = options
        self._fingerprint = fingerprint
        self._kept = kept
        self._told = told
        self._progress = progress
        self._lock = threading.Lock()
        # By digest, items that wait for the caption of one that is under way.
        self._under_way: dict[str, list[Item]] = {}
        self._finished: queue.SimpleQueue[tuple[Item, Row] | BaseException | None] = (
            queue.SimpleQueue()
        )
        self._ended = threading.Event()
        # Bounds what is read and not kept yet.
        self._room = threading.Semaphore(len(captioners) * _MOST_UNKEPT)

    def caption(self, items: Iterator[Item]) -> None:
        """Caption all of them.

        Raises:
            CaptionError: if a captioner cannot caption anything any more.
            SourceError: what the sources raise.
            sqlite3.Error: if rows cannot be kept.
        """
        shared = _Shared(items)
        threads = [
            threading.Thread(target=self._work, args=(captioner, shared), daemon=True)
            for captioner in self._captioners
        ]
        for thread in threads:
            thread.start()
        try:
            self._keep(len(threads))
        finally:
            self._ended.set()
            for thread in threads:
                thread.join(_END_SECONDS)

    def _keep(self, working: int) -> None:
        """Keep rows until all captioners have ended."""
        rows: list[tuple[Item, Row]] = []
        error: BaseException | None = None
        begin = time.monotonic()
        try:
            while working:
                with suppress(queue.Empty):
                    found = self._finished.get(timeout=_SECONDS_AT_MOST)
                    if isinstance(found, tuple):
                        rows.append(found)
                    else:
                        working -= 1
                        if found is not None:
                            error = error or found
                            self._ended.set()
                if len(rows) >= _ROWS_AT_ONCE or time.monotonic() > begin + _SECONDS_AT_MOST:
                    rows = self._keep_some(rows)
                    begin = time.monotonic()
        finally:
            while rows:
                rows = self._keep_some(rows)
        if error is not None:
            raise error

    def _keep_some(self, rows: list[tuple[Item, Row]]) -> list[tuple[Item, Row]]:
        """Keep rows; those of other items with the same images, which are to be kept next."""
        for item, row in rows:
            self._kept(item, row)
        self._journal.put((item.key, row) for item, row in rows)
        following = []
        for _, row in rows:
            self._room.release()
            with self._lock:
                # Not before it is kept: who comes now finds it in the journal.
                waiting = self._under_way.pop(row.sha256 or "", [])
                self._progress.duplicates += len(waiting)
            following += [
                (each, dataclasses.replace(row, id=each.id, source=each.source)) for each in waiting
            ]
            if row.error_reason is not None:
                self._progress.failed[row.error_reason] += 1
            else:
                self._progress.captioned += 1
        self._told(self._progress)
        return following

    def _work(self, captioner: Captioner, shared: _Shared) -> None:
        """Have one captioner caption what it pulls."""
        pulled: dict[int, tuple[Item, Row]] = {}
        try:
            with ThreadPoolExecutor(_READERS) as readers:
                images = self._images(self._ahead(shared, readers), pulled)
                with closing(captioner.outcomes(images, self._options)) as outcomes:
                    for outcome in outcomes:
                        item, row = pulled.pop(outcome.index)
                        self._finished.put((item, _row_of(row, outcome)))
                        if self._ended.is_set():
                            break
            self._finished.put(None)
        except BaseException as error:  # `_keep` raises it.
            self._finished.put(error)

    def _ahead(
        self, shared: _Shared, readers: ThreadPoolExecutor
    ) -> Iterator[tuple[Item, _Reading]]:
        """Items and their files, read some ahead, in the order in which they were taken."""
        reading: collections.deque[tuple[Item, _Reading]] = collections.deque()
        while not self._ended.is_set():
            # Only who has nothing to give waits for room.
            while len(reading) < _AHEAD and self._room.acquire(timeout=0 if reading else 0.1):
                item = shared.take()
                if item is None:
                    self._room.release()
                    break
                reading.append((item, readers.submit(self._read, item)))
            if reading:
                yield reading.popleft()
            elif shared.is_empty:
                return

    def _images(
        self,
        reads: Iterable[tuple[Item, _Reading]],
        pulled: dict[int, tuple[Item, Row]],
    ) -> Iterator[bytes]:
        """The files that are to be captioned; what needs no caption is finished here."""
        index = 0
        for item, future in reads:
            try:
                row, encoded = future.result()
            except OSError as error:
                self._finished.put((item, self._row(item).with_error(error)))
                continue
            digest = row.sha256 or ""
            with self._lock:
                waiting = self._under_way.get(digest)
                if waiting is not None:
                    waiting.append(item)
                    continue
                same = self._journal.same_image(digest)
                if same is None:
                    self._under_way[digest] = []
                else:
                    self._progress.duplicates += 1
            if same is not None:
                row = dataclasses.replace(same, id=item.id, source=item.source)
                self._finished.put((item, row))
                continue
            pulled[index] = item, row
            index += 1
            yield encoded

    def _row(self, item: Item) -> Row:
        return Row(item.id, item.source, options_fingerprint=self._fingerprint)

    def _read(self, item: Item) -> tuple[Row, bytes]:
        """What is known of an item from its file, and the file's bytes."""
        encoded = item.read()
        digest = hashlib.sha256(encoded).hexdigest()
        width, height = _size(encoded)
        row = self._row(item)
        return dataclasses.replace(row, sha256=digest, width=width, height=height), encoded


class _Shared:
    """An iterator that several threads take from."""

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items
        self._lock = threading.Lock()
        self.is_empty = False

    def take(self) -> Item | None:
        """The next item; None at the end."""
        with self._lock:
            item = next(self._items, None)
            self.is_empty = item is None
            return item


def _row_of(row: Row, outcome: Outcome) -> Row:
    if outcome.result is not None:
        return row.with_result(outcome.result)
    assert outcome.error is not None, "there is either"
    return row.with_error(outcome.error)


def _size(encoded: bytes) -> tuple[int, int] | tuple[None, None]:
    """Width and height of an image as it is to be seen; None where its header cannot be read."""
    try:
        with open_image_file(encoded) as image:
            return turned_size(image.size, orientation_turn(image))
    except (CaptionServeError, OSError, ValueError):
        return None, None


def still_to_do(
    items: Iterable[Item],
    journal: Journal,
    progress: Progress,
    *,
    retry_failed: bool = False,
    only_missing: bool = False,
    is_there: Callable[[Item], bool] = lambda item: False,
    limit: int | None = None,
) -> Iterator[Item]:
    """The items that are to be captioned.

    Args:
        items: all there are.
        journal: knows which are done.
        progress: told of what is seen.
        retry_failed: whether what has failed is tried again.
        only_missing: whether rows of tables that have a caption are left alone.
        is_there: whether an item's caption is where it would be written.
        limit: give so many at most.
    """
    given = 0
    for item in items:
        progress.seen += 1
        if (
            journal.is_done(item.key, retry_failed=retry_failed)
            or (only_missing and item.has_caption)
            or is_there(item)
        ):
            progress.done_before += 1
            continue
        if limit is not None and given >= limit:
            return
        given += 1
        yield item
