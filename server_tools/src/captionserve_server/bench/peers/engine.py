"""Captioning without Triton: the edge mode, and our graphs in a bare loop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from captionserve_server.bench.peers.loads import run_in_batches, run_in_flight, stages_ms
from captionserve_server.bench.rows import Load, Options, Run, TokenIds
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


class Edge:
    """The edge mode, asked by as many threads as there are images at once."""

    def __init__(self, repository: Path, images: Sequence[bytes]) -> None:
        """Load a model repository; images are JPEG files."""
        self.versions = {name: version(name) for name in ("captionserve-server", "onnxruntime")}
        self._captioner = LocalCaptioner(repository, limits=_LIMITS)
        self._images = images

    def run(self, images: int, load: Load, options: Options) -> Run:
        """Caption images; see Captioner."""

        def caption(file: bytes, _: bool) -> TokenIds:
            result = self._captioner.caption(file, **options)  # type: ignore[arg-type]
            return tuple(result.captions[0].token_ids)

        return run_in_flight(caption, self._images, images, load)


class BareGraphs:
    """The graphs alone, a batch after the other: no scheduler, no search.

    What the graphs do when nothing else is in the way. Each row takes its own best token, so that
    several beams cost what they cost in a beam search without there being one.
    """

    def __init__(self, repository: Path, images: Sequence[bytes]) -> None:
        """Load a model repository; images are JPEG files."""
        self.versions = {name: version(name) for name in ("captionserve-server", "onnxruntime")}
        self._model = load_model(repository, version=None, threads=threads_of_graphs())
        self._encoder = TimedGraph(self._model.encoder)
        self._image_seconds = 0.0
        self._images = images

    def run(self, images: int, load: Load, options: Options) -> Run:
        """Caption images in batches; see Captioner."""
        geometry = self._model.bundle.geometry
        step_model = GraphStepModel(self._model.decoder, geometry, load.at_once)
        before = self._stage_seconds()
        captions = partial(self._captions, step_model, options)
        run = run_in_batches(captions, self._images, images, load)
        return dataclasses.replace(run, stages_ms=stages_ms(before, self._stage_seconds(), images))

    def _stage_seconds(self) -> dict[str, float]:
        decoder = self._model.decoder
        return {
            "image": self._image_seconds,
            VISION_ENCODER: self._encoder.seconds,
            "prefill": decoder.prefill.seconds,
            "step": decoder.step.seconds,
            "top": decoder.top.seconds,
        }

    def _captions(
        self, step_model: GraphStepModel, options: Options, batch: list[bytes]
    ) -> list[TokenIds]:
        # So many at once as the engine encodes between two steps.
        few = _LIMITS.max_admissions
        parts = [batch[first : first + few] for first in range(0, len(batch), few)]
        slots = np.concatenate([self._taken_in(step_model, files) for files in parts])
        special, defaults = self._model.bundle.special, self._model.bundle.defaults
        beams, ends = options["num_beams"], list(special.end)
        # As many candidates of each row as a beam search asks for.
        candidates = max(2, 1 + len(ends)) * beams
        captions: list[list[int]] = [[] for _ in batch]
        live = np.arange(len(batch))
        newest = np.full((len(batch), 1), special.start, np.int64)
        # Both lengths count the start token.
        for length in range(1, options.get("max_length", defaults.max_length)):
            rows = newest.size
            # Each row continues itself; at the second step all continue the single first one.
            parents = np.arange(newest.shape[1]) * (length > 2)
            answer = step_model.step(
                StepBatch(
                    slots=slots[live],
                    row_counts=np.full(len(live), newest.shape[1]),
                    rows=RowRequests(
                        tokens=newest.reshape(-1),
                        parents=np.tile(parents, len(live)),
                        candidate_counts=np.full(rows, candidates),
                        normalise_first=np.full(rows, beams > 1),
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
            step_model.free(slots[live[~going_on]])
            live, newest = live[going_on], newest[going_on]
            if not len(live):
                break
        step_model.free(slots[live])
        return [tuple(caption) for caption in captions]

    def _taken_in(self, step_model: GraphStepModel, files: list[bytes]) -> Int64Array:
        begin = time.perf_counter()
        pixels = np.stack([preprocess(file, self._model.preprocessor) for file in files])
        self._image_seconds += time.perf_counter() - begin
        (states,) = self._encoder.run({graph_tensors.PIXELS: pixels})
        return step_model.prefill(states)
