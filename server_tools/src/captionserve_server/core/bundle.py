"""What serving must know of a checkpoint beside its graphs, and its form as JSON."""

from __future__ import annotations

import dataclasses
import json

from captionserve_server.core.errors import InvalidOptionsError
from captionserve_server.core.geometry import DecoderGeometry
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.search import SpecialTokens

BUNDLE_FILE = "bundle.json"
TOKENIZER_FILE = "tokenizer.json"
PREPROCESSOR_FILE = "preprocessor.json"
ENCODER_GRAPH_FILE = "model.onnx"
PREFILL_GRAPH_FILE = "prefill.onnx"
STEP_GRAPH_FILE = "step.onnx"


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A checkpoint's decoder as serving sees it.

    Attributes:
        geometry: the decoder's shapes.
        special: start and end tokens.
        defaults: the checkpoint's own decoding options.
    """

    geometry: DecoderGeometry
    special: SpecialTokens
    defaults: DecodingOptions

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
        if options.num_beams > 1 and self._candidates(options) > self.geometry.vocabulary_size:
            violations["num_beams"] = (
                f"is too large for a vocabulary of {self.geometry.vocabulary_size} tokens"
            )
        if violations:
            raise InvalidOptionsError(violations)

    def _candidates(self, options: DecodingOptions) -> int:
        return max(2, 1 + len(self.special.end)) * options.num_beams

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
            defaults=DecodingOptions(**values["defaults"]),
        )
