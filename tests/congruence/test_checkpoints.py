"""Checkpoint folders of random settings and damage: captioned as generate() does, or refused.

Whatever a folder is, `captionserve export` ends with 0 and captions that equal generate()'s token
for token, or with 3, one sentence, and nothing written.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from captionserve_server.cli.console import ExitCode
from captionserve_server.cli.main import main
from captionserve_server.export import repository as repository_module
from captionserve_server.local import LocalCaptioner
from captionserve_server.runtime.graph_format import GraphFormat
from transformers import AutoImageProcessor, VisionEncoderDecoderModel

from tests.conftest import Repositories
from tests.reference import picture

# The vocabulary has 301 tokens; token 300 starts and ends.
SETTINGS: dict[str, list[Any]] = {
    "num_beams": [1, 2, 3, 4, 5],
    "max_length": [6, 14, 20, 40],
    "max_new_tokens": [3, 9, 12, 39],
    "min_length": [0, 4, 8],
    "min_new_tokens": [0, 3, 5],
    "length_penalty": [0.5, 1, 2.0],
    "early_stopping": [True, False, "never"],
    "repetition_penalty": [1.3, 0.8],
    "no_repeat_ngram_size": [1, 2, 3],
    "suppress_tokens": [[67, 86, 999], [300], [-1, 5]],
    "begin_suppress_tokens": [[67, 68, 70, 86, 300], [301]],
    "forced_bos_token_id": [5, 86, 300, 301],
    "forced_eos_token_id": [300, [300], 7],
    "eos_token_id": [300, [300, 999], [300, 67], [67]],
    "sequence_bias": [[[[67], 5.0], [[86], -3.0]], [[[67, 67], -8.5], [[5, 86], 30.0]], []],
    "renormalize_logits": [True, False],
    "exponential_decay_length_penalty": [[2, 1.1], [0, 1.6], [4, 0.5]],
    "temperature": [0.0, 0.7],
    "do_sample": [False],
    "top_p": [0.5],
    "typical_p": [0.3],
    "guidance_scale": [1.5],
    "bad_words_ids": [[[5]]],
    "decoder_start_token_id": [300, 5, 400],
    "num_return_sequences": [1, 2],
}
PREPROCESSING: dict[str, list[Any]] = {
    "resample": [0, 1, 3, "bicubic", 17, None],
    "size": [32, [32, 32], {"height": 32, "width": 32}, {"shortest_edge": 40}, "large"],
    "do_center_crop": [True, False],
    "crop_size": [32, [32, 32], {"shortest_edge": 32}],
    "default_to_square": [False, True],
    "do_pad": [True, False],
}


def _pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _list_for_number(path: Path) -> None:
    config = json.loads(path.read_text())
    config["decoder"]["n_layer"] = [3]
    path.write_text(json.dumps(config))


FILES = [
    *("config.json", "generation_config.json", "model.safetensors"),
    *("preprocessor_config.json", "tokenizer.json"),
]


def _missing(path: Path) -> None:
    path.unlink()


def _list(path: Path) -> None:
    path.write_text("[]")


def _adapter(path: Path) -> None:
    path.with_name("adapter_config.json").write_text("{}")


# What is done to which file.
DAMAGE: Mapping[str, tuple[Callable[[Path], None], str]] = {
    f"{spoil.__name__[1:]} {name}": (spoil, name)
    for spoil in (_half, _pointer, _missing, _list)
    for name in FILES
    # Without its generation settings a checkpoint has those of its decoder.
    if (spoil, name) != (_missing, "generation_config.json")
} | {
    "list_for_number config.json": (_list_for_number, "config.json"),
    "adapter": (_adapter, "config.json"),
}


def damage(folder: Path, name: str) -> None:
    """Do one of DAMAGE to a checkpoint."""
    spoil, filename = DAMAGE[name]
    spoil(folder / filename)


def change(path: Path, possible: dict[str, list[Any]], most: int, chance: random.Random) -> None:
    """Set a few settings of a JSON file at random."""
    names = chance.sample(sorted(possible), chance.randint(0, most))
    changed = {name: chance.choice(possible[name]) for name in names}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def truth(folder: Path, seed: int) -> list[int]:
    """What generate() says without a word from us, to the first end token."""
    model = VisionEncoderDecoderModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor(picture(seed), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokens: list[int] = model.generate(pixel_values=pixels)[0, 1:].tolist()
    end = model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    places = [place for place, token in enumerate(tokens) if token in ends]
    return tokens[: places[0] + 1] if places else tokens


@pytest.fixture
def copied_graphs(model_repository: Repositories, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs depend on no setting of generation; exporting them takes longer than all the rest.

    Nor on how images are resized; rescaling and normalisation, which are in the encoder's, stay.
    """
    exported = model_repository("projected")

    def copy(checkpoint: Any, graph: Path) -> None:
        shutil.copyfile(exported.joinpath(*graph.parts[-3:]), graph)

    names = ("encoder", "prefill", "step", "top")
    exporter = SimpleNamespace(**{f"export_{name}": copy for name in names})
    monkeypatch.setitem(repository_module._EXPORTERS, GraphFormat.ONNX, exporter)


def refusal(folder: Path, output: Path) -> str | None:
    """The one sentence with which the command refuses the folder; None where it exports it."""
    said = io.StringIO()
    command = ["captionserve", "export", str(folder), "--output", str(output)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
    if not ended.value.code:
        return None
    # What it says on the way comes before.
    *stages, sentence = said.getvalue().strip().splitlines()
    assert all(stage.endswith(" ...") for stage in stages), stages
    assert ended.value.code == ExitCode.UNSUPPORTED, sentence
    assert sentence.startswith("error: ")
    assert not output.exists()
    return sentence


@pytest.mark.usefixtures("copied_graphs")
def test_any_settings_are_followed_or_refused(
    checkpoint_folder: Callable[[str], Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folders: int = request.config.getoption("--soak-checkpoints")
    exported = 0
    for seed in range(folders):
        chance = random.Random(seed)
        folder = Path(shutil.copytree(checkpoint_folder("projected"), tmp_path / f"from{seed}"))
        change(folder / "generation_config.json", SETTINGS, 4, chance)
        change(folder / "preprocessor_config.json", PREPROCESSING, 1, chance)
        if chance.random() < 0.1:
            damage(folder, chance.choice(sorted(DAMAGE)))
        output = tmp_path / f"to{seed}"
        if refusal(folder, output) is None:
            exported += 1
            with LocalCaptioner(output) as captioner:
                caption = captioner.caption(picture(seed)).captions[0]
            assert list(caption.token_ids) == truth(folder, seed), seed
        shutil.rmtree(folder)
        shutil.rmtree(output, ignore_errors=True)
    logging.getLogger(__name__).info("%d of %d folders were exported", exported, folders)
    assert exported >= folders // 4


@pytest.mark.parametrize("name", sorted(DAMAGE))
def test_a_damaged_folder_is_refused_by_the_files_name(
    name: str, checkpoint_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint_folder("projected"), tmp_path / "from"))
    damage(folder, name)
    sentence = refusal(folder, tmp_path / "to")
    assert sentence is not None
    assert (DAMAGE[name][1] if name != "adapter" else "adapter_config.json") in sentence


@pytest.mark.parametrize("only", [True, False])
def test_what_a_whole_processor_says_of_images_comes_first(
    only: bool, checkpoint_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    from captionserve_server.export.checkpoint import load_checkpoint

    folder = Path(shutil.copytree(checkpoint_folder("projected"), tmp_path / "from"))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    nested = {"image_processor": settings | {"image_mean": 0.25}}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    if only:
        (folder / "preprocessor_config.json").unlink()
    assert load_checkpoint(str(folder)).preprocessor.image_mean == (0.25, 0.25, 0.25)
