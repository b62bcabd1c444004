"""The engine on the exported graphs, in one process, against the truth."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Hashable
from pathlib import Path

import pytest
from captionserve_server.core.bundle import Bundle
from captionserve_server.core.captions import CaptionPlan, DecodedCaption
from captionserve_server.core.engine.scheduler import (
    Outcome,
    Request,
    Scheduler,
    SchedulerLimits,
)
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.preprocessing import PreprocessorConfig, to_pixels
from captionserve_server.core.search import Vocabulary
from captionserve_server.core.step_model import Float32Array, UInt8Array
from captionserve_server.core.words import word_tokens
from captionserve_server.runtime import graph_tensors
from captionserve_server.runtime import model_repository as files
from captionserve_server.runtime.decoder_graphs import open_decoder
from captionserve_server.runtime.graph import Graph
from captionserve_server.runtime.graph_format import GraphFormat
from captionserve_server.runtime.graph_step_model import GraphStepModel
from captionserve_server.runtime.open_graph import find_graph, open_graph
from captionserve_server.triton import wire
from PIL import Image
from tokenizers import Tokenizer

from tests.checkpoints import RANDOM_CHECKPOINTS
from tests.conftest import Repositories
from tests.congruence.option_grid import IMAGES, OPTION_GRID
from tests.reference import picture, reference

# One of so many options of the grid; the full stack is tested with more of them, on ONNX.
EVERY = {GraphFormat.ONNX: 3, GraphFormat.TORCHSCRIPT: 11}


class InProcess:
    """An exported repository run without Triton."""

    def __init__(self, repository: Path) -> None:
        """Load the graphs of version 1."""
        decoder = repository / wire.DECODER.name / "1"
        encoder = repository / wire.VISION_ENCODER.name / "1"
        self.bundle = Bundle.from_json((decoder / files.BUNDLE_FILE).read_text())
        settings = repository / wire.DECODER.name / "1" / files.PREPROCESSOR_FILE
        self._preprocessor = PreprocessorConfig.from_json(json.loads(settings.read_text()))
        self._encoder = _opened(encoder, files.ENCODER_GRAPH_FILE)
        graphs = open_decoder(decoder, threads=1)
        self._step_model = GraphStepModel(graphs, self.bundle.geometry, capacity=6)
        tokenizer = repository / wire.DECODER.name / "1" / files.TOKENIZER_FILE
        self._tokenizer = Tokenizer.from_file(str(tokenizer))

    def encode(self, pixels: UInt8Array) -> Float32Array:
        """The images' encoder states."""
        states: Float32Array = self._encoder.run({graph_tensors.PIXELS: pixels})[0]
        return states

    def captions(
        self, requests: list[tuple[Image.Image, DecodingOptions]]
    ) -> list[list[DecodedCaption]]:
        """Decode all requests together."""
        vocabulary = Vocabulary(self.bundle.special, self.bundle.geometry.vocabulary_size)
        limits = SchedulerLimits(slots=6, max_rows=24)
        engine = Scheduler(self, self._step_model, vocabulary, limits)
        for key, (image, options) in enumerate(requests):
            words = word_tokens(options, self._encode)
            plan = CaptionPlan(options.counted_from(1 + len(words.prefix)), words)
            engine.submit(Request(key, to_pixels(image, self._preprocessor), plan))
        finished: dict[Hashable, Outcome] = {}
        while not engine.idle:
            finished |= engine.step()
        outcomes = [finished[key] for key in range(len(requests))]
        return [outcome for outcome in outcomes if isinstance(outcome, list)]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _opened(folder: Path, name: str) -> Graph:
    return open_graph(find_graph(folder, name), threads=1)


@pytest.mark.parametrize("graph_format", GraphFormat)
@pytest.mark.parametrize("name", RANDOM_CHECKPOINTS)
def test_mixed_batch_equals_the_truth_token_for_token(
    name: str,
    graph_format: GraphFormat,
    model_repository: Repositories,
    checkpoint_folder: Callable[[str], Path],
) -> None:
    in_process = InProcess(model_repository(name, graph_format))
    truth = reference(checkpoint_folder(name))
    requests = [(picture(number % IMAGES), options) for number, options in enumerate(OPTION_GRID)][
        :: EVERY[graph_format]
    ]
    random.Random(0).shuffle(requests)

    results = in_process.captions(requests)

    for (image, options), captions in zip(requests, results, strict=True):
        expected = truth.captions(image, options)
        assert [c.token_ids for c in captions] == [e.token_ids for e in expected], options
        scores = [caption.score for caption in captions]
        assert scores == pytest.approx([e.score for e in expected], abs=1e-3), options
        for caption, true in zip(captions, expected, strict=True):
            assert caption.token_logprobs == pytest.approx(true.token_logprobs, abs=2e-3), options
