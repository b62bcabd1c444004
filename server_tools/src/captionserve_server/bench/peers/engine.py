"""Captioning without Triton: the edge mode, and our graphs in a bare loop."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from captionserve_server.bench.peers.system import Options, System, TokenIds
from captionserve_server.bulk.captioners import Captioner, Local
from captionserve_server.core.engine.scheduler import SchedulerLimits
from captionserve_server.core.preprocessing import preprocess
from captionserve_server.core.step_model import Int64Array, RowRequests, StepBatch
from captionserve_server.local import LocalCaptioner
from captionserve_server.local.model_folder import load_model
from captionserve_server.runtime import graph_tensors
from captionserve_server.runtime.cores import threads_of_graphs
from captionserve_server.runtime.decoder_graphs import TimedGraph
from captionserve_server.runtime.graph_step_model import GraphStepModel
from captionserve_server.runtime.model_repository import VISION_ENCODER

# The service's own limits: the same engine with the same room.
_LIMITS = SchedulerLimits()


class Edge(System):
    """The edge mode, asked by as many threads as there are images at once."""

    def __init__(self, repository: Path) -> None:
        """Load a model repository."""
        self._captioner = LocalCaptioner(repository, limits=_LIMITS)

    def caption(self, files: list[bytes], options: Options, streamed: bool) -> list[TokenIds]:
        """Caption a file; there are no streams."""
        (file,) = files
        result = self._captioner.caption(file, **options)  # type: ignore[arg-type]
        return [tuple(result.captions[0].token_ids)]

    def captioner(self) -> Captioner:
        """The edge mode, by caption_each."""
        return Local(self._captioner)


class BareGraphs(System):
    """The graphs alone, a batch after the other: no scheduler, no search.

    What the graphs do when nothing else is in the way. Each row takes its own best token, so that
    several beams cost what they cost in a beam search without there being one.
    """

    def __init__(self, repository: Path) -> None:
        """Load a model repository."""
        self._model = load_model(repository, version=None, threads=threads_of_graphs())
        self._encoder = TimedGraph(self._model.encoder)
        geometry = self._model.bundle.geometry
        self._step_model = GraphStepModel(self._model.decoder, geometry, _LIMITS.slots)
        self._image_seconds = 0.0

    def stage_seconds(self) -> dict[str, float]:
        """Decoding and resizing images, and each graph."""
        decoder = self._model.decoder
        return {
            "image": self._image_seconds,
            VISION_ENCODER: self._encoder.seconds,
            "prefill": decoder.prefill.seconds,
            "step": decoder.step.seconds,
            "top": decoder.top.seconds,
        }

    def caption(self, files: list[bytes], options: Options, streamed: bool) -> list[TokenIds]:
        """Caption a batch; there are no streams."""
        # So many at once as the engine encodes between two steps.
        few = _LIMITS.max_admissions
        parts = [files[first : first + few] for first in range(0, len(files), few)]
        slots = np.concatenate([self._taken_in(part) for part in parts])
        special, defaults = self._model.bundle.special, self._model.bundle.defaults
        beams, ends = options["num_beams"], list(special.end)
        # As many candidates of each row as a beam search asks for.
        candidates = max(2, 1 + len(ends)) * beams
        captions: list[list[int]] = [[] for _ in files]
        live = np.arange(len(files))
        newest = np.full((len(files), 1), special.start, np.int64)
        # Both lengths count the start token.
        for length in range(1, options.get("max_length", defaults.max_length)):
            # Each row continues itself; at the second step all continue the single first one.
            parents = np.arange(newest.shape[1]) * (length > 2)
            answer = self._step_model.step(
                StepBatch(
                    slots=slots[live],
                    row_counts=np.full(len(live), newest.shape[1]),
                    rows=RowRequests(
                        tokens=newest.reshape(-1),
                        parents=np.tile(parents, len(live)),
                        candidate_counts=np.full(newest.size, candidates),
                        normalise_first=np.full(newest.size, beams > 1),
                    ),
                )
            )
            best = answer.tokens.reshape(len(live), -1, candidates)
            if length < options.get("min_length", defaults.min_length):
                # Too short to end. Stable, so that all others keep their order.
                order = np.argsort(np.isin(best, ends), axis=-1, kind="stable")
                best = np.take_along_axis(best, order, axis=-1)
            # Beams part at the first token.
            newest = best[:, 0, :beams] if length == 1 else best[:, :, 0]
            for image, token in zip(live, newest[:, 0].tolist(), strict=True):
                captions[image].append(token)
            going_on = ~np.isin(newest[:, 0], ends)
            self._step_model.free(slots[live[~going_on]])
            live, newest = live[going_on], newest[going_on]
            if not len(live):
                break
        self._step_model.free(slots[live])
        return [tuple(caption) for caption in captions]

    def _taken_in(self, files: list[bytes]) -> Int64Array:
        begin = time.perf_counter()
        pixels = np.stack([preprocess(file, self._model.preprocessor).whole for file in files])
        self._image_seconds += time.perf_counter() - begin
        (states,) = self._encoder.run({graph_tensors.PIXELS: pixels})
        return self._step_model.prefill(states)
