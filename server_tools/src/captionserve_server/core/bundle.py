"""What serving must know of a checkpoint beside its graphs, and its form as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from captionserve_server.core.captions import NO_RULES, CaptionPlan, CheckpointRules, SpecialTokens
from captionserve_server.core.confidence import Calibration
from captionserve_server.core.errors import InvalidOptionsError
from captionserve_server.core.geometry import DecoderGeometry
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.words import Encode, check_tokens, word_tokens


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A checkpoint's decoder as serving sees it.

    Attributes:
        geometry: the decoder's shapes.
        special: start and end tokens.
        defaults: the checkpoint's own decoding options.
        rules: what it wants besides, of every caption.
        calibration: from its token log-probabilities to confidences.
        precision: of the graphs' weights, by name.
    """

    geometry: DecoderGeometry
    special: SpecialTokens
    defaults: DecodingOptions
    calibration: Calibration
    rules: CheckpointRules = NO_RULES
    precision: str = "fp32"

    def plan(self, given: Mapping[str, object], encode: Encode) -> CaptionPlan:
        """How to decode for a caller: the checkpoint's defaults with the caller's own options.

        Args:
            given: option name to value, holding only what the caller set.
            encode: the checkpoint's tokenizer.

        Raises:
            InvalidOptionsError: naming the fields.
        """
        options = self.defaults.with_given(given)
        words = word_tokens(options, encode)
        check_tokens(words, self.geometry.vocabulary_size)
        counted = options.counted_from(1 + len(words.prefix))
        self.check(counted, options.length_name)
        return CaptionPlan(counted, words, self.rules)

    def check(self, options: DecodingOptions, length_name: str) -> None:
        """Refuse options that this checkpoint cannot follow.

        Args:
            options: their lengths in whole tokens.
            length_name: the option that has set max_length.

        Raises:
            InvalidOptionsError: naming the fields.
        """
        violations: dict[str, str] = {}
        if options.max_length > self.geometry.max_positions:
            violations[length_name] = (
                f"allows captions of {options.max_length} tokens in all; this checkpoint has "
                f"{self.geometry.max_positions} positions"
            )
        vocabulary = self.geometry.vocabulary_size
        # A search must be able to go on when every beam's best choice is to end.
        if options.num_beams > 1 and (1 + len(self.special.end)) * options.num_beams > vocabulary:
            violations["num_beams"] = f"is too large for a vocabulary of {vocabulary} tokens"
        if any(token >= vocabulary for token in options.suppress_tokens):
            violations["suppress_tokens"] = f"must be below {vocabulary}, the vocabulary's size"
        if violations:
            raise InvalidOptionsError(violations)

    def to_json(self) -> str:
        """Write as JSON."""
        values = dataclasses.asdict(self) | {"calibration": self.calibration.as_values()}
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Bundle:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        special = values["special"]
        return cls(
            geometry=DecoderGeometry(**values["geometry"]),
            special=SpecialTokens(start=special["start"], end=tuple(special["end"])),
            defaults=DecodingOptions.from_given(values["defaults"]),
            calibration=Calibration.from_values(values["calibration"]),
            rules=_rules(values["rules"]),
            precision=values["precision"],
        )


def _rules(values: Mapping[str, Any]) -> CheckpointRules:
    """The rules from what JSON makes of them: lists for tuples."""
    decay = values["exponential_decay_length_penalty"]
    return CheckpointRules(
        forced_bos_token_id=values["forced_bos_token_id"],
        forced_eos_token_id=tuple(values["forced_eos_token_id"]),
        begin_suppress_tokens=tuple(values["begin_suppress_tokens"]),
        sequence_bias=tuple((tuple(run), bias) for run, bias in values["sequence_bias"]),
        exponential_decay_length_penalty=None if decay is None else (decay[0], decay[1]),
        renormalize_logits=values["renormalize_logits"],
    )
