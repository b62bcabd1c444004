"""What serving must know of a checkpoint beside its graphs, and its form as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from captionserve_server.core.captions import CaptionPlan, SpecialTokens
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
        calibration: from its token log-probabilities to confidences.
    """

    geometry: DecoderGeometry
    special: SpecialTokens
    defaults: DecodingOptions
    calibration: Calibration

    def plan(self, given: Mapping[str, object], encode: Encode) -> CaptionPlan:
        """How to decode for a caller: the checkpoint's defaults with the caller's own options.

        Args:
            given: option name to value, holding only what the caller set.
            encode: the checkpoint's tokenizer.

        Raises:
            InvalidOptionsError: naming the fields.
        """
        options = self.defaults.with_given(given)
        self.check(options)
        words = word_tokens(options, encode)
        check_tokens(words, self.geometry.vocabulary_size)
        return CaptionPlan(options, words)

    def check(self, options: DecodingOptions) -> None:
        """Refuse options that this checkpoint cannot follow.

        Raises:
            InvalidOptionsError: naming the fields.
        """
        violations: dict[str, str] = {}
        if options.max_length > self.geometry.max_positions:
            violations["max_length"] = (
                f"must be at most {self.geometry.max_positions} for this checkpoint, "
                f"is {options.max_length}"
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
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Bundle:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        special = values["special"]
        return cls(
            geometry=DecoderGeometry(**values["geometry"]),
            special=SpecialTokens(start=special["start"], end=tuple(special["end"])),
            defaults=DecodingOptions.from_given(values["defaults"]),
            calibration=Calibration(**values["calibration"]),
        )
