"""The source of truth: transformers' own image processor and generate().

transformers 5 has neither beam groups nor forced words; there the truth is tests/reference_search,
with log-probabilities from transformers' model and logits processors.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captionserve_server.core.options import DecodingOptions
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from transformers import VisionEncoderDecoderModel
from transformers.generation import logits_process
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests.reference_search import (
    Completed,
    Constraint,
    Logprobs,
    Row,
    Rules,
    Tokens,
    constrained_beam_search,
    diverse_beam_search,
)

# The models are tiny: a second thread only waits, and far longer when the cores are busy.
torch.set_num_threads(1)

# Options that generate() takes as they are.
_SHARED = (
    "num_beams",
    "max_length",
    "min_length",
    "length_penalty",
    "num_return_sequences",
    "repetition_penalty",
    "no_repeat_ngram_size",
)


@dataclass(frozen=True)
class ReferenceCaption:
    """A true caption, in the form of our contract.

    Attributes:
        token_ids: without start token, prefix and padding, with the end token.
        token_logprobs: natural log-probability of each, as the logits processors, and the penalty
            between beam groups, left it.
        score: their sum under the length penalty; of beam search as the search reports it.
    """

    token_ids: Tokens
    token_logprobs: tuple[float, ...]
    score: float


class Reference:
    """A checkpoint in transformers."""

    def __init__(self, folder: Path) -> None:
        """Load model, image processor and tokenizer."""
        self.model = VisionEncoderDecoderModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = ViTImageProcessorPil.from_pretrained(folder)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # What a caller writes is text.
        self._tokenizer.encode_special_tokens = True
        generation = self.model.generation_config
        end = generation.eos_token_id
        self._start: int = generation.decoder_start_token_id
        self._end = frozenset(end if isinstance(end, list) else [end])
        self._known: dict[tuple[str, DecodingOptions | None], list[ReferenceCaption]] = {}
        self._states: dict[str, torch.Tensor] = {}

    def captions(
        self, image: Image.Image, options: DecodingOptions | None = None
    ) -> list[ReferenceCaption]:
        """All returned captions of one RGB image.

        Args:
            image: the image.
            options: how to decode; None for generate() with what the checkpoint says.
        """
        key = (_digest(image), options)
        if key not in self._known:
            self._known[key] = self._decoded(image, options)
        return self._known[key]

    def logprobs(self, image: Image.Image, options: DecodingOptions) -> Logprobs:
        """The log-probabilities that a beam search under the options sees for the image."""
        states = self._encoded(image)
        processors = self._processors(options)

        def rows(sequences: list[Tokens]) -> list[Row]:
            tokens = torch.LongTensor(sequences)
            # Whole sequences each time: no cache that could be wrong.
            output = self.model(
                encoder_outputs=BaseModelOutput(states.repeat(len(tokens), 1, 1)),
                decoder_input_ids=tokens,
                use_cache=False,
            )
            logprobs = torch.log_softmax(output.logits[:, -1].float(), dim=-1)
            return list(processors(tokens, logprobs).numpy())

        return torch.no_grad()(rows)

    def rules(self, options: DecodingOptions) -> Rules:
        """What the options say about each group of beams."""
        prefix = self._prefix(options)
        return Rules(
            given=(self._start, *prefix),
            end=self._end,
            beams=options.num_beams // options.num_beam_groups,
            longest=options.new_tokens(1 + len(prefix)),
            length_penalty=options.length_penalty,
            early_stopping=options.early_stopping,
        )

    def constraints(self, options: DecodingOptions) -> list[Constraint]:
        """The forced words that the prefix does not have already."""
        prefix = self._prefix(options)
        variants = [self._variants(word) for word in options.force_words]
        return [
            Constraint(spaced, None if prefix else bare)
            for bare, spaced in variants
            if not Constraint(spaced, bare).is_met(prefix)
        ]

    def _decoded(
        self, image: Image.Image, options: DecodingOptions | None
    ) -> list[ReferenceCaption]:
        if options is None:
            return self._generated(image)
        if options.force_words:
            return _returned(
                constrained_beam_search(
                    self.logprobs(image, options), self.rules(options), self.constraints(options)
                ),
                options,
            )
        if options.num_beam_groups > 1:
            return _returned(
                diverse_beam_search(
                    self.logprobs(image, options),
                    self.rules(options),
                    groups=options.num_beam_groups,
                    diversity_penalty=options.diversity_penalty,
                ),
                options,
            )
        return self._generated(image, self._prefix(options), **self._generate_options(options))

    def pixel_values(self, images: list[Image.Image]) -> torch.Tensor:
        """What the checkpoint's image processor makes of images; float32 [images, 3, H, W]."""
        return torch.cat([self._pixels(image) for image in images])

    @torch.no_grad()
    def tokens_of(self, pixel_values: torch.Tensor, **options: Any) -> list[Tokens]:
        """What generate() gives for [images, 3, H, W]; num_return_sequences rows of each."""
        rows = self.model.generate(pixel_values=pixel_values, **options).tolist()
        return [self._trimmed(row[1:]) for row in rows]

    @torch.no_grad()
    def _generated(
        self, image: Image.Image, prefix: Tokens = (), **options: Any
    ) -> list[ReferenceCaption]:
        """What generate() gives."""
        output = self.model.generate(
            pixel_values=self._pixels(image),
            decoder_input_ids=torch.tensor([(self._start, *prefix)]),
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        tokens = [self._trimmed(row[1 + len(prefix) :]) for row in output.sequences.tolist()]
        beams = output.get("beam_indices")
        # Beam search sums log-probabilities; what greedy search compares is not normalised.
        transitions = self.model.compute_transition_scores(
            output.sequences, output.scores, beams, normalize_logits=beams is None
        )
        logprobs = [
            tuple(row[: len(own)]) for row, own in zip(transitions.tolist(), tokens, strict=True)
        ]
        if beams is None:
            scores = [sum(logprobs[0]) / len(tokens[0]) ** options.get("length_penalty", 1.0)]
        else:
            scores = output.sequences_scores.tolist()
        return [ReferenceCaption(*parts) for parts in zip(tokens, logprobs, scores, strict=True)]

    def _generate_options(self, options: DecodingOptions) -> dict[str, Any]:
        """The options as keyword arguments of generate(); nothing is left to the checkpoint."""
        given: dict[str, Any] = {name: getattr(options, name) for name in _SHARED}
        given |= {"do_sample": False, "early_stopping": options.early_stopping}
        if options.bad_words:
            given["bad_words_ids"] = self._bad_words(options)
        if options.suppress_tokens:
            given["suppress_tokens"] = list(options.suppress_tokens)
        for name in ("max_new_tokens", "min_new_tokens"):
            if getattr(options, name) is not None:
                given[name] = getattr(options, name)
        return given

    def _processors(self, options: DecodingOptions) -> logits_process.LogitsProcessorList:
        """The logits processors that generate() makes of the options, in its order."""
        end = sorted(self._end)
        processors = logits_process.LogitsProcessorList()
        if options.repetition_penalty != 1.0:
            processors.append(
                logits_process.RepetitionPenaltyLogitsProcessor(options.repetition_penalty)
            )
        if options.no_repeat_ngram_size:
            processors.append(
                logits_process.NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size)
            )
        if options.bad_words:
            processors.append(
                logits_process.NoBadWordsLogitsProcessor(self._bad_words(options), end)
            )
        if options.min_length and options.min_new_tokens is None:
            processors.append(logits_process.MinLengthLogitsProcessor(options.min_length, end))
        if options.min_new_tokens:
            given = 1 + len(self._prefix(options))
            processors.append(
                logits_process.MinNewTokensLengthLogitsProcessor(given, options.min_new_tokens, end)
            )
        if options.suppress_tokens:
            processors.append(logits_process.SuppressTokensLogitsProcessor(options.suppress_tokens))
        return processors

    def _bad_words(self, options: DecodingOptions) -> list[list[int]]:
        variants = [tokens for word in options.bad_words for tokens in self._variants(word)]
        return [list(tokens) for tokens in dict.fromkeys(variants)]

    def _prefix(self, options: DecodingOptions) -> Tokens:
        return self._tokens(options.prefix.rstrip())

    def _variants(self, word: str) -> tuple[Tokens, Tokens]:
        """A word's tokens without and with a leading space."""
        return self._tokens(word.strip()), self._tokens(" " + word.strip())

    def _tokens(self, text: str) -> Tokens:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    @torch.no_grad()
    def _encoded(self, image: Image.Image) -> torch.Tensor:
        """The encoder's states, [1, image tokens, width]."""
        key = _digest(image)
        if key not in self._states:
            self._states[key] = self.model.encoder(self._pixels(image)).last_hidden_state
        return self._states[key]

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        pixels: torch.Tensor = self.processor(image, return_tensors="pt")["pixel_values"]
        return pixels

    def _trimmed(self, tokens: list[int]) -> Tokens:
        ends = [index for index, token in enumerate(tokens) if token in self._end]
        return tuple(tokens[: ends[0] + 1] if ends else tokens)


def _returned(completed: list[Completed], options: DecodingOptions) -> list[ReferenceCaption]:
    return [
        ReferenceCaption(caption.hypothesis.tokens, caption.hypothesis.logprobs, caption.score)
        for caption in completed[: options.num_return_sequences]
    ]


def _digest(image: Image.Image) -> str:
    content = f"{image.mode} {image.size}".encode() + image.tobytes()
    return hashlib.sha256(content).hexdigest()


@functools.lru_cache(maxsize=8)
def reference(folder: Path) -> Reference:
    """The reference of a checkpoint folder, loaded once."""
    return Reference(folder)


def picture(seed: int, width: int = 60, height: int = 44) -> Image.Image:
    """An RGB picture with a colour, a gradient and some texture of its own."""
    generator = np.random.default_rng(seed)
    colour, slope = generator.uniform(0, 255, 3), generator.uniform(-128, 128, (2, 3))
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    values = colour + y[..., None] * slope[0] + x[..., None] * slope[1]
    values = values + generator.normal(0, 20, values.shape)
    pixels: NDArray[np.uint8] = values.clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels)
