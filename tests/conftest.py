"""Fixtures that are dear to make: exported checkpoints and running services, once per session."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest
from captionserve_server.export.logs import quiet_libraries
from captionserve_server.export.precision import Precision
from captionserve_server.runtime import model_repository as files
from captionserve_server.runtime.graph_format import GraphFormat
from captionserve_server.serving.launch import launched_service
from captionserve_server.serving.ready import ReadyReport

from tests.checkpoints import RANDOM_CHECKPOINTS

quiet_libraries()

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent.parent / "demo"
CHECKPOINT_NAMES = (*RANDOM_CHECKPOINTS, DEMO)


class Repositories(Protocol):
    """Exported model repositories, as the fixture of that name gives them."""

    def __call__(self, name: str, graph_format: GraphFormat = GraphFormat.ONNX) -> Path:
        """The folder for a checkpoint's name."""


class QuantisedRepositories(Protocol):
    """Model repositories in a precision, as the fixture `in_precision` gives them."""

    def __call__(self, name: str, precision: Precision) -> Path:
        """The folder for a checkpoint's name."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the `make soak` targets ask for more."""
    parser.addoption(
        "--soak-requests", type=int, default=100, help="requests of tests/faults/test_soak.py"
    )
    parser.addoption(
        "--soak-options",
        type=int,
        default=8,
        help="one of so many combinations of options is asked of a service with random weights",
    )
    parser.addoption(
        "--soak-images", type=int, default=100, help="files of tests/faults/test_image_soak.py"
    )
    parser.addoption(
        "--soak-faults",
        type=float,
        default=10.0,
        help="seconds of tests/faults/test_heals_under_load.py",
    )
    parser.addoption(
        "--soak-many", type=int, default=300, help="images of tests/faults/test_many_soak.py"
    )
    parser.addoption(
        "--soak-bulk", type=int, default=250, help="images of tests/faults/test_bulk_soak.py"
    )
    parser.addoption(
        "--soak-overload",
        type=float,
        default=0.0,
        help="seconds of each phase in which tests/faults/test_overload.py asks for too much",
    )
    parser.addoption(
        "--soak-repository",
        type=Path,
        help="model repository of --soak-overload; the demo's if none",
    )
    parser.addoption(
        "--soak-rollout", type=int, default=1, help="rounds of tests/faults/test_rollout.py"
    )
    parser.addoption(
        "--soak-checkpoints",
        type=int,
        default=8,
        help="folders of tests/congruence/test_checkpoints.py",
    )
    parser.addoption(
        "--release",
        action="store_true",
        help="tests/deploy refuses images whose digest is a placeholder",
    )
    parser.addoption(
        "--images", help="tag of the images that tests/deploy/test_images.py runs in containers"
    )
    parser.addoption(
        "--full-size-repository",
        type=Path,
        help="model repository that it serves in a container of 2 GiB",
    )


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoint name to its folder; random ones are made when first asked for."""
    from captionserve_server.export.random_checkpoint import make_checkpoint

    made: dict[str, Path] = {DEMO: DEMO_FOLDER / "checkpoint"}

    def folder(name: str) -> Path:
        if name not in made:
            recipe = RANDOM_CHECKPOINTS[name]
            made[name] = tmp_path_factory.mktemp("checkpoints") / name
            make_checkpoint(
                made[name], recipe.shape, seed=recipe.seed, safetensors=recipe.safetensors
            )
            settings = made[name] / "generation_config.json"
            settings.write_text(json.dumps(json.loads(settings.read_text()) | recipe.generation))
        return made[name]

    return folder


@pytest.fixture(scope="session")
def model_repository(
    checkpoint_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Repositories:
    """Checkpoint name and format to its model repository; exported when first asked for."""
    from captionserve_server.export.repository import export_checkpoint

    exported: dict[tuple[str, GraphFormat], Path] = {}

    def repository(name: str, graph_format: GraphFormat = GraphFormat.ONNX) -> Path:
        key = name, graph_format
        if key not in exported:
            output = tmp_path_factory.mktemp("repositories") / name
            export_checkpoint(str(checkpoint_folder(name)), output, graph_format=graph_format)
            exported[key] = output
        return exported[key]

    return repository


@pytest.fixture(scope="session")
def in_precision(
    model_repository: Repositories, tmp_path_factory: pytest.TempPathFactory
) -> QuantisedRepositories:
    """Checkpoint name and precision to its model repository: fp32's graphs, quantised."""
    from captionserve_server.export.quantise import (
        quantise_encoder,
        quantise_prefill,
        quantise_step,
    )

    quantisers = {
        Path(files.VISION_ENCODER, "1", files.ENCODER_GRAPH_FILE): quantise_encoder,
        Path(files.DECODER, "1", files.PREFILL_GRAPH_FILE): quantise_prefill,
        Path(files.DECODER, "1", files.STEP_GRAPH_FILE): quantise_step,
    }
    made: dict[tuple[str, Precision], Path] = {}

    def repository(name: str, precision: Precision) -> Path:
        fp32 = model_repository(name)
        if precision is Precision.FP32:
            return fp32
        key = name, precision
        if key not in made:
            folder = tmp_path_factory.mktemp("quantised") / name
            shutil.copytree(fp32, folder)
            for graph, quantise in quantisers.items():
                quantise(fp32 / graph, folder / graph, precision)
            made[key] = folder
        return made[key]

    return repository


@pytest.fixture(scope="session")
def service(model_repository: Callable[[str], Path]) -> Iterator[Callable[[str], ReadyReport]]:
    """Checkpoint name to its running service; started when first asked for."""
    running: dict[str, ReadyReport] = {}
    with ExitStack() as stack:

        def start(name: str) -> ReadyReport:
            if name not in running:
                launched = launched_service(model_repository(name))
                running[name] = stack.enter_context(launched)
            return running[name]

        yield start
        # All at once: each takes seconds to end.
        for report in running.values():
            os.kill(report.pids["gateway"], signal.SIGTERM)
