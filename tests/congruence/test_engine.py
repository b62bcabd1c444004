"""The engine on the exported graphs, in one process, against transformers' generate()."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from pathlib import Path

import numpy as np
import pytest
from captionserve_server.core import bundle as files
from captionserve_server.core import graph_tensors, tensors
from captionserve_server.core.bundle import Bundle
from captionserve_server.core.engine import CaptionEngine, CaptionTask, Outcome
from captionserve_server.core.graph_step_model import GraphStepModel
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.preprocessing import PreprocessorConfig, to_pixels
from captionserve_server.core.search import DecodedCaption
from captionserve_server.core.step_model import Float32Array
from captionserve_server.runtime.onnx_graph import OnnxGraph
from PIL import Image

from tests.checkpoints import RANDOM_CHECKPOINTS
from tests.congruence.option_grid import OPTION_GRID, generate_options
from tests.reference import picture, reference

IMAGES = 4


class InProcess:
    """An exported repository run without Triton."""

    def __init__(self, repository: Path) -> None:
        """Load the graphs of version 1."""
        decoder = repository / tensors.DECODER_STEP.name / "1"
        encoder = repository / tensors.VISION_ENCODER.name / "1" / files.ENCODER_GRAPH_FILE
        self.bundle = Bundle.from_json((decoder / files.BUNDLE_FILE).read_text())
        settings = repository / tensors.PREPROCESS.name / "1" / files.PREPROCESSOR_FILE
        self._preprocessor = PreprocessorConfig.from_json(json.loads(settings.read_text()))
        self._encoder = OnnxGraph(encoder, threads=1)
        self._step_model = GraphStepModel(
            OnnxGraph(decoder / files.PREFILL_GRAPH_FILE, threads=1),
            OnnxGraph(decoder / files.STEP_GRAPH_FILE, threads=1),
            self.bundle.geometry,
            capacity=6,
        )

    def captions(
        self, requests: list[tuple[Image.Image, DecodingOptions]]
    ) -> list[list[DecodedCaption]]:
        """Decode all requests together."""
        engine = CaptionEngine(self._step_model, self.bundle.special, max_rows=24)
        for key, (image, options) in enumerate(requests):
            engine.submit(CaptionTask(key, self._states(image), options))
        finished: dict[Hashable, Outcome] = {}
        while not engine.idle:
            finished |= engine.step()
        outcomes = [finished[key] for key in range(len(requests))]
        return [outcome for outcome in outcomes if isinstance(outcome, list)]

    def _states(self, image: Image.Image) -> Float32Array:
        pixels = to_pixels(image, self._preprocessor)[None]
        states: Float32Array = self._encoder.run({graph_tensors.PIXELS: pixels})[0][0]
        return states


@pytest.mark.parametrize("name", RANDOM_CHECKPOINTS)
def test_mixed_batch_equals_generate_token_for_token(
    name: str,
    model_repository: Callable[[str], Path],
    checkpoint_folder: Callable[[str], Path],
) -> None:
    in_process = InProcess(model_repository(name))
    truth = reference(checkpoint_folder(name))
    requests = [(picture(seed), options) for options in OPTION_GRID for seed in range(IMAGES)]
    np.random.default_rng(0).shuffle(requests)  # type: ignore[arg-type]

    results = in_process.captions(requests)

    for (image, options), captions in zip(requests, results, strict=True):
        expected = truth.captions(image, **generate_options(options))
        assert [c.token_ids for c in captions] == [e.token_ids for e in expected], options
        scores = [caption.score for caption in captions]
        assert scores == pytest.approx([e.score for e in expected], abs=1e-3), options
