"""Captions of preprocessed tensors in the edge mode equal generate() on the same tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captionserve_server.core.errors import CaptionServeError, InvalidPixelValuesError
from captionserve_server.local import LocalCaptioner

from tests.conftest import CHECKPOINT_NAMES, DEMO
from tests.pictures import pictures
from tests.reference import reference

IMAGES = 4
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1, "max_length": 14},
    "beams": {"num_beams": 4, "num_return_sequences": 2, "max_length": 14},
}
# The same numbers, however they lie in memory and whatever flows through them.
FORMS: dict[str, Callable[[torch.Tensor], Any]] = {
    "numpy": lambda tensor: tensor.numpy(),
    "numpy float64": lambda tensor: tensor.double().numpy(),
    "big-endian": lambda tensor: tensor.numpy().astype(">f4"),
    "torch": lambda tensor: tensor,
    "float64": lambda tensor: tensor.double(),
    "not contiguous": lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2),
    "requires_grad": lambda tensor: tensor.clone().requires_grad_(),
}
HALVES: dict[str, Callable[[torch.Tensor], Any]] = {
    "float16": lambda tensor: tensor.half(),
    "numpy float16": lambda tensor: tensor.half().numpy(),
    "bfloat16": lambda tensor: tensor.bfloat16(),
}
Captioner = Callable[[str], LocalCaptioner]


@pytest.fixture(scope="module")
def captioner(model_repository: Callable[[str], Path]) -> Iterator[Captioner]:
    """Checkpoint name to its captioner in this process."""
    loaded: dict[str, LocalCaptioner] = {}
    with ExitStack() as stack:

        def load(name: str) -> LocalCaptioner:
            if name not in loaded:
                loaded[name] = stack.enter_context(LocalCaptioner(model_repository(name)))
            return loaded[name]

        yield load


@pytest.mark.parametrize("name", CHECKPOINT_NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_has_the_tokens_of_generate(
    name: str, way: str, captioner: Captioner, checkpoint_folder: Callable[[str], Path]
) -> None:
    truth = reference(checkpoint_folder(name))
    tensors = truth.pixel_values(pictures(name, IMAGES))
    expected = [truth.tokens_of(tensor[None], **WAYS[way]) for tensor in tensors]
    assert len({tokens[0] for tokens in expected}) > 1
    each_alone = [captioner(name).caption(tensor, **WAYS[way]) for tensor in tensors]
    several = captioner(name).caption_all(tensors, **WAYS[way])
    # A batch among single ones, as those who load batches have them.
    mixed = captioner(name).caption_each(
        [tensors[:2].numpy(), tensors[2], tensors[3:]], **WAYS[way]
    )
    for results in (each_alone, several, list(mixed)):
        found = []
        for result in results:
            assert not isinstance(result, Exception)
            found.append([caption.token_ids for caption in result.captions])
        assert found == expected


@pytest.mark.parametrize("form", [*FORMS, *HALVES])
def test_a_tensor_may_have_any_form(
    form: str, captioner: Captioner, checkpoint_folder: Callable[[str], Path]
) -> None:
    truth = reference(checkpoint_folder(DEMO))
    tensors = truth.pixel_values(pictures(DEMO, IMAGES))
    made = [(FORMS | HALVES)[form](tensor) for tensor in tensors]
    results = captioner(DEMO).caption_all(made, **WAYS["beams"])
    # Half precision is the processor's rounded; its pixels are found again.
    expected = [truth.tokens_of(tensor[None], **WAYS["beams"]) for tensor in tensors]
    assert [[caption.token_ids for caption in each.captions] for each in results] == expected


def test_what_no_processor_makes_is_refused_and_others_go_on(
    captioner: Captioner, checkpoint_folder: Callable[[str], Path]
) -> None:
    (good,) = reference(checkpoint_folder(DEMO)).pixel_values(pictures(DEMO, 1))
    broken = good.clone()
    broken[0, 0, 0] = float("nan")
    small = good[:, :-1]
    outcomes = list(captioner(DEMO).caption_each([broken, good, small, good * 1.3, good]))
    reasons = [each.reason if isinstance(each, CaptionServeError) else None for each in outcomes]
    refused = InvalidPixelValuesError.reason
    assert reasons == [refused, None, refused, refused, None]


def test_a_batch_is_no_single_image(captioner: Captioner) -> None:
    with pytest.raises(ValueError, match="is several images: caption_all and caption_each take it"):
        captioner(DEMO).caption(np.zeros((1, 3, 96, 96), np.float32))
