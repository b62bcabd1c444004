"""Graphs of either format: their sizes vary as they may, and files are opened by what they are."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from captionserve_server.core.search.grounding import forced_rows
from captionserve_server.core.step_model import RowRequests, StepBatch
from captionserve_server.export.checkpoint import Checkpoint, load_checkpoint
from captionserve_server.export.sources import (
    StepShape,
    encoder_module,
    prefill_module,
    step_example,
    step_module,
)
from captionserve_server.runtime import graph_tensors
from captionserve_server.runtime import model_repository as files
from captionserve_server.runtime.decoder_graphs import open_decoder
from captionserve_server.runtime.graph import Array, NamedGraph
from captionserve_server.runtime.graph_format import GraphFormat
from captionserve_server.runtime.graph_step_model import GraphStepModel
from captionserve_server.runtime.open_graph import find_graph, open_graph
from captionserve_server.runtime.torchscript_graph import TorchScriptGraph
from captionserve_server.triton import wire
from torch import Tensor

from tests.conftest import Repositories

NAME = "projected"
STEP_SHAPES = (
    StepShape((1,), 1),
    StepShape((4,), 7),
    StepShape((1, 1, 1, 1), 16),
    StepShape((5, 1, 2), 64),
)


@pytest.fixture(scope="module")
def checkpoint(checkpoint_folder: Callable[[str], Path]) -> Checkpoint:
    return load_checkpoint(str(checkpoint_folder(NAME)))


@pytest.fixture(scope="module", params=GraphFormat)
def repository(request: pytest.FixtureRequest, model_repository: Repositories) -> Path:
    """The checkpoint's model repository in each format."""
    return model_repository(NAME, request.param)


def opened(repository: Path, model: wire.ModelSpec, name: str) -> NamedGraph:
    return open_graph(find_graph(repository / model.name / "1", name))


def assert_equal(outputs: list[Array], expected: tuple[Tensor, ...]) -> None:
    assert len(outputs) == len(expected)
    for output, true in zip(outputs, expected, strict=True):
        assert output.dtype == true.numpy().dtype
        np.testing.assert_allclose(output, true.numpy(), atol=1e-4)


@pytest.mark.parametrize("images", [1, 2, 5])
def test_encoder_and_prefill_take_any_number_of_images(
    images: int, repository: Path, checkpoint: Checkpoint
) -> None:
    generator = torch.Generator().manual_seed(images)
    shape = (images, 3, *checkpoint.image_size)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    with torch.inference_mode():
        states = encoder_module(checkpoint)(pixels)
        cross = prefill_module(checkpoint)(states)

    encoder = opened(repository, wire.VISION_ENCODER, files.ENCODER_GRAPH_FILE)
    assert_equal(encoder.run({graph_tensors.PIXELS: pixels.numpy()}), (states,))
    prefill = opened(repository, wire.DECODER, files.PREFILL_GRAPH_FILE)
    assert_equal(prefill.run({graph_tensors.ENCODER_STATES: states.numpy()}), cross)


@pytest.mark.parametrize("shape", STEP_SHAPES)
def test_a_step_takes_any_number_of_captions_rows_and_entries(
    shape: StepShape, repository: Path, checkpoint: Checkpoint
) -> None:
    generator = torch.Generator().manual_seed(0)
    example = step_example(checkpoint.bundle.geometry, shape, generator)
    with torch.inference_mode():
        expected = step_module(checkpoint)(*example)

    step = opened(repository, wire.DECODER, files.STEP_GRAPH_FILE)
    parts = [part if isinstance(part, list) else [part] for part in example]
    arrays = [tensor.numpy() for part in parts for tensor in part]
    assert_equal(step.run(dict(zip(step.input_names, arrays, strict=True))), expected)


def test_numbers_that_are_none_stay_in_their_caption(
    repository: Path, checkpoint: Checkpoint
) -> None:
    geometry = checkpoint.bundle.geometry
    graphs = open_decoder(repository / files.DECODER / "1")
    shape = (1, geometry.image_tokens, geometry.encoder_width)
    sound = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    step_model = GraphStepModel(graphs, geometry, capacity=3)
    slots = step_model.prefill(np.concatenate([np.full_like(sound, np.nan), sound, sound]))
    # The grid of rows has empty cells beside those of the narrow captions.
    counts = np.array([3, 1, 2])
    rows, faulty = int(counts.sum()), slice(3)
    for _ in range(3):
        requests = RowRequests(
            tokens=np.arange(rows),
            parents=np.zeros(rows, np.int64),
            candidate_counts=np.ones(rows, np.int64),
            normalise_first=np.zeros(rows, np.bool_),
        )
        logprobs = step_model.step(StepBatch(slots, counts, requests)).logprobs
        assert np.isnan(logprobs[faulty]).all()
        assert np.isfinite(np.delete(logprobs, faulty)).all()


@pytest.mark.parametrize(("rows", "candidates"), [(1, 1), (2, 16), (9, 40)])
def test_any_number_of_the_best_can_be_found(rows: int, candidates: int, repository: Path) -> None:
    top = opened(repository, wire.DECODER, files.TOP_GRAPH_FILE)
    logits = np.random.default_rng(0).normal(size=(rows, 301)).astype(np.float32)
    inputs = {graph_tensors.LOGITS: logits, graph_tensors.CANDIDATE_RANKS: np.arange(candidates)}
    best, tokens = top.run(inputs)
    order = np.argsort(-logits, axis=1)[:, :candidates]
    np.testing.assert_array_equal(tokens, order)
    np.testing.assert_array_equal(best, np.take_along_axis(logits, order, axis=1))


def test_outputs_are_written_where_they_are_wanted(repository: Path) -> None:
    top = opened(repository, wire.DECODER, files.TOP_GRAPH_FILE)
    logits = np.random.default_rng(0).normal(size=(3, 301)).astype(np.float32)
    inputs = {graph_tensors.LOGITS: logits, graph_tensors.CANDIDATE_RANKS: np.arange(4)}
    wanted: dict[str, Array] = {
        graph_tensors.BEST: np.zeros((3, 4), np.float32),
        graph_tensors.BEST_TOKENS: np.zeros((3, 4), np.int64),
    }
    for written, array in zip(top.run(inputs, into=wanted), wanted.values(), strict=True):
        assert written is array
    for plain, array in zip(top.run(inputs), wanted.values(), strict=True):
        np.testing.assert_array_equal(plain, array)


def test_inputs_may_be_read_only_and_views(model_repository: Repositories) -> None:
    repository = model_repository(NAME, GraphFormat.TORCHSCRIPT)
    store = np.random.default_rng(0).normal(size=(6, 301)).astype(np.float32)
    store.flags.writeable = False
    ranks = np.arange(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        top = opened(repository, wire.DECODER, files.TOP_GRAPH_FILE)
        best, _ = top.run({graph_tensors.LOGITS: store[::2], graph_tensors.CANDIDATE_RANKS: ranks})
    np.testing.assert_array_equal(best, -np.sort(-store[::2], axis=1)[:, :4])


def test_threads_are_set_for_the_process(model_repository: Repositories) -> None:
    path = find_graph(
        model_repository(NAME, GraphFormat.TORCHSCRIPT) / wire.DECODER.name / "1",
        files.TOP_GRAPH_FILE,
    )
    before = torch.get_num_threads()
    try:
        open_graph(path, threads=before + 1)
        assert torch.get_num_threads() == before + 1
        open_graph(path)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_a_torchscript_file_that_export_did_not_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.Identity(), torch.zeros(1)), str(path))
    with pytest.raises(ValueError, match=r"model\.pt does not carry its tensors' names"):
        TorchScriptGraph(path)


def test_what_is_no_graph_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.bin is no graph.*\.onnx, \.pt"):
        open_graph(tmp_path / "model.bin")


def test_a_missing_graph_is_named_in_every_format(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither step\.onnx nor step\.pt"):
        find_graph(tmp_path, files.STEP_GRAPH_FILE)


def without_torch(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Run code where PyTorch is not installed."""
    blocked = f"import sys; sys.modules['torch'] = None\n{code}"
    command = [sys.executable, "-c", blocked, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


OPEN = (
    "from pathlib import Path\n"
    "from captionserve_server.runtime.open_graph import open_graph\n"
    "print(open_graph(Path(sys.argv[1])).input_names)"
)


def test_onnx_is_opened_without_pytorch(model_repository: Repositories) -> None:
    encoder = model_repository(NAME) / wire.VISION_ENCODER.name / "1"
    process = without_torch(OPEN, encoder / files.ENCODER_GRAPH_FILE)
    assert process.stdout.strip() == str([graph_tensors.PIXELS]), process.stderr


def test_torchscript_without_pytorch_says_what_to_install(tmp_path: Path) -> None:
    process = without_torch(OPEN, tmp_path / "model.pt")
    assert "install captionserve-server[torchscript]" in process.stderr.splitlines()[-1]


@pytest.mark.parametrize("tokens", [(3,), (3, 5, 9, 2, 7, 7, 1)])
def test_a_caption_read_at_once_has_the_log_probabilities_of_its_steps(
    tokens: tuple[int, ...], repository: Path, checkpoint: Checkpoint
) -> None:
    geometry = checkpoint.bundle.geometry
    step_model = GraphStepModel(
        open_decoder(repository / files.DECODER / "1"), geometry, capacity=3
    )
    shape = (1, geometry.image_tokens, geometry.encoder_width)
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    slots = step_model.prefill(np.concatenate([image, np.zeros_like(image)]))
    start = checkpoint.bundle.special.start
    other = ((start, 4), (6, 8))
    for slot, read in zip(slots.tolist(), (slots[0], None), strict=True):
        # Beside another caption that begins with other tokens.
        rows = forced_rows([[((start,), tokens), other]])
        at_once = step_model.forced_logprobs(None if read is None else int(read), rows)
        one_by_one = []
        for before, token in zip((start, *tokens), tokens, strict=False):
            requests = RowRequests(
                tokens=np.array([before]),
                parents=np.zeros(1, np.int64),
                candidate_counts=np.zeros(1, np.int64),
                normalise_first=np.zeros(1, np.bool_),
                probe_rows=np.zeros(1, np.int64),
                probe_tokens=np.array([token]),
            )
            answer = step_model.step(StepBatch(np.array([slot]), np.ones(1, np.int64), requests))
            one_by_one += answer.probe_logprobs.tolist()
        np.testing.assert_allclose(at_once[: len(tokens)], one_by_one, atol=1e-4)
        again = step_model.forced_logprobs(None if read is None else int(read), rows)
        np.testing.assert_allclose(again, at_once, atol=1e-6)
