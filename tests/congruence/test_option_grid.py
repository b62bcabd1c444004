"""The grid of options is wide, and every checkpoint can follow it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from captionserve_server.core.options import DecodingOptions

from tests.conftest import CHECKPOINT_NAMES
from tests.congruence.option_grid import NOT_IN_GRID, OPTION_GRID
from tests.reference import reference

FEWEST = 300


def test_there_are_many_different_options() -> None:
    assert len(set(OPTION_GRID)) == len(OPTION_GRID) >= FEWEST


@pytest.mark.parametrize("field", dataclasses.fields(DecodingOptions), ids=lambda field: field.name)
def test_what_decides_the_caption_varies_and_the_rest_does_not(
    field: dataclasses.Field[object],
) -> None:
    values = {getattr(options, field.name) for options in OPTION_GRID}
    if field.name in NOT_IN_GRID:
        assert values == {field.default}
    else:
        assert len(values) > 1


@pytest.mark.parametrize("name", CHECKPOINT_NAMES)
def test_words_and_tokens_fit_the_checkpoint(
    name: str, checkpoint_folder: Callable[[str], Path]
) -> None:
    truth = reference(checkpoint_folder(name))
    vocabulary_size = truth.model.config.decoder.vocab_size
    for options in OPTION_GRID:
        rules = truth.rules(options)
        needed = sum(constraint.length for constraint in truth.constraints(options))
        assert max(1, needed) <= rules.longest, options
        assert all(token < vocabulary_size for token in options.suppress_tokens), options
        # Else a search would have to go on with forbidden tokens.
        assert rules.kept * options.num_beam_groups < vocabulary_size, options
