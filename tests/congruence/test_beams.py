"""The history of a beam search against generate(): its beam_indices, and every score on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from captionserve_server.local import LocalCaptioner, LocalResult
from PIL import Image

from tests.conftest import DEMO, DEMO_FOLDER, Repositories
from tests.reference import reference

IMAGES = sorted(path for path in (DEMO_FOLDER / "images").iterdir() if path.suffix != ".json")
SEARCHES: list[dict[str, Any]] = [
    {"num_beams": 4, "num_return_sequences": 4},
    {"num_beams": 7, "num_return_sequences": 7, "length_penalty": 0.0},
    {"num_beams": 3, "num_return_sequences": 3, "early_stopping": True},
]


@pytest.fixture(scope="module")
def captioner(model_repository: Repositories) -> Iterator[LocalCaptioner]:
    with LocalCaptioner(model_repository(DEMO), threads=1) as opened:
        yield opened


def walked_parents(result: LocalResult) -> list[list[int]]:
    """Of each caption, the beam that each of its tokens continues."""
    assert result.beams is not None
    return [
        [step[at].parent for step, at in zip(result.beams.steps, path.continuations, strict=False)]
        for path in result.beams.paths
    ]


@pytest.mark.parametrize("options", SEARCHES, ids=str)
@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.stem)
def test_captions_take_the_beams_that_generate_names(
    image: Path,
    options: dict[str, Any],
    captioner: LocalCaptioner,
    checkpoint_folder: Callable[[str], Path],
) -> None:
    truth = reference(checkpoint_folder(DEMO))
    pixels = truth.pixel_values([Image.open(image).convert("RGB")])
    with torch.no_grad():
        true = truth.model.generate(
            pixel_values=pixels, return_dict_in_generate=True, output_scores=True, **options
        )

    result = captioner.caption(image, output_beams=True, **options)

    # -1 fills what is behind a caption's end.
    indices = [[at for at in row if at >= 0] for row in true.beam_indices.tolist()]
    assert walked_parents(result) == indices


@pytest.mark.parametrize("image", IMAGES[:3], ids=lambda path: path.stem)
def test_kept_beams_are_the_best_of_what_the_model_says(
    image: Path, captioner: LocalCaptioner, checkpoint_folder: Callable[[str], Path]
) -> None:
    """Each step anew, from transformers' log-probabilities of the beams as they were kept."""
    truth = reference(checkpoint_folder(DEMO))
    states = truth.model.encoder(truth.pixel_values([Image.open(image).convert("RGB")]))
    beams = captioner.caption(image, num_beams=4, output_beams=True).beams
    assert beams is not None
    start = truth.model.generation_config.decoder_start_token_id
    tokens: dict[int, tuple[int, ...]] = {0: (start,)}
    for step, following in pairwise((*beams.steps, ())):
        rows = sorted(tokens)
        with torch.no_grad():
            logits = truth.model(
                encoder_outputs=(states.last_hidden_state.repeat(len(rows), 1, 1),),
                decoder_input_ids=torch.tensor([tokens[row] for row in rows]),
            ).logits[:, -1]
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        for each in step:
            true = logprobs[rows.index(each.parent), each.token_id].item()
            assert each.token_logprob == pytest.approx(true, abs=2e-3)
        likelier = sorted((each.score for each in step), reverse=True)
        assert [each.score for each in step] == likelier
        kept = [each for each in step if each.fate == "kept"]
        dropped = [each.score for each in step if each.fate == "dropped"]
        if following:
            assert min(each.score for each in kept) >= max(dropped)
        tokens = {
            each.beam: (*tokens[each.parent], each.token_id)
            for each in kept
            if each.beam is not None
        }
