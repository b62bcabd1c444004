"""Static configuration, code and exported graphs must agree on every tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from captionserve_server.core.bundle import Bundle
from captionserve_server.core.search.selection import top_tokens
from captionserve_server.export.repository import static_repository
from captionserve_server.runtime import graph_tensors
from captionserve_server.runtime import model_repository as files
from captionserve_server.runtime.graph import NamedGraph
from captionserve_server.runtime.graph_format import GraphFormat
from captionserve_server.runtime.open_graph import find_graph, open_graph
from captionserve_server.triton import wire
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from tests.checkpoints import RANDOM_CHECKPOINTS
from tests.conftest import Repositories

ONNX_TYPES = {"TYPE_UINT8": "tensor(uint8)", "TYPE_FP32": "tensor(float)"}


def read_config(path: Path) -> model_config_pb2.ModelConfig:
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def as_specs(declared: object) -> list[wire.TensorSpec]:
    """A configuration's inputs or outputs as specs."""
    return [
        wire.TensorSpec(
            name=tensor.name,
            data_type=model_config_pb2.DataType.Name(tensor.data_type),
            dims=tuple(tensor.dims),
            optional=getattr(tensor, "optional", False),
        )
        for tensor in declared  # type: ignore[attr-defined]
    ]


@pytest.mark.parametrize("model", wire.MODELS, ids=lambda model: model.name)
def test_static_configuration_declares_the_tensors_of_the_table(model: wire.ModelSpec) -> None:
    config = read_config(static_repository() / model.name / "config.pbtxt")
    assert as_specs(config.input) == list(model.inputs)
    assert as_specs(config.output) == list(model.outputs)


@pytest.mark.parametrize("model", wire.MODELS, ids=lambda model: model.name)
def test_model_code_is_one_line(model: wire.ModelSpec) -> None:
    code = static_repository() / model.name / "1" / "model.py"
    config = read_config(static_repository() / model.name / "config.pbtxt")
    assert code.exists() == (config.backend == "python")
    if code.exists():
        assert len(code.read_text().splitlines()) == 1


@pytest.mark.parametrize("name", RANDOM_CHECKPOINTS)
def test_exported_configuration_is_the_static_one(
    name: str, model_repository: Callable[[str], Path]
) -> None:
    for model in wire.MODELS:
        exported = read_config(model_repository(name) / model.name / "config.pbtxt")
        static = read_config(static_repository() / model.name / "config.pbtxt")
        assert exported == static


@pytest.mark.parametrize("name", RANDOM_CHECKPOINTS)
def test_torchscript_changes_what_names_the_backend_only(
    name: str, model_repository: Repositories
) -> None:
    for model in wire.MODELS:
        onnx = read_config(model_repository(name) / model.name / "config.pbtxt")
        torchscript = read_config(
            model_repository(name, GraphFormat.TORCHSCRIPT) / model.name / "config.pbtxt"
        )
        if model is wire.VISION_ENCODER:
            onnx.backend, onnx.default_model_filename = "pytorch", "model.pt"
            threads = onnx.parameters.pop("intra_op_thread_count")
            onnx.parameters["INTRA_OP_THREAD_COUNT"].CopyFrom(threads)
        assert torchscript == onnx


def test_triton_tells_the_encoders_tensors_apart_without_their_names() -> None:
    # TorchScript has no names of outputs, and the pytorch backend goes by NAME__INDEX, or else by
    # their order. With one input and one output that have no index, there is one order.
    for (spec,) in (wire.VISION_ENCODER.inputs, wire.VISION_ENCODER.outputs):
        assert "__" not in spec.name


@pytest.mark.parametrize("name", RANDOM_CHECKPOINTS)
def test_the_exported_encoder_has_the_types_of_the_table(
    name: str, model_repository: Callable[[str], Path]
) -> None:
    decoder = model_repository(name) / wire.DECODER.name / "1"
    geometry = Bundle.from_json((decoder / files.BUNDLE_FILE).read_text()).geometry
    encoder = model_repository(name) / wire.VISION_ENCODER.name / "1" / files.ENCODER_GRAPH_FILE
    session = onnxruntime.InferenceSession(str(encoder))
    for nodes, specs in (
        (session.get_inputs(), wire.VISION_ENCODER.inputs),
        (session.get_outputs(), wire.VISION_ENCODER.outputs),
    ):
        assert [node.type for node in nodes] == [ONNX_TYPES[spec.data_type] for spec in specs]
    assert session.get_outputs()[0].shape[1:] == [geometry.image_tokens, geometry.encoder_width]


@pytest.mark.parametrize("graph_format", GraphFormat)
@pytest.mark.parametrize("name", RANDOM_CHECKPOINTS)
def test_exported_graphs_have_the_tensors_of_the_tables(
    name: str, graph_format: GraphFormat, model_repository: Repositories
) -> None:
    repository = model_repository(name, graph_format)
    decoder = repository / wire.DECODER.name / "1"
    layers = Bundle.from_json((decoder / files.BUNDLE_FILE).read_text()).geometry.layers

    encoder = opened(repository / wire.VISION_ENCODER.name / "1", files.ENCODER_GRAPH_FILE)
    assert encoder.input_names == [spec.name for spec in wire.VISION_ENCODER.inputs]
    assert encoder.output_names == [spec.name for spec in wire.VISION_ENCODER.outputs]
    prefill = opened(decoder, files.PREFILL_GRAPH_FILE)
    assert prefill.input_names == [graph_tensors.ENCODER_STATES]
    assert prefill.output_names == graph_tensors.cross_names(layers)
    step = opened(decoder, files.STEP_GRAPH_FILE)
    assert step.input_names == graph_tensors.step_input_names(layers)
    assert step.output_names == graph_tensors.step_output_names()
    top = opened(decoder, files.TOP_GRAPH_FILE)
    assert top.input_names == [graph_tensors.LOGITS, graph_tensors.CANDIDATE_RANKS]
    assert top.output_names == [graph_tensors.BEST, graph_tensors.BEST_TOKENS]


def opened(folder: Path, name: str) -> NamedGraph:
    return open_graph(find_graph(folder, name))


@pytest.mark.parametrize("graph_format", GraphFormat)
@pytest.mark.parametrize("name", RANDOM_CHECKPOINTS)
def test_the_top_graph_finds_what_sorting_finds(
    name: str, graph_format: GraphFormat, model_repository: Repositories
) -> None:
    decoder = model_repository(name, graph_format) / wire.DECODER.name / "1"
    vocabulary = Bundle.from_json((decoder / files.BUNDLE_FILE).read_text()).geometry
    top = opened(decoder, files.TOP_GRAPH_FILE)
    shape = (5, vocabulary.vocabulary_size)
    logits = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    logits[2, 7] = -np.inf
    found = top.run({graph_tensors.LOGITS: logits, graph_tensors.CANDIDATE_RANKS: np.arange(9)})
    best, tokens = top_tokens(logits, 9)
    np.testing.assert_array_equal(found[0], best)
    np.testing.assert_array_equal(found[1], tokens)
