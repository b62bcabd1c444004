"""Captioning files in bulk as `captionserve caption --output` does, for the benchmark."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from captionserve import GenerationOptions

from captionserve_server.bulk.captioners import Captioner, Outcomes
from captionserve_server.bulk.journal import Journal
from captionserve_server.bulk.outputs import writer_for
from captionserve_server.bulk.run import Progress, Run
from captionserve_server.bulk.sources import items


def captioned_in_bulk(
    captioner: Captioner, files: Sequence[bytes], options: dict[str, int]
) -> tuple[float, list[tuple[int, ...]]]:
    """The seconds from a folder of files to a table, and each file's tokens.

    Args:
        captioner: captions them.
        files: JPEG files. Equal ones are told apart: bulk would caption them once.
        options: of all captions.

    Raises:
        CaptionError: if one is not captioned.
    """
    recorded = _Recorded(captioner)
    with tempfile.TemporaryDirectory(prefix="captionserve-") as name:
        folder, output = Path(name, "images"), Path(name, "captions.jsonl")
        folder.mkdir()
        for number, file in enumerate(files):
            # What follows a JPEG file's end is not read.
            (folder / f"{number:06}.jpg").write_bytes(file + b"%d" % number)
        begin = time.perf_counter()
        with Journal(Journal.of(output)) as journal:
            Run(
                journal,
                [recorded],
                GenerationOptions(**options),  # type: ignore[arg-type]
                fingerprint="",
                progress=Progress(),
                kept=lambda item, row: None,
                told=lambda progress: None,
            ).caption(items([str(folder)]))
            writer_for(output)(journal.rows())
        seconds = time.perf_counter() - begin
    return seconds, [recorded.tokens[number] for number in range(len(files))]


class _Recorded:
    """A captioner, and the tokens of each image in the order in which it pulled them."""

    def __init__(self, captioner: Captioner) -> None:
        self._captioner = captioner
        self.tokens: dict[int, tuple[int, ...]] = {}

    def model(self) -> dict[str, object]:
        """The captioner's."""
        return self._captioner.model()

    def outcomes(self, images: Iterable[bytes], options: GenerationOptions) -> Outcomes:
        """The captioner's; a file of the benchmark's that fails is no outcome."""
        for outcome in self._captioner.outcomes(images, options):
            if outcome.error is not None:
                raise outcome.error
            assert outcome.result is not None, "there is either"
            self.tokens[outcome.index] = tuple(outcome.result.captions[0].token_ids)
            yield outcome
