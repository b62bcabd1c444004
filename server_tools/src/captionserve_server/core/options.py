"""Decoding options: each is said once, as a field with its type, range and help, and checked here.

Whoever brings options, a JSON text, the gateway or a caller in this process, gets the same checks:
one InvalidOptionsError that names every field at fault. The command line and the documentation
are derived from `OPTIONS`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict, get_args

from captionserve_server.core.errors import InvalidOptionsError, shortened

EarlyStopping = bool | Literal["never"]
EARLY_STOPPING_VALUES: tuple[EarlyStopping, ...] = (False, True, "never")
Rerank = Literal["likelihood", "grounding"]

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
# Full lists of words, each character written as two escapes, take about 165,000 bytes.
MAX_OPTIONS_BYTES = 256 * 1024

# Python reads no integer of more than 4,300 digits; one of so many is beyond every range already.
_MAX_DIGITS = 100
# Of what a caller wrote an error repeats the beginning.
_SHOWN_BYTES = 60
_SHOWN_UNKNOWN_NAMES = 8

# Options that count generated tokens only, and those whose place they take.
_NEW_TOKENS = {"max_new_tokens": "max_length", "min_new_tokens": "min_length"}

_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p", "seed")


@dataclasses.dataclass(frozen=True)
class Option:
    """What is said of one option beside its name and default.

    Attributes:
        kind: int, float, bool or str; of a list, its elements'.
        help: its meaning in one sentence.
        least: smallest number allowed; None where there is no range.
        most: largest number allowed.
        above_least: whether the least itself is too small.
        words: other values it takes, as text; of a text, the only ones.
        max_items: most elements of a list; None for what is no list.
        min_characters: fewest characters of a text, spaces around it not counted.
        max_characters: most characters of a text.
        flag: its flag on the command line where that is not its name.
    """

    kind: type
    help: str
    least: float | None = None
    most: float | None = None
    above_least: bool = False
    words: tuple[str, ...] = ()
    max_items: int | None = None
    min_characters: int = 0
    max_characters: int | None = None
    flag: str | None = None

    def fault(self, value: object) -> str | None:
        """What is wrong with a value, None if nothing is."""
        if self.max_items is None:
            return self._fault_of_one(value)
        if not isinstance(value, tuple):
            return f"must be a list, is {_type_name(value)}"
        if len(value) > self.max_items:
            return f"must have at most {self.max_items} elements, has {len(value)}"
        return next(
            (f"each {fault}" for each in value if (fault := self._fault_of_one(each))), None
        )

    def _fault_of_one(self, value: object) -> str | None:
        if isinstance(value, str):
            if self.words and value not in self.words:
                return f"must be {self.wanted()}, is {_short(value)!r}"
            if not self.words and self.kind is not str:
                return f"must be {self.wanted()}, is text"
            return self._fault_of_text(value)
        # True is a number to Python, but nobody's number of beams.
        if type(value) is not self.kind:
            return f"must be {self.wanted()}, is {_type_name(value)}"
        if self.least is None or self.most is None:
            return None
        number: Any = value
        if not self.least <= number <= self.most or (self.above_least and number == self.least):
            return f"must be {self.range()}, is {_shown_number(number)}"
        return None

    def _fault_of_text(self, text: str) -> str | None:
        most = math.inf if self.max_characters is None else self.max_characters
        if not (self.min_characters <= len(text.strip()) and len(text) <= most):
            return f"must have {self.min_characters} to {most} characters"
        # JSON's escapes can write half of a pair, which no tokenizer takes.
        if any("\ud800" <= character <= "\udfff" for character in text):
            return "must be valid Unicode"
        return None

    def wanted(self) -> str:
        """The type in words, such as "an integer"."""
        names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
        own = [] if self.words and self.kind is str else [names[self.kind]]
        return " or ".join([*own, *(f'"{word}"' for word in self.words)])

    def range(self) -> str:
        """The range in words, such as "1 to 16"; empty where there is none."""
        if self.least is None or self.most is None:
            return ""
        above = "above " if self.above_least else ""
        return f"{above}{_shown_number(self.least)} to {_shown_number(self.most)}"


def _option(default: Any, kind: type, help: str, **more: Any) -> Any:
    """A dataclass field that carries its Option."""
    return dataclasses.field(default=default, metadata={"option": Option(kind, help, **more)})


@dataclasses.dataclass(frozen=True)
class DecodingOptions:
    """How captions are decoded; names, meanings and defaults of transformers' GenerationConfig.

    What transformers lacks: `seed`, words as text instead of token ids (`bad_words`, `force_words`,
    `prefix`), `allow_partial`, `output_grounding`, `rerank` and `min_confidence`.

    Raises:
        InvalidOptionsError: naming every field that has the wrong type, is out of range or
            contradicts another.
    """

    num_beams: int = _option(
        1,
        int,
        "Beams of the beam search; 1 is greedy search, or sampling.",
        least=1,
        most=MAX_NUM_BEAMS,
    )
    # generate() allows 20 tokens beside the start token where nothing says otherwise.
    max_length: int = _option(
        21,
        int,
        "Most tokens of a caption, the decoder start token included.",
        least=2,
        most=MAX_MAX_LENGTH,
    )
    min_length: int = _option(
        0, int, "Fewest tokens, the decoder start token included.", least=0, most=MAX_MAX_LENGTH
    )
    max_new_tokens: int | None = _option(
        None,
        int,
        "Most tokens generated, start token and prefix not counted; instead of max_length.",
        least=1,
        most=MAX_MAX_LENGTH - 1,
    )
    min_new_tokens: int | None = _option(
        None,
        int,
        "Fewest tokens generated, start token and prefix not counted; instead of min_length.",
        least=0,
        most=MAX_MAX_LENGTH - 1,
    )
    # Beyond this the length's power leaves float32 and says nothing about captions any more.
    length_penalty: float = _option(
        1.0,
        float,
        "Exponent of the length that divides the summed log-probability.",
        least=-10.0,
        most=10.0,
    )
    early_stopping: EarlyStopping = _option(  # noqa: RUF009  # It is a dataclass field.
        False,
        bool,
        "True stops once num_beams captions are complete, false when better ones are unlikely, "
        "never only when no better one is possible.",
        words=("never",),
    )
    num_return_sequences: int = _option(
        1,
        int,
        "Captions to return, best first; at most num_beams unless sampling.",
        least=1,
        most=MAX_NUM_BEAMS,
    )
    do_sample: bool = _option(
        False, bool, "Draw tokens instead of taking the likeliest; with num_beams 1."
    )
    temperature: float = _option(
        1.0,
        float,
        "Divides the logits before drawing.",
        least=0.0,
        most=100.0,
        above_least=True,
    )
    top_k: int = _option(
        50,
        int,
        "Draw among so many of the likeliest tokens; 0 for all.",
        least=0,
        most=2**31 - 1,
    )
    top_p: float = _option(
        1.0,
        float,
        "Draw among the likeliest tokens that together have this probability.",
        least=0.0,
        most=1.0,
        above_least=True,
    )
    min_p: float = _option(
        0.0,
        float,
        "Draw among tokens of at least this share of the likeliest one's probability.",
        least=0.0,
        most=1.0,
    )
    seed: int | None = _option(
        None,
        int,
        "Seed of the draws; the same one gives the same captions.",
        least=0,
        most=MAX_SEED,
    )
    num_beam_groups: int = _option(
        1,
        int,
        "Groups of beams that are kept apart from each other; divides num_beams.",
        least=1,
        most=MAX_NUM_BEAMS,
    )
    diversity_penalty: float = _option(
        0.0,
        float,
        "Subtracted from a token's log-probability for each beam of an earlier group that takes "
        "it at this step.",
        least=0.0,
        most=100.0,
    )
    repetition_penalty: float = _option(
        1.0,
        float,
        "Above 1 makes tokens that have occurred unlikelier.",
        # Logits divided by less may leave float32.
        least=0.01,
        most=100.0,
    )
    no_repeat_ngram_size: int = _option(
        0,
        int,
        "No n-gram of this many tokens occurs twice; 0 is off.",
        least=0,
        most=MAX_MAX_LENGTH,
    )
    bad_words: tuple[str, ...] = _option(
        (),
        str,
        "Words or phrases that are not generated.",
        max_items=MAX_WORDS,
        min_characters=1,
        max_characters=MAX_WORD_CHARACTERS,
        flag="--bad-word",
    )
    force_words: tuple[str, ...] = _option(
        (),
        str,
        "Words or phrases that every caption contains; needs beam search.",
        max_items=MAX_WORDS,
        min_characters=1,
        max_characters=MAX_WORD_CHARACTERS,
        flag="--force-word",
    )
    prefix: str = _option(
        "", str, "Text with which the caption begins.", max_characters=MAX_PREFIX_CHARACTERS
    )
    suppress_tokens: tuple[int, ...] = _option(
        (),
        int,
        "Token ids that are not generated.",
        least=0,
        most=2**31 - 1,
        max_items=MAX_SUPPRESSED_TOKENS,
        flag="--suppress-token",
    )
    output_attentions: bool = _option(
        False, bool, "Return each token's cross-attention over the image.", flag="--attention"
    )
    allow_partial: bool = _option(
        False,
        bool,
        "When the deadline comes first, return the best so far instead of failing.",
        flag="--allow-partial",
    )
    output_grounding: bool = _option(
        False,
        bool,
        "Return how much likelier the image makes each token than no image does.",
        flag="--grounding",
    )
    rerank: Rerank = _option(  # noqa: RUF009  # It is a dataclass field.
        "likelihood",
        str,
        "What puts captions in order and says which are returned: likelihood, which is their "
        "score, or grounding, of all that num_beams or num_return_sequences made.",
        words=get_args(Rerank),
    )
    min_confidence: float = _option(
        0.0,
        float,
        "Captions of a lower confidence say needs_review; 0 for none.",
        least=0.0,
        most=1.0,
    )
    output_beams: bool = _option(
        False, bool, "Return what the search considered at each step.", flag="--beams"
    )
    output_stages: bool = _option(False, bool, "Return how long each stage took.", flag="--stages")

    def __post_init__(self) -> None:
        """Refuse what cannot be decoded, all fields at once."""
        _raise_if_any(_violations(vars(self), given=()))

    @property
    def length_name(self) -> str:
        """The option that says the most tokens."""
        return "max_length" if self.max_new_tokens is None else "max_new_tokens"

    def new_tokens(self, given: int) -> int:
        """Most tokens generated after `given` of them; negative where these are too many."""
        return self.max_length - given if self.max_new_tokens is None else self.max_new_tokens

    def counted_from(self, given: int) -> DecodingOptions:
        """The same for a caption that begins with `given` tokens, its lengths in whole tokens.

        Raises:
            InvalidOptionsError: naming max_new_tokens or min_new_tokens, if the whole is too long.
        """
        whole = {
            name: given + new
            for new_name, name in _NEW_TOKENS.items()
            if (new := getattr(self, new_name)) is not None
        }
        if not whole:
            return self
        values: dict[str, Any] = vars(self) | whole | dict.fromkeys(_NEW_TOKENS)
        try:
            return DecodingOptions(**values)
        except InvalidOptionsError as error:
            names = {name: new_name for new_name, name in _NEW_TOKENS.items() if name in whole}
            raise InvalidOptionsError(
                {names.get(name, name): text for name, text in error.field_violations.items()}
            ) from error

    @property
    def rows(self) -> int:
        """Most rows of the decoder that the caption takes at a step."""
        return self.num_return_sequences if self.do_sample else self.num_beams

    @property
    def wants_grounding(self) -> bool:
        """Whether finished captions are read once more, without their image."""
        return self.output_grounding or self.rerank == "grounding"

    @property
    def candidates(self) -> int:
        """Finished captions among which those to be returned are chosen."""
        return self.rows if self.rerank == "grounding" else self.num_return_sequences

    @property
    def reproducible(self) -> bool:
        """Whether the same image and options always give the same captions."""
        return not self.allow_partial and (not self.do_sample or self.seed is not None)

    def with_given(self, given: Mapping[str, object]) -> DecodingOptions:
        """These options with the caller's own in their places.

        Who asks for sampling does not mean the beams of a checkpoint's defaults.

        Args:
            given: option name to value as JSON has it; None is not set. Python's and numpy's own
                integers, reals and sequences will do.

        Raises:
            InvalidOptionsError: if a name is unknown, the result is invalid, or the caller set an
                option that another one makes meaningless.
        """
        own = {name: value for name, value in given.items() if value is not None}
        unknown = sorted(own.keys() - OPTIONS.keys())[:_SHOWN_UNKNOWN_NAMES]
        known = {name: _plain(OPTIONS[name], own[name]) for name in own.keys() & OPTIONS.keys()}
        values: dict[str, Any] = dict(vars(self))
        if known.get("do_sample") is True:
            values |= {"num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0}
        # The caller's way of counting comes before the checkpoint's.
        values |= {new: None for new, whole in _NEW_TOKENS.items() if whole in known}
        values |= known
        _raise_if_any(
            dict.fromkeys(map(_short, unknown), "is not an option")
            | _violations(values, given=known.keys())
        )
        return DecodingOptions(**values)

    def as_given(self) -> dict[str, object]:
        """All options as plain JSON values; what is None is left out."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
            if value is not None
        }

    @classmethod
    def from_given(cls, values: Mapping[str, object]) -> DecodingOptions:
        """Options from what `as_given` gave, exactly; what is left out has its default.

        Unlike `with_given`, an option that another one switches off may be there: a checkpoint may
        have a temperature of its own for those who sample.

        Raises:
            InvalidOptionsError: if a name is unknown or the options are invalid.
        """
        unknown = sorted(values.keys() - OPTIONS.keys())[:_SHOWN_UNKNOWN_NAMES]
        _raise_if_any(dict.fromkeys(map(_short, unknown), "is not an option"))
        plain: dict[str, Any] = {
            name: _plain(OPTIONS[name], value) for name, value in values.items()
        }
        return cls(**plain)


OPTIONS: Mapping[str, Option] = {
    field.name: field.metadata["option"] for field in dataclasses.fields(DecodingOptions)
}
"""Every option by name, in the order of DecodingOptions."""
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(DecodingOptions)}


class NamedOptions(TypedDict, total=False):
    """The decoding options as keyword arguments, meant as in DecodingOptions; None is not set."""

    num_beams: int | None
    max_length: int | None
    min_length: int | None
    max_new_tokens: int | None
    min_new_tokens: int | None
    length_penalty: float | None
    early_stopping: EarlyStopping | None
    num_return_sequences: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    num_beam_groups: int | None
    diversity_penalty: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    bad_words: Sequence[str] | None
    force_words: Sequence[str] | None
    prefix: str | None
    suppress_tokens: Sequence[int] | None
    output_attentions: bool | None
    allow_partial: bool | None
    output_grounding: bool | None
    rerank: Rerank | None
    min_confidence: float | None
    output_beams: bool | None
    output_stages: bool | None


def parse_options(text: str | bytes) -> dict[str, object]:
    """Read what a caller set from a JSON object, for `DecodingOptions.with_given`.

    Args:
        text: such as {"num_beams": 4, "early_stopping": "never"}; bytes are UTF-8. null is not set.

    Raises:
        InvalidOptionsError: naming "options" if this is no JSON object or too long, or the names
            that occur twice.
    """
    try:
        encoded = text.encode() if isinstance(text, str) else text
        if len(encoded) > MAX_OPTIONS_BYTES:
            raise InvalidOptionsError({"options": f"must be at most {MAX_OPTIONS_BYTES} bytes"})
        values = json.loads(encoded.decode(), object_pairs_hook=_object, parse_int=_integer)
    # RecursionError: lists within lists. ValueError: bad UTF-8 or JSON.
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidOptionsError):
            raise
        raise InvalidOptionsError({"options": "must be a JSON object in UTF-8"}) from error
    if not isinstance(values, dict):
        raise InvalidOptionsError({"options": f"must be a JSON object, is {_type_name(values)}"})
    return {name: value for name, value in values.items() if value is not None}


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values: dict[str, object] = {}
    for name, value in pairs:
        if name in values:
            raise InvalidOptionsError({_short(name): "is given twice"})
        values[name] = value
    return values


def _integer(digits: str) -> int:
    """An integer as JSON writes it; of one beyond every range only the sign and that it is."""
    return int(digits) if len(digits) <= _MAX_DIGITS else int(digits[:_MAX_DIGITS])


def _plain(option: Option, value: object) -> object:
    """A value in the option's own type where it means the same, else as it is."""
    if option.max_items is not None:
        # Text is a sequence of letters, which nobody means.
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            return value
        return tuple(_plain_one(option.kind, each) for each in value)
    return _plain_one(option.kind, value)


def _plain_one(kind: type, value: object) -> object:
    if isinstance(value, bool):
        return value
    if kind is int and isinstance(value, numbers.Integral):
        return int(value)
    if kind is float and isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:
            # An integer beyond all floats: out of every range.
            return -math.inf if isinstance(value, int) and value < 0 else math.inf
    return value


_TYPE_NAMES: Mapping[type, str] = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "an object",
    type(None): "null",
}


def _type_name(value: object) -> str:
    return _TYPE_NAMES.get(type(value), _short(type(value).__name__))


def _short(text: str) -> str:
    """What a caller wrote, short enough for an error."""
    return shortened(text, _SHOWN_BYTES)


def _shown_number(number: float) -> str:
    # Python writes no integer of thousands of digits, and nobody wants to read one of hundreds.
    if isinstance(number, int) and number.bit_length() > 64:
        return "an integer beyond 64 bits"
    return str(number) if isinstance(number, int) else f"{number:g}"


def _raise_if_any(violations: Mapping[str, str]) -> None:
    if violations:
        raise InvalidOptionsError(violations)


def _violations(values: Mapping[str, Any], given: Collection[str]) -> dict[str, str]:
    """What is wrong with options, field by field; `given` are those the caller set."""
    violations = {
        name: fault
        for name, option in OPTIONS.items()
        # What is None by default may stay so.
        if not (values[name] is None and _DEFAULTS[name] is None)
        and (fault := option.fault(values[name])) is not None
    }
    # The contradictions are sought among sound values: built beside __post_init__, which asks us.
    options = object.__new__(DecodingOptions)
    vars(options).update(values, **{name: _DEFAULTS[name] for name in violations})
    faulty = set(violations)
    for pair in _contradictions(options, given):
        # A field that is at fault itself contradicts others in no way worth telling.
        if not faulty & pair.keys():
            violations |= pair
    return violations


def _contradictions(options: DecodingOptions, given: Collection[str]) -> Iterator[dict[str, str]]:
    """Groups of fields, each fine alone, that cannot be followed together."""
    yield _return_sequences(options)
    yield _groups(options)
    yield _forced(options)
    yield _lengths(options)
    yield _size(options)
    yield _rerank(options)
    for new, whole in _NEW_TOKENS.items():
        if {new, whole} <= set(given):
            yield {new: f"cannot be combined with {whole}", whole: f"cannot be combined with {new}"}
    # What a caller sets must mean something; a checkpoint's defaults may wait for their use.
    if not options.do_sample:
        for name in _SAMPLING_ONLY:
            if name in given:
                yield {name: "needs do_sample", "do_sample": "must be true for sampling"}
    if (
        "diversity_penalty" in given
        and options.num_beam_groups == 1
        and options.diversity_penalty != 0.0
    ):
        yield {
            "diversity_penalty": "needs num_beam_groups above 1",
            "num_beam_groups": "must be above 1 for diversity_penalty",
        }


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
        named = _short(", ".join(sorted(both)))
        return {"force_words": f"also in bad_words: {named}", "bad_words": "also in force_words"}
    return {}


def _lengths(options: DecodingOptions) -> dict[str, str]:
    longest, shortest = _length_names(options)
    most, fewest = _whole(options, longest), _whole(options, shortest)
    if fewest <= most:
        return {}
    return {
        shortest: f"must not exceed {longest}, is {getattr(options, shortest)} "
        f"with {longest} {getattr(options, longest)}",
        longest: f"is below {shortest}",
    }


def _size(options: DecodingOptions) -> dict[str, str]:
    longest = options.length_name
    if options.rows * _whole(options, longest) <= MAX_ROWS_TIMES_LENGTH:
        return {}
    name = "num_return_sequences" if options.do_sample else "num_beams"
    text = f"{name} x max_length must be at most {MAX_ROWS_TIMES_LENGTH}"
    return {name: text, longest: text}


def _rerank(options: DecodingOptions) -> dict[str, str]:
    if options.rerank == "likelihood" or options.rows > 1:
        return {}
    name = "num_return_sequences" if options.do_sample else "num_beams"
    return {
        "rerank": "grounding needs several captions to choose from",
        name: "must be at least 2 to rerank by grounding",
    }


def _length_names(options: DecodingOptions) -> tuple[str, str]:
    """Which options say the most and the fewest tokens."""
    return (
        options.length_name,
        "min_length" if options.min_new_tokens is None else "min_new_tokens",
    )


def _whole(options: DecodingOptions, name: str) -> int:
    """A length with the start token, which is all that is known of what is given."""
    length: int = getattr(options, name)
    return 1 + length if name in _NEW_TOKENS else length
