"""`export --image-size`: transformers' interpolate_pos_encoding, token for token."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captionserve_server.cli.main import main
from captionserve_server.core.options import DecodingOptions
from captionserve_server.export.precision import Precision
from captionserve_server.export.repository import export_checkpoint
from captionserve_server.local import LocalCaptioner
from captionserve_server.runtime.graph_format import GraphFormat
from PIL import Image
from transformers import VisionEncoderDecoderModel
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests.conftest import Repositories
from tests.congruence.test_engine import InProcess
from tests.reference import picture

PICTURES = [picture(seed, width=90, height=70) for seed in range(4)]
GREEDY: dict[str, Any] = {"num_beams": 1, "max_length": 16}
BEAMS: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_length": 14}
# Above and below the checkpoint's own size, which is 32 of patches of 8, and 48 of 16.
SIZES = [
    ("projected", 48, GraphFormat.ONNX),
    ("projected", 24, GraphFormat.TORCHSCRIPT),
    ("projected", 40, GraphFormat.TORCHSCRIPT),
    ("deit", 96, GraphFormat.ONNX),
    ("deit", 16, GraphFormat.TORCHSCRIPT),
]

Folder = Callable[[str], Path]


class Truth:
    """A checkpoint in transformers that reads images of another size."""

    def __init__(self, folder: Path, size: int) -> None:
        self.model = VisionEncoderDecoderModel.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        side = {"height": size, "width": size}
        self.processor: Any = ViTImageProcessorPil.from_pretrained(folder, size=side)

    @torch.no_grad()
    def generated(self, image: Image.Image, **options: Any) -> Any:
        return self.model.generate(
            pixel_values=self.processor(image, return_tensors="pt")["pixel_values"],
            interpolate_pos_encoding=True,
            return_dict_in_generate=True,
            output_attentions=True,
            do_sample=False,
            **options,
        )

    def tokens(self, image: Image.Image, **options: Any) -> list[tuple[int, ...]]:
        end = self.model.generation_config.eos_token_id
        rows = self.generated(image, **options).sequences[:, 1:].tolist()
        return [tuple(row[: row.index(end) + 1] if end in row else row) for row in rows]


@pytest.fixture(scope="module")
def sized(checkpoint_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Checkpoint name, size, format and precision to a model repository."""
    exported: dict[tuple[Any, ...], Path] = {}

    def repository(
        name: str,
        size: int,
        graph_format: GraphFormat = GraphFormat.ONNX,
        precision: Precision = Precision.FP32,
    ) -> Path:
        key = name, size, graph_format, precision
        if key not in exported:
            output = tmp_path_factory.mktemp("sized") / name
            report = export_checkpoint(
                str(checkpoint_folder(name)),
                output,
                image_size=size,
                graph_format=graph_format,
                precision=precision,
            )
            assert report.image_size == (size, size)
            exported[key] = output
        return exported[key]

    return repository


@pytest.mark.parametrize(("name", "size", "graph_format"), SIZES)
def test_captions_equal_transformers_with_interpolated_positions(
    name: str, size: int, graph_format: GraphFormat, sized: Any, checkpoint_folder: Folder
) -> None:
    truth = Truth(checkpoint_folder(name), size)
    requests = [
        (image, DecodingOptions(**options)) for image in PICTURES for options in (GREEDY, BEAMS)
    ]
    results = InProcess(sized(name, size, graph_format)).captions(requests)
    expected = [truth.tokens(image, **options) for image in PICTURES for options in (GREEDY, BEAMS)]
    assert [[caption.token_ids for caption in each] for each in results] == expected
    assert len({str(each) for each in expected}) > len(PICTURES)


@pytest.mark.parametrize(("name", "size"), [("projected", 48), ("deit", 96)])
def test_the_heat_map_has_the_grid_of_the_size(
    name: str, size: int, sized: Any, checkpoint_folder: Folder
) -> None:
    truth = Truth(checkpoint_folder(name), size)
    side = size // truth.model.config.encoder.patch_size
    with LocalCaptioner(sized(name, size), threads=1) as captioner:
        assert captioner.model()["image_size"] == (size, size)
        for image in PICTURES:
            found = captioner.caption(image, output_attentions=True, **GREEDY).captions[0]
            attention = found.attention
            assert attention is not None
            assert attention.shape == (len(found.token_ids), side, side)
            # [layers][1, heads, 1, image tokens] of each step.
            steps = truth.generated(image, **GREEDY).cross_attentions
            means = [torch.stack(step).mean(dim=(0, 1, 2, 3)).numpy() for step in steps]
            patches = np.stack(means)[:, -side * side :].reshape(-1, side, side)
            np.testing.assert_allclose(attention, patches, atol=1e-4)


def test_the_checkpoints_own_size_changes_nothing(
    sized: Any, model_repository: Repositories
) -> None:
    own, plain = sized("projected", 32), model_repository("projected")
    with LocalCaptioner(own, threads=1) as same, LocalCaptioner(plain, threads=1) as captioner:
        pairs = zip(same.caption_all(PICTURES), captioner.caption_all(PICTURES), strict=True)
        assert all(a.captions[0].token_ids == b.captions[0].token_ids for a, b in pairs)


@pytest.mark.parametrize(("name", "size"), [("projected", 48), ("deit", 96)])
def test_int8_is_near_fp32_at_another_size(name: str, size: int, sized: Any) -> None:
    # Export itself has compared the graphs with PyTorch.
    with (
        LocalCaptioner(sized(name, size, precision=Precision.INT8), threads=1) as int8,
        LocalCaptioner(sized(name, size), threads=1) as fp32,
    ):
        assert int8.model()["precision"] == "int8"
        for image in PICTURES:
            found, expected = int8.caption(image), fp32.caption(image)
            assert found.captions[0].token_ids[0] == expected.captions[0].token_ids[0]
            first = found.captions[0].token_logprobs[0], expected.captions[0].token_logprobs[0]
            assert first[0] == pytest.approx(first[1], abs=0.5)


def test_an_image_processor_that_crops_keeps_its_share(
    checkpoint_folder: Folder, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in checkpoint_folder("deit").iterdir():
        (folder / path.name).symlink_to(path)
    settings = {
        "image_processor_type": "DeiTImageProcessor",
        "size": {"height": 56, "width": 56},
        "crop_size": {"height": 48, "width": 48},
        "resample": 3,
    }
    (folder / "preprocessor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    export_checkpoint(str(folder), tmp_path / "out", image_size=96)
    truth = Truth(folder, 96)
    sides = {"size": {"height": 112, "width": 112}, "crop_size": {"height": 96, "width": 96}}
    truth.processor = DeiTImageProcessorPil(**(settings | sides))
    with LocalCaptioner(tmp_path / "out", threads=1) as captioner:
        for image in PICTURES:
            found = [caption.token_ids for caption in captioner.caption(image, **BEAMS).captions]
            assert found == truth.tokens(image, **BEAMS)


@pytest.mark.parametrize(
    ("size", "said"), [("50", "8 pixels"), ("0", "8 pixels"), ("-8", "8"), ("1032", "1024")]
)
def test_a_size_that_is_none_is_refused_before_anything_is_written(
    size: str,
    said: str,
    checkpoint_folder: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, output = str(checkpoint_folder("projected")), tmp_path / "out"
    command = ["captionserve", "export", folder, "--output", str(output), "--image-size", size]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert not output.exists()
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "--image-size" in error
    assert said in error
