"""A process that captions with our graphs in a bare loop: no Triton, no engine, no search.

    python -m captionserve_server.bench.peers.graphs_worker REPOSITORY IMAGES ENCODE_BATCH

What the same graphs do when nothing else is in the way. `load` images are live at once; one that
ends makes room for the next. Each row takes its own best token, so that several beams cost what
they cost in a beam search without there being one. Speaks generate_worker's lines.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from captionserve_server.bench.peers.generate_worker import (
    Answer,
    read_images,
    serve_lines,
    versions_of,
)
from captionserve_server.core.preprocessing import preprocess
from captionserve_server.core.step_model import (
    FORBIDDEN,
    Float32Array,
    Int64Array,
    RowRequests,
    ScoreEdits,
    StepAnswer,
    StepBatch,
)
from captionserve_server.local.model_folder import LoadedModel, load_model
from captionserve_server.runtime import graph_tensors
from captionserve_server.runtime.cores import threads_of_graphs
from captionserve_server.runtime.graph_step_model import GraphStepModel


@dataclass
class _Live:
    """An image being captioned.

    Attributes:
        image: its number.
        slot: its slot in the step model.
        begin: when it was admitted, by time.perf_counter().
        tokens: the first row's generated tokens.
        newest: [rows], each row's newest token; a single row before the first step.
    """

    image: int
    slot: int
    begin: float
    newest: Int64Array
    tokens: list[int] = field(default_factory=list)


class BareLoop:
    """Captions images until none is left."""

    def __init__(self, model: LoadedModel, images: list[bytes], encode_batch: int) -> None:
        """Keep the model; images are JPEG files, encoded at most `encode_batch` at once."""
        self._loaded = model
        self._images = images
        self._encode_batch = encode_batch
        special = model.bundle.special
        self._start = np.array([special.start], np.int64)
        self._ends = np.array(special.end, np.int64)
        self._options = model.bundle.defaults
        self._room = 0
        self._model = self._with_room(1)

    def answer(self, images: int, load: int, options: dict[str, int]) -> Answer:
        """Caption the first `images` images, `load` live at once."""
        self._options = self._loaded.bundle.defaults.with_given(options)
        self._model = self._with_room(load)
        waiting, live = deque(range(images)), list[_Live]()
        latencies, token_ids = [0.0] * images, [list[int]()] * images
        begin = time.perf_counter()
        while waiting or live:
            while waiting and len(live) < load:
                live += self._admit(waiting, load - len(live))
            self._step(live)
            for ended in [each for each in live if self._has_ended(each)]:
                live.remove(ended)
                self._model.free(np.array([ended.slot]))
                latencies[ended.image] = time.perf_counter() - ended.begin
                token_ids[ended.image] = ended.tokens
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "latencies": latencies, "token_ids": token_ids}

    def _with_room(self, load: int) -> GraphStepModel:
        """The present step model if it has room enough; its memory has been touched before."""
        if load <= self._room:
            return self._model
        self._room = load
        return GraphStepModel(self._loaded.decoder, self._loaded.bundle.geometry, load)

    def _admit(self, waiting: deque[int], room: int) -> list[_Live]:
        count = min(room, self._encode_batch, len(waiting))
        images = [waiting.popleft() for _ in range(count)]
        begin = time.perf_counter()
        slots = self._model.prefill(self._encode(images))
        return [
            _Live(image, int(slot), begin, self._start)
            for image, slot in zip(images, slots, strict=True)
        ]

    def _encode(self, images: list[int]) -> Float32Array:
        files = [self._images[image % len(self._images)] for image in images]
        pixels = np.stack([preprocess(file, self._loaded.preprocessor) for file in files])
        (states,) = self._loaded.encoder.run({graph_tensors.PIXELS: pixels})
        return states

    def _step(self, live: list[_Live]) -> None:
        """One token more for every row."""
        counts = np.array([len(each.newest) for each in live], np.int64)
        candidates = self._candidates()
        answer = self._model.step(
            StepBatch(
                slots=np.array([each.slot for each in live], np.int64),
                row_counts=counts,
                rows=RowRequests(
                    tokens=np.concatenate([each.newest for each in live]),
                    parents=np.concatenate([self._parents(each) for each in live]),
                    candidate_counts=np.full(counts.sum(), candidates),
                    normalise_first=np.full(counts.sum(), self._options.num_beams > 1),
                    edits=self._edits(live),
                ),
            )
        )
        self._take(live, counts, answer)

    def _candidates(self) -> int:
        """As many for each row as a beam search asks for."""
        beams = self._options.num_beams
        return 1 if beams == 1 else max(2, 1 + len(self._ends)) * beams

    def _parents(self, live: _Live) -> Int64Array:
        """Each row continues itself; at the second step all continue the single first one."""
        rows = len(live.newest)
        return np.zeros(rows, np.int64) if len(live.tokens) == 1 else np.arange(rows)

    def _edits(self, live: list[_Live]) -> ScoreEdits:
        """Forbid the end to rows that are too short."""
        short = [1 + len(each.tokens) < self._options.min_length for each in live]
        counts = [len(each.newest) for each in live]
        rows = np.repeat(np.flatnonzero(np.repeat(short, counts)), len(self._ends))
        tokens = np.tile(self._ends, len(rows) // len(self._ends))
        return ScoreEdits(rows, tokens, np.full(len(rows), FORBIDDEN))

    def _take(self, live: list[_Live], counts: Int64Array, answer: StepAnswer) -> None:
        best = answer.tokens.reshape(counts.sum(), -1)
        first = 0
        for each, count in zip(live, counts, strict=True):
            own = best[first : first + count]
            # Beams part at the first token.
            each.newest = own[:, 0] if each.tokens else own[0, : self._options.num_beams]
            each.tokens.append(int(each.newest[0]))
            first += count

    def _has_ended(self, live: _Live) -> bool:
        too_long = 1 + len(live.tokens) >= self._options.max_length
        return too_long or live.tokens[-1] in self._ends


def main() -> None:
    """Load what the command line names and serve it."""
    repository, images, encode_batch = sys.argv[1:]

    def load() -> tuple[dict[str, str], Callable[..., Answer]]:
        model = load_model(Path(repository), version=None, threads=threads_of_graphs())
        loop = BareLoop(model, read_images(images), int(encode_batch))
        return versions_of("captionserve-server", "onnxruntime", "numpy"), loop.answer

    serve_lines(load)


if __name__ == "__main__":
    main()
