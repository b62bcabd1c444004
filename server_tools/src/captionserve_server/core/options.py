"""Decoding options: one frozen dataclass, validated once, in one place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from captionserve_server.core.errors import InvalidOptionsError

EarlyStopping = Literal["false", "true", "never"]
EARLY_STOPPING_VALUES: tuple[EarlyStopping, ...] = ("false", "true", "never")

MAX_NUM_BEAMS = 16
# A caption is a sentence; a longer one only holds memory that others wait for.
MAX_MAX_LENGTH = 256
# Keys and values remembered for one caption: its rows x its length.
MAX_ROWS_TIMES_LENGTH = 2048
MAX_WORDS = 64
MAX_WORD_CHARACTERS = 100
MAX_PREFIX_CHARACTERS = 500
MAX_SUPPRESSED_TOKENS = 256
MAX_SEED = 2**63 - 1

_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p", "seed")


@dataclasses.dataclass(frozen=True)
class DecodingOptions:
    """How captions are decoded; names, meanings and defaults of transformers' GenerationConfig.

    What transformers lacks: `seed`, words as text instead of token ids (`bad_words`, `force_words`,
    `prefix`), and `allow_partial`.

    Attributes:
        num_beams: beams of the beam search, 1 to 16; 1 is greedy search, or sampling.
        max_length: most tokens of a caption, the decoder start token included, 2 to 256; times
            num_beams (or num_return_sequences when sampling) at most 2048.
        min_length: fewest tokens, the decoder start token included, 0 to max_length.
        length_penalty: exponent of the length that divides the summed log-probability, -10 to 10.
        early_stopping: "false", "true" or "never".
        num_return_sequences: captions returned, 1 to num_beams, or 1 to 16 when sampling.
        do_sample: draw tokens instead of taking the likeliest; with num_beams 1.
        temperature: divides the logits before drawing, above 0 to 100.
        top_k: draw among so many of the likeliest tokens; 0 for all.
        top_p: draw among the likeliest tokens that together have this probability, above 0 to 1.
        min_p: draw among tokens of at least this share of the likeliest one's probability, 0 to 1.
        seed: of the draws, 0 to 2**63 - 1; the same seed gives the same captions. None: any.
        num_beam_groups: groups of beams that are kept apart from each other; divides num_beams.
        diversity_penalty: subtracted from a token's log-probability for each beam of an earlier
            group that takes it at this step, above 0 to 100 with more than one group.
        repetition_penalty: above 0 to 100; above 1 makes tokens that have occurred unlikelier.
        no_repeat_ngram_size: no n-gram of this many tokens occurs twice; 0 is off.
        bad_words: words or phrases that are not generated, at most 64 of at most 100 characters.
        force_words: words or phrases that every caption contains; needs beam search.
        prefix: text with which the caption begins, at most 500 characters.
        suppress_tokens: token ids that are not generated, at most 256.
        output_attentions: return each token's cross-attention over the image.
        allow_partial: when the deadline comes first, return the best so far instead of failing.

    Raises:
        InvalidOptionsError: naming every field that is out of range or contradicts another.
    """

    num_beams: int = 1
    # generate() allows 20 tokens beside the start token where nothing says otherwise.
    max_length: int = 21
    min_length: int = 0
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = "false"
    num_return_sequences: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words: tuple[str, ...] = ()
    force_words: tuple[str, ...] = ()
    prefix: str = ""
    suppress_tokens: tuple[int, ...] = ()
    output_attentions: bool = False
    allow_partial: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be decoded, all fields at once."""
        violations = _range_violations(self)
        for pair in _contradictions(self):
            # A field that is out of range contradicts others in no way worth telling.
            if not violations.keys() & pair.keys():
                violations |= pair
        _raise_if_any(violations)

    @property
    def rows(self) -> int:
        """Most rows of the decoder that the caption takes at a step."""
        return self.num_return_sequences if self.do_sample else self.num_beams

    @property
    def reproducible(self) -> bool:
        """Whether the same image and options always give the same captions."""
        return not self.allow_partial and (not self.do_sample or self.seed is not None)

    def with_given(self, given: Mapping[str, Any]) -> DecodingOptions:
        """These options with the caller's own in their places.

        Who asks for sampling does not mean the beams of a checkpoint's defaults.

        Args:
            given: option name to value, holding only what the caller set.

        Raises:
            InvalidOptionsError: if a name is unknown, the result is invalid, or the caller set an
                option that another one makes meaningless.
        """
        unknown = set(given) - {field.name for field in dataclasses.fields(self)}
        _raise_if_any(dict.fromkeys(sorted(unknown), "is not an option"))
        if given.get("do_sample"):
            given = {"num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0} | dict(given)
        options = dataclasses.replace(self, **given)
        _raise_if_any(_meaningless(options, given))
        return options


def _raise_if_any(violations: Mapping[str, str]) -> None:
    if violations:
        raise InvalidOptionsError(violations)


# Name, least, most, whether the least itself is allowed.
_RANGES: tuple[tuple[str, float, float, bool], ...] = (
    ("num_beams", 1, MAX_NUM_BEAMS, True),
    ("max_length", 2, MAX_MAX_LENGTH, True),
    ("min_length", 0, MAX_MAX_LENGTH, True),
    # Beyond this the length's power leaves float32 and says nothing about captions any more.
    ("length_penalty", -10.0, 10.0, True),
    ("num_return_sequences", 1, MAX_NUM_BEAMS, True),
    ("temperature", 0.0, 100.0, False),
    ("top_k", 0, 2**31 - 1, True),
    ("top_p", 0.0, 1.0, False),
    ("min_p", 0.0, 1.0, True),
    ("seed", 0, MAX_SEED, True),
    ("num_beam_groups", 1, MAX_NUM_BEAMS, True),
    ("diversity_penalty", 0.0, 100.0, True),
    ("repetition_penalty", 0.0, 100.0, False),
    ("no_repeat_ngram_size", 0, MAX_MAX_LENGTH, True),
)


def _range_violations(options: DecodingOptions) -> dict[str, str]:
    violations = {
        name: f"must be {'' if closed else 'above '}{least:g} to {most:g}, is {value}"
        for name, least, most, closed in _RANGES
        if (value := getattr(options, name)) is not None
        and not _is_within(value, least, most, closed=closed)
    }
    if options.early_stopping not in EARLY_STOPPING_VALUES:
        violations["early_stopping"] = f"must be one of {', '.join(EARLY_STOPPING_VALUES)}"
    violations.update(_text_violations(options))
    suppressed = options.suppress_tokens
    if len(suppressed) > MAX_SUPPRESSED_TOKENS or any(token < 0 for token in suppressed):
        violations["suppress_tokens"] = f"must be at most {MAX_SUPPRESSED_TOKENS} token ids"
    return violations


def _is_within(value: float, least: float, most: float, *, closed: bool) -> bool:
    return math.isfinite(value) and least <= value <= most and (closed or value != least)


def _text_violations(options: DecodingOptions) -> Iterator[tuple[str, str]]:
    for name in ("bad_words", "force_words"):
        words: tuple[str, ...] = getattr(options, name)
        if len(words) > MAX_WORDS:
            yield name, f"must be at most {MAX_WORDS} words, are {len(words)}"
        if any(not word.strip() or len(word) > MAX_WORD_CHARACTERS for word in words):
            yield name, f"each must have 1 to {MAX_WORD_CHARACTERS} characters"
    if len(options.prefix) > MAX_PREFIX_CHARACTERS:
        yield "prefix", f"must be at most {MAX_PREFIX_CHARACTERS} characters"


def _contradictions(options: DecodingOptions) -> list[dict[str, str]]:
    """Groups of fields, each fine alone, that cannot be followed together."""
    return [
        _return_sequences(options),
        _groups(options),
        _forced(options),
        _lengths(options),
        _size(options),
    ]


def _return_sequences(options: DecodingOptions) -> dict[str, str]:
    if options.do_sample and options.num_beams > 1:
        return {
            "do_sample": f"draws one row at a time, num_beams is {options.num_beams}",
            "num_beams": "must be 1 with do_sample",
        }
    if options.do_sample or options.num_return_sequences <= options.num_beams:
        return {}
    return {
        "num_return_sequences": f"must not exceed num_beams, is {options.num_return_sequences} "
        f"with num_beams {options.num_beams}",
        "num_beams": "is below num_return_sequences",
    }


def _groups(options: DecodingOptions) -> dict[str, str]:
    if options.num_beam_groups <= 1:
        return {}
    if options.num_beams % options.num_beam_groups:
        return {
            "num_beam_groups": f"must divide num_beams, is {options.num_beam_groups} "
            f"with num_beams {options.num_beams}",
            "num_beams": "is no multiple of num_beam_groups",
        }
    if options.diversity_penalty == 0.0:
        return {
            "num_beam_groups": "without diversity_penalty all groups are the same",
            "diversity_penalty": "must be above 0 with num_beam_groups",
        }
    return {}


def _forced(options: DecodingOptions) -> dict[str, str]:
    if not options.force_words:
        return {}
    if options.num_beams == 1:
        return {
            "force_words": "needs beam search",
            "num_beams": "must be at least 2 with force_words",
        }
    if options.num_beam_groups > 1:
        return {
            "force_words": "cannot be combined with num_beam_groups",
            "num_beam_groups": "must be 1 with force_words",
        }
    both = {word.strip() for word in options.force_words} & {
        word.strip() for word in options.bad_words
    }
    if both:
        named = ", ".join(sorted(both))
        return {"force_words": f"also in bad_words: {named}", "bad_words": "also in force_words"}
    return {}


def _lengths(options: DecodingOptions) -> dict[str, str]:
    if options.min_length <= options.max_length:
        return {}
    return {
        "min_length": f"must not exceed max_length, is {options.min_length} "
        f"with max_length {options.max_length}",
        "max_length": "is below min_length",
    }


def _size(options: DecodingOptions) -> dict[str, str]:
    if options.rows * options.max_length <= MAX_ROWS_TIMES_LENGTH:
        return {}
    name = "num_return_sequences" if options.do_sample else "num_beams"
    text = f"{name} x max_length must be at most {MAX_ROWS_TIMES_LENGTH}"
    return {name: text, "max_length": text}


def _meaningless(options: DecodingOptions, given: Mapping[str, Any]) -> dict[str, str]:
    """Options that the caller set although another one switches them off."""
    violations: dict[str, str] = {}
    if not options.do_sample:
        for name in _SAMPLING_ONLY:
            if name in given:
                violations |= {name: "needs do_sample", "do_sample": "must be true for sampling"}
    if options.num_beam_groups == 1 and given.get("diversity_penalty", 0.0) != 0.0:
        violations["diversity_penalty"] = "needs num_beam_groups above 1"
        violations["num_beam_groups"] = "must be above 1 for diversity_penalty"
    return violations
