"""The graph backend on a stand-in of Triton: requests joined into one run and parted again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from captionserve_server.runtime.open_graph import open_graph
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.conftest import Repositories
from tests.unit.triton.answered import error_in
from tests.unit.triton.stand_in import InferenceRequest, Logger, outputs_of, request_of

Array = NDArray[Any]

SIZE = 32
"""Pixels of a side of the small checkpoint's images."""


class Sums:
    """A graph of two inputs and two outputs that differ in shape and type."""

    input_names: tuple[str, ...] = ("LEFT", "RIGHT")
    output_names: tuple[str, ...] = ("SUM", "ROWS")

    def __init__(self) -> None:
        self.runs: list[dict[str, Array]] = []
        self.fails = False

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        self.runs.append(dict(inputs))
        if self.fails:
            raise RuntimeError("a secret")
        both = inputs["LEFT"] + inputs["RIGHT"]
        return [both, both.sum(axis=1).astype(np.int64)]


def opened(repository: Path) -> Any:
    # Imported here, when the stand-in is in its place.
    from captionserve_server.triton.graph_backend import TritonPythonModel

    model = TritonPythonModel()
    numbers = {"intra_op_thread_count": "1", "spinning": "0"}
    config = {
        "default_model_filename": "model.onnx",
        "parameters": {name: {"string_value": number} for name, number in numbers.items()},
    }
    model.initialize(
        {
            "model_config": json.dumps(config),
            "model_name": "vision_encoder",
            "model_repository": str(repository / "vision_encoder"),
            "model_version": "1",
        }
    )
    return model


def model_of(graph: Sums) -> Any:
    from captionserve_server.triton.graph_backend import TritonPythonModel

    model: Any = TritonPythonModel()
    model._graph = graph
    return model


def pixels(images: int, seed: int) -> Array:
    shape = images, 3, SIZE, SIZE
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def sums_of(size: int, seed: int = 0) -> InferenceRequest:
    left, right = np.random.default_rng(seed).integers(0, 100, (2, size, 4)).astype(np.float32)
    return request_of(LEFT=left, RIGHT=right)


def test_an_exported_graph_gives_each_request_its_own_images_states(
    model_repository: Repositories,
) -> None:
    repository = model_repository("projected")
    model = opened(repository)
    batches = [pixels(1, seed=1), pixels(2, seed=2)]
    responses = model.execute([request_of(PIXELS=batch) for batch in batches])
    alone = open_graph(repository / "vision_encoder" / "1" / "model.onnx", threads=1)
    for batch, response in zip(batches, responses, strict=True):
        (expected,) = alone.run({"PIXELS": batch})
        outputs = outputs_of(response)
        assert list(outputs) == ["ENCODER_STATES"]
        np.testing.assert_allclose(outputs["ENCODER_STATES"], expected, rtol=1e-4, atol=1e-5)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=8))
def test_batches_of_any_sizes_are_one_run_and_come_back_apart(sizes: list[int]) -> None:
    graph = Sums()
    requests = [sums_of(size, seed) for seed, size in enumerate(sizes)]
    responses = model_of(graph).execute(requests)
    (joined,) = graph.runs
    assert [len(array) for array in joined.values()] == [sum(sizes)] * 2
    assert len(responses) == len(requests)
    for request, response in zip(requests, responses, strict=True):
        own = {name: tensor.as_numpy() for name, tensor in request.tensors.items()}
        expected = dict(zip(Sums.output_names, Sums().run(own), strict=True))
        outputs = outputs_of(response)
        assert list(outputs) == list(expected)
        for name, output in outputs.items():
            assert output.dtype == expected[name].dtype
            assert output.tolist() == expected[name].tolist()
            # Triton takes the memory as it lies.
            assert output.flags["C_CONTIGUOUS"]


def test_a_run_that_fails_fails_all_its_requests_with_an_error_of_ours() -> None:
    graph = Sums()
    graph.fails = True
    responses = model_of(graph).execute([sums_of(1), sums_of(2)])
    assert len(responses) == 2
    for response in responses:
        assert error_in(response).reason == "MODEL_FAULT"
        assert "secret" not in response.error().message()
    assert Logger.lines[0] == "unexpected RuntimeError: a secret"
    # The next run is none the worse.
    graph.fails = False
    assert not model_of(graph).execute([sums_of(1)])[0].has_error()


def test_an_input_that_is_missing_is_answered_and_not_raised() -> None:
    graph = Sums()
    (response,) = model_of(graph).execute([request_of(LEFT=np.zeros((1, 4), np.float32))])
    assert error_in(response).reason == "MODEL_FAULT"
    assert not graph.runs


def test_a_file_that_is_no_graph_is_refused_when_the_model_is_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "vision_encoder" / "1"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(Exception, match=r"model\.onnx"):
        opened(tmp_path)
