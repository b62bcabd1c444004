"""What a checkpoint's generation_config.json says, as defaults, rules and special tokens.

Every setting of transformers' GenerationConfig is in one of the tables below; whatever would change
generate()'s tokens is followed, or refused by name. Defaults have the names of core/options.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from captionserve_server.core.captions import CheckpointRules, SpecialTokens
from captionserve_server.core.errors import InvalidOptionsError
from captionserve_server.core.options import MAX_MAX_LENGTH, OPTIONS, DecodingOptions

GENERATION_FILE = "generation_config.json"

FOLLOWED = frozenset(
    {
        *("decoder_start_token_id", "bos_token_id", "eos_token_id"),
        *("forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens"),
        *("sequence_bias", "exponential_decay_length_penalty", "renormalize_logits"),
    }
)
"""Settings that are special tokens or rules."""

CALLERS = frozenset({"do_sample", "output_attentions"})
"""Options that a request asks for and a checkpoint does not: captions are the same every time, and
bring along what is wanted of them, until somebody says otherwise."""

WITHOUT_EFFECT = frozenset(
    {
        # How generate() computes, and what it returns besides.
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory"),
        *("compile_config", "disable_compile", "continuous_batching_config", "prefill_chunk_size"),
        *("output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("transformers_version", "remove_invalid_values"),
        # What fills up rows that have ended.
        "pad_token_id",
        # They need text for the encoder, and generate() warns that they are ignored.
        *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
        # A draft model is an argument of generate(), and what it drafts is checked.
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"),
        *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind"),
        *("assistant_ensemble_weight", "speculation_type", "max_matching_ngram_size"),
    }
)
"""Settings that change no token."""

SAMPLING_ONLY: Mapping[str, object] = {
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
}
"""Settings of sampling that cannot be followed, with the value that is off."""

REFUSED: Mapping[str, object] = {
    "bad_words_ids": None,
    "force_words_ids": None,
    "constraints": None,
    "stop_strings": None,
    "max_time": None,
    "token_healing": False,
    "guidance_scale": 1,
    "watermarking_config": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": False,
}
"""Settings that cannot be followed, with the value that is off."""

_OPTIONS_FOLLOWED = OPTIONS.keys() - CALLERS
_SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p")


class UnsupportedSettingError(ValueError):
    """A setting cannot be followed; the message names it."""


@dataclass(frozen=True)
class Generation:
    """What generation_config.json comes to.

    Attributes:
        special: start and end tokens.
        defaults: the checkpoint's own decoding options.
        rules: what it wants besides.
    """

    special: SpecialTokens
    defaults: DecodingOptions
    rules: CheckpointRules


def read_generation(
    values: Mapping[str, Any], vocabulary_size: int, max_positions: int
) -> Generation:
    """Read a checkpoint's generation settings.

    Args:
        values: GenerationConfig's attributes; None is not set.
        vocabulary_size: tokens of the decoder.
        max_positions: its longest sequence.

    Raises:
        UnsupportedSettingError: naming a setting that cannot be followed.
    """
    given = {name: value for name, value in values.items() if value is not None}
    _refuse_unsupported(given)
    return Generation(
        special=_special_tokens(given, vocabulary_size),
        defaults=_defaults(given, vocabulary_size, max_positions),
        rules=_rules(given, vocabulary_size),
    )


def _refuse_unsupported(given: Mapping[str, Any]) -> None:
    off = {**REFUSED, **(SAMPLING_ONLY if given.get("do_sample") else {})}
    for name, value in given.items():
        if name in off and value != off[name]:
            raise UnsupportedSettingError(f"{name} is not supported")
        known = (FOLLOWED, CALLERS, WITHOUT_EFFECT, SAMPLING_ONLY, REFUSED, OPTIONS)
        if not any(name in names for names in known):
            raise UnsupportedSettingError(f"{name} is not known")
    if given.get("do_sample") and given.get("num_beams", 1) != 1:
        raise UnsupportedSettingError("do_sample with num_beams above 1 is not supported")


def _special_tokens(given: Mapping[str, Any], vocabulary_size: int) -> SpecialTokens:
    name = "decoder_start_token_id" if "decoder_start_token_id" in given else "bos_token_id"
    if name not in given or "eos_token_id" not in given:
        raise UnsupportedSettingError(
            "there is no decoder_start_token_id (or bos_token_id) or no eos_token_id"
        )
    start = given[name]
    # A list is what each image of a batch begins with.
    if isinstance(start, list) and len(start) == 1:
        start = start[0]
    end = _tokens(given, "eos_token_id", vocabulary_size)
    ends = _several("eos_token_id", given["eos_token_id"])
    if "exponential_decay_length_penalty" in given and not all(t in end for t in ends):
        # Where generate() drops such ids otherwise, this processor of its fails.
        raise UnsupportedSettingError(
            "exponential_decay_length_penalty needs each eos_token_id to be of the vocabulary"
        )
    if not end:
        raise UnsupportedSettingError("eos_token_id has no token of the vocabulary")
    return SpecialTokens(start=_token(name, start, vocabulary_size), end=end)


def _defaults(given: Mapping[str, Any], size: int, max_positions: int) -> DecodingOptions:
    """The checkpoint's own options, where it has them."""
    # Sampling may be asked for by name only; what is never used may have any value.
    own = {name: value for name, value in given.items() if name in _OPTIONS_FOLLOWED}
    for name in () if given.get("do_sample") else _SAMPLING_OPTIONS:
        if name in own and OPTIONS[name].fault(_as_kind(name, own[name])) is not None:
            del own[name]
    if "suppress_tokens" in own:
        own["suppress_tokens"] = _tokens(given, "suppress_tokens", size)
    # generate() allows 20 new tokens where nothing says otherwise, and a sentence is enough for us.
    longest = min(max_positions, MAX_MAX_LENGTH)
    _shorten(own, "max_length", longest)
    _shorten(own, "max_new_tokens", longest - 1)
    if "max_length" not in own:
        own["max_length"] = min(DecodingOptions.max_length, longest)
    try:
        return DecodingOptions.from_given(own)
    except InvalidOptionsError as error:
        raise UnsupportedSettingError(error.message) from error


def _as_kind(name: str, value: object) -> object:
    """A whole number where JSON has one for a real."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole and OPTIONS[name].kind is float else value  # type: ignore[arg-type]


def _shorten(own: dict[str, Any], name: str, longest: int) -> None:
    value = own.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        own[name] = min(value, longest)


def _rules(given: Mapping[str, Any], size: int) -> CheckpointRules:
    read: dict[str, Callable[[], object]] = {
        "forced_bos_token_id": lambda: _token(
            "forced_bos_token_id", given["forced_bos_token_id"], size
        ),
        "forced_eos_token_id": lambda: tuple(
            _token("forced_eos_token_id", token, size)
            for token in _several("forced_eos_token_id", given["forced_eos_token_id"])
        ),
        "begin_suppress_tokens": lambda: _tokens(given, "begin_suppress_tokens", size),
        "sequence_bias": lambda: _sequence_bias(given["sequence_bias"], size),
        "exponential_decay_length_penalty": lambda: _decay(
            given["exponential_decay_length_penalty"]
        ),
        "renormalize_logits": lambda: given["renormalize_logits"] is True,
    }
    values: dict[str, Any] = {name: value() for name, value in read.items() if name in given}
    return CheckpointRules(**values)


def _several(name: str, value: object) -> list[int]:
    """One whole number or a list of them."""
    tokens = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise UnsupportedSettingError(f"{name} must be token ids, is {value!r:.60}")
    return list(tokens)


def _token(name: str, value: object, size: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
        raise UnsupportedSettingError(
            f"{name} must be a token of the vocabulary, 0 to {size - 1}, is {value!r:.40}"
        )
    return value


def _tokens(given: Mapping[str, Any], name: str, size: int) -> tuple[int, ...]:
    """Ids of a list; those outside the vocabulary are of no token, as for generate()."""
    return tuple(dict.fromkeys(t for t in _several(name, given[name]) if 0 <= t < size))


def _sequence_bias(value: object, size: int) -> tuple[tuple[tuple[int, ...], float], ...]:
    """Pairs of token ids and a bias; of the same ids twice the last pair counts."""
    entries: dict[tuple[int, ...], float] = {}
    for entry in value if isinstance(value, list) else [None]:
        pair = entry if isinstance(entry, list) and len(entry) == 2 else [None, None]
        run, bias = pair
        if not (isinstance(run, list) and run and isinstance(bias, float) and math.isfinite(bias)):
            raise UnsupportedSettingError(
                "sequence_bias must be pairs of token ids and a finite number with a point"
            )
        entries[tuple(_token("sequence_bias", token, size) for token in run)] = bias
    if not entries:
        raise UnsupportedSettingError("sequence_bias must not be empty")
    return tuple(entries.items())


def _decay(value: object) -> tuple[int, float]:
    start, factor = value if isinstance(value, (list, tuple)) and len(value) == 2 else (None, None)
    if (
        isinstance(start, int)
        and isinstance(factor, (int, float))
        and bool not in (type(start), type(factor))
        and start >= 0
        and 0 < factor < math.inf
    ):
        return start, float(factor)
    raise UnsupportedSettingError(
        "exponential_decay_length_penalty must be a number of tokens and a factor above 0"
    )
