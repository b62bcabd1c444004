"""Quantised graphs: what is in them, and how far their captions are from those of fp32."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from captionserve_server.evaluation.agreement import caption_agreement
from captionserve_server.export.checkpoint import load_checkpoint
from captionserve_server.export.precision import Precision
from captionserve_server.export.quantise import quantise_encoder, quantise_step
from captionserve_server.export.repository import UnsupportedFormatError, export_checkpoint
from captionserve_server.export.sources import StepShape, step_example
from captionserve_server.runtime import graph_tensors
from captionserve_server.runtime import model_repository as files
from captionserve_server.runtime.graph_format import GraphFormat
from captionserve_server.runtime.onnx_graph import OnnxGraph

from tests.checkpoints import RANDOM_CHECKPOINTS
from tests.conftest import DEMO, QuantisedRepositories, Repositories

ENCODER = Path(files.VISION_ENCODER, "1", files.ENCODER_GRAPH_FILE)
STEP = Path(files.DECODER, "1", files.STEP_GRAPH_FILE)
LOWER = (Precision.INT8, Precision.INT4)
# Of the demo's held-out scenes, half of them in an unseen style.
IMAGES = 60
# Root mean square, in standard deviations of what is right.
MOST_ERROR = {Precision.INT8: 0.1, Precision.INT4: 0.5}


@pytest.mark.parametrize("precision", LOWER)
@pytest.mark.parametrize("name", RANDOM_CHECKPOINTS)
def test_weights_are_kept_once_and_in_few_bits(
    model_repository: Repositories, tmp_path: Path, name: str, precision: Precision
) -> None:
    source, target = model_repository(name) / STEP, tmp_path / "step.onnx"
    quantise_step(source, target, precision)

    shape = RANDOM_CHECKPOINTS[name].shape
    large = {
        initializer.name
        for initializer in onnx.load(str(target)).graph.initializer
        if initializer.data_type == onnx.TensorProto.FLOAT
        and math.prod(initializer.dims) >= shape.vocabulary_size * shape.decoder_width
    }
    # An untied embedding is looked up, not multiplied with, and stays as it is.
    assert large == (set() if shape.tied_head else {"token_embedding.weight"})


@pytest.mark.parametrize("precision", LOWER)
@pytest.mark.parametrize("name", RANDOM_CHECKPOINTS)
def test_a_quantised_step_gives_nearly_the_same(
    model_repository: Repositories,
    checkpoint_folder: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    precision: Precision,
) -> None:
    source, target = model_repository(name) / STEP, tmp_path / "step.onnx"
    quantise_step(source, target, precision)
    geometry = load_checkpoint(str(checkpoint_folder(name))).bundle.geometry
    *head, cross, remembered = step_example(
        geometry, StepShape((2, 3, 1), entries=7), torch.Generator().manual_seed(0)
    )
    fp32, quantised = OnnxGraph(source, threads=1), OnnxGraph(target, threads=1)
    arrays = [*head, *cross, *remembered]
    inputs = {
        graph_input: np.asarray(array)
        for graph_input, array in zip(fp32.input_names, arrays, strict=True)
    }

    truth = fp32.run(inputs)
    logits = truth[fp32.output_names.index(graph_tensors.LOGITS)]
    for output, expected, found in zip(
        fp32.output_names, truth, quantised.run(inputs), strict=True
    ):
        assert found.shape == expected.shape
        # A normaliser is a sum over a row of logits; rows are too few to say how far it spreads.
        spread = logits.std() if output == graph_tensors.LOG_NORMALISERS else expected.std()
        error = np.sqrt(np.mean((found - expected) ** 2))
        assert error < MOST_ERROR[precision] * spread, output


@pytest.mark.parametrize(
    ("precision", "operators"),
    [
        (Precision.INT8, {"MatMulInteger"}),
        # Two thirds of the encoder multiply whole numbers of 8 bits, the rest reads blocks of 4.
        (Precision.INT4, {"MatMulInteger", "MatMulNBits"}),
    ],
)
def test_no_product_of_the_encoder_keeps_fp32_weights(
    model_repository: Repositories, tmp_path: Path, precision: Precision, operators: set[str]
) -> None:
    target = tmp_path / "model.onnx"
    quantise_encoder(model_repository("deit") / ENCODER, target, precision)
    (loop,) = onnx.load(str(target)).graph.node
    graph = next(entry.g for entry in loop.attribute if entry.name == "body")
    weights = {initializer.name for initializer in graph.initializer}
    with_weights = {
        node.op_type for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights
    }
    assert with_weights == set()
    assert {node.op_type for node in graph.node} >= operators


def test_torchscript_is_written_in_fp32_only(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormatError, match="fp32 only"):
        export_checkpoint(
            "unused",
            tmp_path / "repository",
            graph_format=GraphFormat.TORCHSCRIPT,
            precision=Precision.INT8,
        )


@pytest.mark.parametrize(("precision", "least"), [(Precision.INT8, 0.97), (Precision.INT4, 0.9)])
def test_captions_of_the_demo_agree_with_fp32(
    in_precision: QuantisedRepositories, precision: Precision, least: float
) -> None:
    fp32, quantised = in_precision(DEMO, Precision.FP32), in_precision(DEMO, precision)
    agreement = caption_agreement(fp32, quantised, IMAGES)
    assert agreement.images == IMAGES
    assert agreement.same_captions >= least
    assert agreement.cider_d >= least * agreement.cider_d_of_fp32
