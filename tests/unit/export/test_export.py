"""What export refuses, by name, and that it writes nothing then."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import onnx
import pytest
import torch
from captionserve_server.cli.console import ExitCode
from captionserve_server.cli.main import app
from captionserve_server.core.bundle import Bundle
from captionserve_server.core.confidence import Calibration, Logistic
from captionserve_server.export import checkpoint as checkpoint_module
from captionserve_server.export import repository as repository_module
from captionserve_server.export import torchscript_export
from captionserve_server.export.checkpoint import (
    load_checkpoint,
)
from captionserve_server.export.errors import UnsupportedCheckpointError
from captionserve_server.export.repository import OtherFormatError, export_checkpoint
from captionserve_server.export.verify import GraphMismatchError
from captionserve_server.runtime.graph_format import GraphFormat
from captionserve_server.runtime.model_repository import MODELS
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from onnx.numpy_helper import from_array, to_array
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from typer.testing import CliRunner

from tests.conftest import Repositories


@pytest.fixture
def checkpoint(checkpoint_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be spoilt."""
    return Path(shutil.copytree(checkpoint_folder("projected"), tmp_path / "checkpoint"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda config: config.update(model_type="blip"), "'blip'"),
        (lambda config: config["encoder"].update(model_type="swin"), "'swin'"),
        (lambda config: config["decoder"].update(model_type="bert"), "'bert'"),
        (lambda config: config["decoder"].update(add_cross_attention=False), "cross-attention"),
        (lambda config: config["encoder"].update(num_channels=1), "1 channels"),
        (lambda config: config["encoder"].update(image_size=64), "(64, 64)"),
    ],
)
def test_other_architectures_are_refused_by_name(
    checkpoint: Path, change: Callable[[dict[str, Any]], object], named: str
) -> None:
    edit(checkpoint / "config.json", change)
    with pytest.raises(UnsupportedCheckpointError) as caught:
        load_checkpoint(str(checkpoint))
    assert named in str(caught.value)


def test_another_image_processor_is_refused_by_name(checkpoint: Path) -> None:
    edit(
        checkpoint / "preprocessor_config.json",
        lambda settings: settings.update(image_processor_type="CLIPImageProcessor"),
    )
    with pytest.raises(UnsupportedCheckpointError, match="CLIPImageProcessor"):
        load_checkpoint(str(checkpoint))


def change_tokenizer(checkpoint: Path, change: Callable[[Tokenizer], object]) -> None:
    path = checkpoint / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    change(tokenizer)
    tokenizer.save(str(path))


def with_vocabulary(checkpoint: Path, keep: Callable[[int], bool]) -> None:
    def change(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = {text: n for text, n in vocabulary.items() if keep(n)}

    edit(checkpoint / "tokenizer.json", change)


@pytest.mark.parametrize("left", [0, 1, 150, 299])
def test_a_tokenizer_that_is_too_small_for_the_model_is_refused(
    checkpoint: Path, left: int
) -> None:
    with_vocabulary(checkpoint, lambda token: token < left)
    # The end of text is an added token, which stays.
    with pytest.raises(UnsupportedCheckpointError, match=f"has {left + 1} tokens of the model's"):
        load_checkpoint(str(checkpoint))


def test_a_vocabulary_that_is_filled_up_is_not_larger_than_its_tokenizer(
    checkpoint_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    # 520 is a multiple of 8.
    filled_up = Path(shutil.copytree(checkpoint_folder("two_ends"), tmp_path / "filled_up"))
    with_vocabulary(filled_up, lambda token: token not in (517, 518))
    assert load_checkpoint(str(filled_up)).unknown_tokens == 0
    with_vocabulary(filled_up, lambda token: token < 511)
    with pytest.raises(UnsupportedCheckpointError, match="tokens of the model's 520"):
        load_checkpoint(str(filled_up))


def test_a_tokenizer_that_is_larger_than_the_model_is_said(checkpoint: Path) -> None:
    change_tokenizer(checkpoint, lambda tokenizer: tokenizer.add_tokens(["#unknown#", "<pad>"]))
    assert load_checkpoint(str(checkpoint)).unknown_tokens == 2


@pytest.mark.parametrize("filename", ["config.json", "preprocessor_config.json"])
def test_a_missing_file_is_named(checkpoint: Path, filename: str) -> None:
    (checkpoint / filename).unlink()
    with pytest.raises(UnsupportedCheckpointError, match=filename):
        load_checkpoint(str(checkpoint))


def test_missing_weights_are_named(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    lost = "decoder.transformer.h.0.crossattention.c_attn.weight"
    del weights[lost]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedCheckpointError, match="crossattention"):
        load_checkpoint(str(checkpoint))


def test_pickled_code_in_weights_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    (checkpoint / "model.safetensors").unlink()
    torch.save({"weights": Payload()}, checkpoint / "pytorch_model.bin")
    with pytest.raises(UnsupportedCheckpointError, match=r"pytorch_model\.bin"):
        load_checkpoint(str(checkpoint))
    assert not (tmp_path / "ran").exists()


# Half a percent on one matrix: what a wrong constant or layout would do at the least.
SPOILING = 1.005


def spoil_onnx(graph: Path) -> None:
    model = onnx.load(graph)
    weight = next(one for one in model.graph.initializer if one.name == "blocks.1.mlp.c_fc.weight")
    weight.CopyFrom(from_array(SPOILING * to_array(weight), weight.name))
    onnx.save(model, graph)


def export_spoilt_torchscript(checkpoint: Any, graph: Path) -> None:
    with torch.no_grad():
        weight = checkpoint.model.decoder.transformer.h[1].mlp.c_fc.weight
        weight.mul_(SPOILING)
        torchscript_export.export_step(checkpoint, graph)
        weight.div_(SPOILING)


@pytest.mark.parametrize("graph_format", GraphFormat)
def test_a_graph_that_differs_is_not_published(
    graph_format: GraphFormat,
    checkpoint: Path,
    model_repository: Repositories,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Graphs that another test has exported serve again: exporting takes longer than all the rest.
    exported = model_repository("projected", graph_format)

    def copy(checkpoint: Any, graph: Path) -> None:
        shutil.copyfile(exported.joinpath(*graph.parts[-3:]), graph)

    def copy_spoilt_onnx(checkpoint: Any, graph: Path) -> None:
        copy(checkpoint, graph)
        spoil_onnx(graph)

    spoilt = {
        GraphFormat.ONNX: copy_spoilt_onnx,
        GraphFormat.TORCHSCRIPT: export_spoilt_torchscript,
    }

    def export(export_step: Callable[[Any, Path], None], output: Path) -> None:
        graphs = {"encoder": copy, "prefill": copy, "step": export_step, "top": copy}
        exporter = SimpleNamespace(**{f"export_{name}": one for name, one in graphs.items()})
        monkeypatch.setitem(repository_module._EXPORTERS, graph_format, exporter)
        export_checkpoint(str(checkpoint), output, graph_format=graph_format)

    with pytest.raises(GraphMismatchError, match="decoder graph"):
        export(spoilt[graph_format], tmp_path / "spoilt")
    assert not (tmp_path / "spoilt").exists()
    assert not list(tmp_path.glob(".export-*"))
    export(copy, tmp_path / "good")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("renamings", range(5))
def test_a_version_is_added_to_all_models_or_to_none(
    renamings: int,
    checkpoint: Path,
    model_repository: Repositories,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exported = model_repository("projected")
    repository = tmp_path / "repository"
    shutil.copytree(exported, repository)
    shutil.rmtree(repository / "captioner_stream")
    before = contents(repository)

    def copy(checkpoint: Any, graph: Path) -> None:
        model, _, name = graph.parts[-3:]
        shutil.copyfile(exported / model / "1" / name, graph)

    names = ("encoder", "prefill", "step", "top")
    exporter = SimpleNamespace(**{f"export_{name}": copy for name in names})
    monkeypatch.setitem(repository_module._EXPORTERS, GraphFormat.ONNX, exporter)
    rename = Path.rename
    left = [renamings]

    def rename_or_fail(self: Path, target: Path) -> Path:
        if str(repository / "") in str(target):
            left[0] -= 1
            if left[0] == -1:
                raise OSError("the disk is full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_or_fail)
    if renamings < len(MODELS):
        with pytest.raises(OSError, match="disk is full"):
            export_checkpoint(str(checkpoint), repository, version=2)
        assert contents(repository) == before
    else:
        export_checkpoint(str(checkpoint), repository, version=2)
        assert all((repository / model / "2").is_dir() for model in MODELS)
    assert not list(repository.glob(".export-*"))


def test_a_version_is_never_overwritten(model_repository: Callable[[str], Path]) -> None:
    with pytest.raises(FileExistsError):
        export_checkpoint("unused", model_repository("projected"), version=1)


@pytest.mark.parametrize(
    ("present", "added"),
    [
        (GraphFormat.ONNX, GraphFormat.TORCHSCRIPT),
        (GraphFormat.TORCHSCRIPT, GraphFormat.ONNX),
    ],
)
def test_a_repository_holds_one_format(
    present: GraphFormat, added: GraphFormat, model_repository: Repositories
) -> None:
    repository = model_repository("projected", present)
    with pytest.raises(OtherFormatError, match=f"versions in {present.value}"):
        export_checkpoint("unused", repository, version=2, graph_format=added)


def test_the_command_names_the_format_that_does_not_fit(model_repository: Repositories) -> None:
    arguments = ("export", "unused", "--output", str(model_repository("projected")))
    result = CliRunner().invoke(app, [*arguments, "--version", "2", "--format", "torchscript"])
    assert result.exit_code == ExitCode.USAGE
    assert "--format" in result.stderr


def test_the_bundle_carries_the_checkpoints_own_defaults(
    checkpoint_folder: Callable[[str], Path],
) -> None:
    bundle = load_checkpoint(str(checkpoint_folder("two_ends"))).bundle
    assert bundle.special.end == (519, 7)
    assert (bundle.defaults.num_beams, bundle.defaults.max_length) == (3, 12)


def test_the_bundle_carries_the_checkpoints_calibration(checkpoint: Path) -> None:
    assert load_checkpoint(str(checkpoint)).bundle.calibration == Calibration()
    calibration = Calibration(Logistic(-4.5, {"log_odds": 0.8}))
    (checkpoint / "confidence.json").write_text(calibration.to_json())
    bundle = load_checkpoint(str(checkpoint)).bundle
    assert bundle.calibration == calibration
    assert Bundle.from_json(bundle.to_json()) == bundle


@pytest.mark.parametrize(
    "content", [b"", b"{}", b'{"slope": 0.8, "intercept": -4.5}', b'{"caption": "steep"}', b"\xff"]
)
def test_a_malformed_calibration_is_refused_by_name(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "confidence.json").write_bytes(content)
    with pytest.raises(UnsupportedCheckpointError, match=r"confidence\.json"):
        load_checkpoint(str(checkpoint))


def test_a_calibration_for_another_encoder_is_refused(checkpoint: Path) -> None:
    width = load_checkpoint(str(checkpoint)).bundle.geometry.encoder_width
    for numbers in (width, width + 1):
        calibration = Calibration(image=(0.5,) * numbers)
        (checkpoint / "confidence.json").write_text(calibration.to_json())
        if numbers == width:
            bundle = load_checkpoint(str(checkpoint)).bundle
            assert bundle.calibration == calibration
            assert Bundle.from_json(bundle.to_json()) == bundle
        else:
            with pytest.raises(UnsupportedCheckpointError, match=rf"confidence\.json.*{width}"):
                load_checkpoint(str(checkpoint))


def test_a_checkpoint_may_be_a_hub_id(
    checkpoint_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The hub is out of reach of tests; a folder stands in for what it would download.
    folder = checkpoint_folder("projected")

    def download(_: str, name: str, **kwargs: object) -> str:
        if not (folder / name).is_file():
            raise RemoteEntryNotFoundError(name, response=Mock())
        return str(folder / name)

    monkeypatch.setattr(checkpoint_module, "hf_hub_download", download)
    assert checkpoint_module._load_config("someone/a-captioner").decoder.n_layer == 3
    assert checkpoint_module._load_preprocessor("someone/a-captioner").height == 32


def test_a_hub_checkpoint_may_have_a_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = Calibration(Logistic(-4.5, {"log_odds": 0.8}))
    (tmp_path / "confidence.json").write_text(calibration.to_json())
    monkeypatch.setattr(
        checkpoint_module, "hf_hub_download", lambda _, name, **kwargs: tmp_path / name
    )
    assert checkpoint_module._load_calibration("someone/a-captioner", 48) == calibration


def test_a_cached_hub_checkpoint_without_calibration_loads_offline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(_: str, name: str, **kwargs: object) -> str:
        raise LocalEntryNotFoundError(f"no network, and {name} is not in the cache")

    monkeypatch.setattr(checkpoint_module, "hf_hub_download", offline)
    assert checkpoint_module._load_calibration("someone/a-captioner", 48) == Calibration()


@pytest.mark.parametrize("name", ["no such folder", "demo/no/such/folder"])
def test_what_is_neither_folder_nor_hub_id_is_refused_in_words(name: str) -> None:
    with pytest.raises(UnsupportedCheckpointError, match="neither a local folder nor a hub id"):
        load_checkpoint(name)


@pytest.mark.parametrize(
    ("resolves", "proxies", "asks"),
    [(True, {}, True), (False, {}, False), (False, {"https": "http://proxy:3128"}, True)],
)
def test_the_hub_is_not_asked_where_its_name_leads_nowhere(
    resolves: bool, proxies: dict[str, str], asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def resolve(*_: object) -> None:
        if not resolves:
            raise socket.gaierror(-2, "Name or service not known")

    def download(_: str, name: str, *, local_files_only: bool) -> str:
        asked.append(not local_files_only)
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(checkpoint_module, "getproxies", lambda: proxies)
    monkeypatch.setattr(checkpoint_module, "hf_hub_download", download)
    checkpoint_module._hub_is_known.cache_clear()
    with pytest.raises(UnsupportedCheckpointError, match="the Hugging Face hub cannot be reached"):
        load_checkpoint("someone/a-captioner")
    checkpoint_module._hub_is_known.cache_clear()
    assert asked == [asks]
