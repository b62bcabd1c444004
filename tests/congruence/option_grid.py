"""The options under which captions must equal the truth: one mix for every checkpoint.

Words and tokens are those that the test checkpoints like to generate, each its own, so that
forbidding them changes captions. Token ids are below every checkpoint's vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

from captionserve import GenerationOptions
from captionserve_server.core.options import EARLY_STOPPING_VALUES, DecodingOptions

MAX_LENGTH = 14
IMAGES = 11
"""Images that the options take in turns; a prime, so that every setting meets different ones."""

NOT_IN_GRID = frozenset(
    {
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "output_attentions",
        "allow_partial",
        "output_grounding",
        "output_beams",
        "output_stages",
        "rerank",
        "min_confidence",
    }
)
"""Options that draw tokens, do not change captions, cut them off, or order them by what
transformers does not know (test_grounding.py)."""

_Setting = dict[str, Any]

# Each family is one option in a few settings.
_FAMILIES: tuple[tuple[_Setting, ...], ...] = (
    ({"min_length": 6}, {"min_length": 10}, {"min_length": MAX_LENGTH}),
    ({"repetition_penalty": 1.3}, {"repetition_penalty": 0.8}, {"repetition_penalty": 2.0}),
    ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 3}),
    # Words of one token, and of several, in the random checkpoints.
    ({"bad_words": ("P", "d", "f", "w", " on")}, {"bad_words": ("\u047d", "di", "ww", "on a")}),
    # The second has an end token of two checkpoints.
    ({"suppress_tokens": (67, 86, 141, 257)}, {"suppress_tokens": (0, 7, 18, 121, 166, 227, 266)}),
    ({"prefix": "a"}, {"prefix": "f 2 "}, {"prefix": "a dog on"}),
    ({"max_length": 20}, {"max_length": 17}),
)

_GROUPS = ((2, 2), (3, 3), (4, 2), (6, 2), (6, 3), (8, 4), (16, 4))

_FORCED = (
    ("at",),
    ("dog",),
    ("a b",),
    ("f", "e"),
    ("at", "on"),
    ("red", " 3 "),
    ("a 2", "on"),
    ("at", "b", "3"),
)


def _options(number: int, num_beams: int, **settings: Any) -> DecodingOptions:
    """Options of which those of beam search change from one number to the next."""
    if num_beams > 1:
        settings = {
            "length_penalty": (1.0, 0.5, 2.0, 0.0)[number % 4],
            "early_stopping": EARLY_STOPPING_VALUES[number % 3],
            "num_return_sequences": 1 + number % num_beams,
        } | settings
    return DecodingOptions(num_beams=num_beams, **({"max_length": MAX_LENGTH} | settings))


def _plain() -> list[DecodingOptions]:
    """Greedy search, and every combination of beams, length penalty and early stopping."""
    return [
        DecodingOptions(num_beams=1, max_length=MAX_LENGTH),
        *(
            DecodingOptions(
                num_beams=num_beams,
                max_length=MAX_LENGTH,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
                num_return_sequences=1 + (num_beams > 3),
            )
            for num_beams in (2, 3, 4, 5)
            for length_penalty in (0.5, 1.0, 2.0)
            for early_stopping in EARLY_STOPPING_VALUES
        ),
    ]


def _sizes() -> list[DecodingOptions]:
    """Short and long captions, many beams, all of them returned, and penalties below 0."""
    lengths = [
        _options(number, num_beams, max_length=max_length)
        for number, (num_beams, max_length) in enumerate(
            itertools.product((1, 3, 8), (2, 6, 9, 11, 20))
        )
    ]
    wide = [
        _options(number, num_beams, num_return_sequences=num_beams)
        for number, num_beams in enumerate((2, 3, 5, 8, 16, 16))
    ]
    shortest_first = [
        _options(number, 4, length_penalty=-1.0, early_stopping=early_stopping)
        for number, early_stopping in enumerate(EARLY_STOPPING_VALUES)
    ]
    return lengths + wide + shortest_first


def _single() -> list[DecodingOptions]:
    """Each setting alone."""
    settings = [setting for family in _FAMILIES for setting in family]
    return [
        _options(number, num_beams, **setting)
        for number, (setting, num_beams) in enumerate(itertools.product(settings, (1, 2, 3, 5, 8)))
    ]


def _combined() -> list[DecodingOptions]:
    """Two and three options at once, in settings that take turns."""
    chosen = [
        (number, num_beams, families)
        for size, beams in ((2, (1, 3, 4)), (3, (1, 5)))
        for number, (families, num_beams) in enumerate(
            itertools.product(itertools.combinations(_FAMILIES, size), beams)
        )
    ]
    return [
        _options(number, num_beams, **_merged(number, families))
        for number, num_beams, families in chosen
    ]


def _merged(number: int, families: tuple[tuple[_Setting, ...], ...]) -> _Setting:
    merged: _Setting = {}
    for place, family in enumerate(families):
        merged |= family[(number + place) % len(family)]
    return merged


def _in_groups() -> list[DecodingOptions]:
    """Diverse beam search, alone and with each family."""
    alone = [
        _options(number, num_beams, num_beam_groups=groups, diversity_penalty=penalty)
        for number, ((num_beams, groups), penalty) in enumerate(
            itertools.product(_GROUPS, (0.3, 0.8, 2.0))
        )
    ]
    with_family = [
        _options(
            number,
            num_beams,
            num_beam_groups=groups,
            diversity_penalty=0.5,
            **_merged(number, (family,)),
        )
        for number, (family, (num_beams, groups)) in enumerate(
            itertools.product(_FAMILIES, ((4, 2), (6, 3)))
        )
    ]
    return alone + with_family


def _forced() -> list[DecodingOptions]:
    """Constrained beam search, alone and with each family."""
    alone = [
        _options(number, num_beams, force_words=words)
        for number, (words, num_beams) in enumerate(itertools.product(_FORCED, (2, 3, 4, 5, 8)))
    ]
    # Words of which no token is forbidden, not even as a repetition; see test_option_grid.
    with_family = [
        _options(number, num_beams, force_words=words, **_merged(number, (family,)))
        for number, (family, words, num_beams) in enumerate(
            itertools.product(_FAMILIES, (("at",), ("b", "g")), (3, 6))
        )
    ]
    # Of a prefix that has some of the words, or all.
    with_prefix = [
        _options(number, num_beams, force_words=words, prefix=prefix)
        for number, ((words, prefix), num_beams) in enumerate(
            itertools.product(
                ((("dog",), "a dog on"), (("on", "at"), "a dog on"), (("a", "b"), "a")), (2, 5)
            )
        )
    ]
    return alone + with_family + with_prefix


def _counted_anew() -> list[DecodingOptions]:
    """Lengths without the start token and the prefix, in each kind of search."""
    lengths = ({"max_new_tokens": 5}, {"max_new_tokens": 16}, {"min_new_tokens": 4})
    kinds: tuple[_Setting, ...] = (
        {"num_beams": 1},
        {"num_beams": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 3, "force_words": ("at",)},
    )
    return [
        _options(number, **kind, **length, prefix=prefix)
        for number, (length, kind, prefix) in enumerate(
            itertools.product(lengths, kinds, ("", "a dog on"))
        )
    ]


OPTION_GRID: tuple[DecodingOptions, ...] = tuple(
    dict.fromkeys(
        [
            *_plain(),
            *_sizes(),
            *_single(),
            *_combined(),
            *_in_groups(),
            *_forced(),
            *_counted_anew(),
        ],
    )
)
"""Different options, in an order that stays."""


def client_options(options: DecodingOptions) -> GenerationOptions:
    """The options as a client sets them; those of sampling are refused where none is wanted.

    So is a length in whole tokens beside one in new tokens.
    """
    given: dict[str, Any] = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name not in NOT_IN_GRID
    }
    for length in ("max", "min"):
        if given[f"{length}_new_tokens"] is not None:
            del given[f"{length}_length"]
    return GenerationOptions(**given)


def as_json(options: DecodingOptions) -> str:
    """The same as a caller of Triton writes them, in JSON."""
    return json.dumps(
        {name: value for name, value in vars(client_options(options)).items() if value is not None}
    )
