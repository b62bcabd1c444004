"""Between the public API's messages and what the `decoder` model takes and gives."""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from captionserve.v1 import caption_pb2

from captionserve_server.core.confidence import spoken_words
from captionserve_server.core.engine.timeline import Stage
from captionserve_server.core.errors import (
    ImageMissingError,
    InvalidOptionsError,
    InvalidPixelValuesError,
)
from captionserve_server.core.framing import MAX_REGIONS, Framing, Resize
from captionserve_server.core.image_files import MAX_PIXELS, Box
from captionserve_server.core.options import OPTIONS, DecodingOptions
from captionserve_server.gateway.decoder_client import Description
from captionserve_server.gateway.kserve import InputTensor, Outputs, encode_strings
from captionserve_server.settings import Settings
from captionserve_server.triton import wire

ENUM_OPTIONS: Mapping[str, Mapping[int, bool | str]] = {
    field.name: {
        value.number: {"true": True, "false": False}.get(word, word)
        for value in field.enum_type.values
        if value.number
        for word in [value.name.removeprefix(f"{field.name.upper()}_").lower()]
    }
    for field in caption_pb2.GenerationOptions.DESCRIPTOR.fields
    if field.enum_type is not None
}
"""By option, what each number of its enum means, which is the end of the number's name."""
FINISH_REASONS: Mapping[str, caption_pb2.FinishReason.ValueType] = {
    "eos": caption_pb2.FINISH_REASON_EOS,
    "length": caption_pb2.FINISH_REASON_LENGTH,
    "deadline": caption_pb2.FINISH_REASON_DEADLINE,
}
_RESIZES: Mapping[caption_pb2.Resize.ValueType, Resize] = {
    caption_pb2.RESIZE_UNSPECIFIED: "checkpoint",
    caption_pb2.RESIZE_CHECKPOINT: "checkpoint",
    caption_pb2.RESIZE_CENTER_CROP: "center_crop",
    caption_pb2.RESIZE_LETTERBOX: "letterbox",
}

REVIEW_REASONS: Mapping[str, caption_pb2.ReviewReason.ValueType] = {
    "low_confidence": caption_pb2.REVIEW_REASON_LOW_CONFIDENCE,
    "degenerate": caption_pb2.REVIEW_REASON_DEGENERATE,
    "unfinished": caption_pb2.REVIEW_REASON_UNFINISHED,
    "not_grounded": caption_pb2.REVIEW_REASON_NOT_GROUNDED,
}
BEAM_FATES: Mapping[str, caption_pb2.BeamFate.ValueType] = {
    "kept": caption_pb2.BEAM_FATE_KEPT,
    "dropped": caption_pb2.BEAM_FATE_DROPPED,
    "finished": caption_pb2.BEAM_FATE_FINISHED,
}

_FLOAT32_BYTES = 4
# Longer options, such as lists of words, are checked anew each time, so that memory is bounded.
_REMEMBERED_BYTES = 1024


@dataclass(frozen=True)
class Message:
    """What a caller asks, as the decoder takes it.

    It holds nothing of the protobuf message that it was read from, so that this can be let go of: a
    picture would else be in memory twice for as long as its call lasts.

    Attributes:
        image: the picture.
        framing: what is asked of it.
        given: the options that the caller set, as plain JSON values.
        raw_options: the same as protobuf writes them.
        model_version: which one is asked; 0 for the default.
        bulk: whether it comes behind what is interactive; None where the caller does not say.
        bypass_cache: whether it is to be computed anew.
    """

    image: InputTensor
    framing: Framing
    given: Mapping[str, Any]
    raw_options: bytes
    model_version: int
    bulk: bool | None
    bypass_cache: bool

    def inputs(self, *, stream: bool = False) -> list[InputTensor]:
        """All inputs of the decoder; with `stream` it also tells words as they become certain."""
        inputs = [self.image, *_framing_tensors(self.framing)]
        if self.given:
            # Not in ASCII, where most scripts' letters take six bytes of what the decoder allows.
            text = json.dumps(self.given, allow_nan=False, ensure_ascii=False).encode()
            inputs.append(InputTensor(wire.OPTIONS, (1,), encode_strings([text])))
        if stream:
            inputs.append(InputTensor(wire.STREAM, (1,), b"\x01"))
        return inputs


def decoder_message(request: caption_pb2.CaptionRequest) -> Message:
    """What the decoder is asked for a caller's request.

    Raises:
        ImageMissingError: if there is no image.
        ImageCorruptError: if pixel values do not have the size that is announced.
        InvalidFramingError: if regions, tiles or resize are wrong whatever the image is.
        InvalidOptionsError: if an option is a number that the API does not name.
    """
    image, framing = _image(request.image), _framing(request)
    if image.spec is wire.PIXEL_VALUES:
        framing.refuse_for_pixel_values()
    return Message(
        image=image,
        framing=framing,
        given=_given_options(request.options),
        raw_options=request.options.SerializeToString(),
        model_version=request.model_version,
        bulk=(
            None
            if request.priority == caption_pb2.PRIORITY_UNSPECIFIED
            else request.priority == caption_pb2.PRIORITY_BULK
        ),
        bypass_cache=request.bypass_cache,
    )


def caption_message(raw: bytes) -> Message:
    """What a CaptionRequest asks; raises as `decoder_message`, and DecodeError."""
    return decoder_message(caption_pb2.CaptionRequest.FromString(raw))


def stream_message(raw: bytes) -> Message:
    """What a StreamCaptionRequest asks; raises likewise."""
    return decoder_message(caption_pb2.StreamCaptionRequest.FromString(raw).request)


def _framing(request: caption_pb2.CaptionRequest) -> Framing:
    tiles = request.tiles
    return Framing.of(
        list(map(_box, request.regions)),
        (tiles.rows, tiles.cols) if request.HasField("tiles") else None,
        # A number that the API does not name is no way of resizing either.
        _RESIZES.get(request.resize, str(request.resize)),
    )


def _box(region: caption_pb2.Region) -> Box:
    return region.left, region.top, region.right, region.bottom


def _framing_tensors(framing: Framing) -> Iterator[InputTensor]:
    if framing.regions:
        raw = b"".join(struct.pack("<4i", *each) for each in framing.regions)
        yield InputTensor(wire.REGIONS, (len(framing.regions), 4), raw)
    if framing.tiles is not None:
        yield InputTensor(wire.TILES, (2,), struct.pack("<2i", *framing.tiles))
    if framing.resize != "checkpoint":
        yield InputTensor(wire.RESIZE, (1,), encode_strings([framing.resize.encode()]))


def _image(image: caption_pb2.Image) -> InputTensor:
    content = image.WhichOneof("content")
    if content == "encoded":
        return InputTensor(wire.IMAGE, (1,), encode_strings([image.encoded]))
    if content == "pixel_values":
        pixels = image.pixel_values
        height, width = pixels.height, pixels.width
        if min(height, width) < 1 or len(pixels.values) != 3 * height * width * _FLOAT32_BYTES:
            raise InvalidPixelValuesError(
                "the pixel values are not 3 x height x width float32 numbers"
            )
        return InputTensor(wire.PIXEL_VALUES, (3, height, width), pixels.values)
    raise ImageMissingError("the request holds no image")


def _given_options(options: caption_pb2.GenerationOptions) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for field, value in options.ListFields():
        if field.enum_type is not None:
            if value not in ENUM_OPTIONS[field.name]:
                raise InvalidOptionsError({field.name: f"must be {OPTIONS[field.name].wanted()}"})
            value = ENUM_OPTIONS[field.name][value]
        elif field.message_type is not None:
            # Lists are messages, so that an empty one can be told from none.
            value = list(value.values)
        given[field.name] = value
    return given


def effective_options(defaults: DecodingOptions, message: Message) -> DecodingOptions:
    """A checkpoint's defaults with a caller's options in their places.

    Raises:
        InvalidOptionsError: if they cannot be obeyed.
    """
    if len(message.raw_options) > _REMEMBERED_BYTES:
        return defaults.with_given(message.given)
    return _remembered_options(defaults, message.raw_options)


# Callers ask with the same options again and again; checking them all takes as long as gRPC's part.
@functools.lru_cache(maxsize=1024)
def _remembered_options(defaults: DecodingOptions, raw: bytes) -> DecodingOptions:
    return defaults.with_given(_given_options(caption_pb2.GenerationOptions.FromString(raw)))


def caption_part(outputs: Outputs) -> caption_pb2.CaptionPart:
    """A part of a caption.

    Raises:
        ValueError: if an output cannot be read.
        LookupError: if an output is missing.
    """
    part = caption_pb2.CaptionPart(
        text=outputs[wire.NEW_TEXT.name].values[0],
        token_ids=outputs[wire.NEW_TOKEN_IDS.name].values,
    )
    if wire.NEW_BEAM_STEPS.name in outputs:
        part.beam_steps.extend(_beam_steps(json.loads(outputs[wire.NEW_BEAM_STEPS.name].values[0])))
    return part


def caption_response(outputs: Outputs, model_version: int) -> caption_pb2.CaptionResponse:
    """The response for the decoder's last outputs.

    Args:
        outputs: what the model gave.
        model_version: which one it was.

    Raises:
        ValueError: if the outputs do not belong together.
        LookupError: if an output is missing, or a finish reason is not one of ours.
    """
    columns = [outputs[spec.name].values for spec in _COLUMNS]
    ids, logprobs, texts = (outputs[spec.name] for spec in _TOKEN_ROWS)
    count, longest = ids.shape
    if not count or not ids.shape == logprobs.shape == texts.shape:
        raise ValueError("no captions, or tokens that do not belong together")
    captions: list[caption_pb2.Caption] = []
    for row, (text, score, reason, confidence, degenerate) in enumerate(zip(*columns, strict=True)):
        begin = row * longest
        end = begin + longest
        own = ids.values[begin:end]
        length = own.index(wire.PADDING_TOKEN_ID) if wire.PADDING_TOKEN_ID in own else longest
        caption = caption_pb2.Caption(
            text=text,
            score=score,
            token_ids=own[:length],
            token_logprobs=logprobs.values[begin : begin + length],
            token_texts=texts.values[begin : begin + length],
            finish_reason=FINISH_REASONS[reason],
            confidence=confidence,
            degenerate=degenerate,
        )
        captions.append(caption)
    if len(captions) != count:
        raise ValueError("captions and tokens do not belong together")
    _add_words(captions, outputs)
    if wire.REVIEW_REASONS.name in outputs:
        reasons = outputs[wire.REVIEW_REASONS.name].values
        for caption, own in zip(captions, reasons, strict=True):
            caption.review_reasons.extend(REVIEW_REASONS[reason] for reason in own.split())
            caption.needs_review = bool(caption.review_reasons)
    if wire.ATTENTIONS.name in outputs:
        shape, values = outputs[wire.ATTENTIONS.name]
        if shape[:2] != ids.shape:
            raise ValueError("attention is missing")
        rows, cols = shape[2:]
        for row, caption in enumerate(captions):
            begin = row * longest * rows * cols
            end = begin + len(caption.token_ids) * rows * cols
            caption.attention.rows, caption.attention.cols = rows, cols
            caption.attention.values.extend(values[begin:end])
    response = _response(captions, outputs, model_version)
    if wire.BEAMS.name in outputs:
        _add_beams(response.beams, json.loads(outputs[wire.BEAMS.name].values[0]))
    return response


def _response(
    captions: Sequence[caption_pb2.Caption], outputs: Outputs, model_version: int
) -> caption_pb2.CaptionResponse:
    """The captions shared out among the whole image and its parts."""
    response = caption_pb2.CaptionResponse(model_version=model_version)
    if wire.REGION_BOXES.name not in outputs:
        response.captions.extend(captions)
        return response
    boxes, counts = outputs[wire.REGION_BOXES.name], outputs[wire.REGION_CAPTIONS.name]
    begin = len(captions) - sum(counts.values)
    if begin < 1 or boxes.shape != (len(counts.values), 4):
        raise ValueError("captions and regions do not belong together")
    response.captions.extend(captions[:begin])
    for part, count in enumerate(counts.values):
        left, top, right, bottom = boxes.values[4 * part : 4 * part + 4]
        response.regions.add(
            region=caption_pb2.Region(left=left, top=top, right=right, bottom=bottom),
            captions=captions[begin : begin + count],
        )
        begin += count
    return response


def _add_words(captions: Sequence[caption_pb2.Caption], outputs: Outputs) -> None:
    """Give captions their words, and tokens and words their groundings where there are any."""
    rows, most_words = (confidences := outputs[wire.WORD_CONFIDENCES.name]).shape
    groundings = outputs.get(wire.TOKEN_GROUNDINGS.name)
    if rows != len(captions) or (
        groundings is not None and groundings.shape != outputs[wire.TOKEN_IDS.name].shape
    ):
        raise ValueError("captions and their words do not belong together")
    for row, caption in enumerate(captions):
        if groundings is not None:
            begin = row * groundings.shape[1]
            caption.token_groundings.extend(
                groundings.values[begin : begin + len(caption.token_ids)]
            )
            # Of a caption without tokens there is nothing to ground.
            own = caption.token_groundings
            caption.grounding = math.fsum(own) / max(1, len(own))
        words = spoken_words(caption.token_texts)
        if len(words) > most_words:
            raise ValueError("words have no confidence")
        for word, confidence in zip(words, confidences.values[row * most_words :], strict=False):
            message = caption.words.add(
                text=word.text,
                first_token=word.first_token,
                tokens=word.tokens,
                confidence=confidence,
            )
            if groundings is not None:
                message.grounding = math.fsum(caption.token_groundings[word.own])


def _add_beams(beams: caption_pb2.BeamHistory, told: Mapping[str, Any]) -> None:
    """Fill in what `beams_text` of wire.py wrote."""
    beams.steps.extend(_beam_steps(told["steps"]))
    for path in told["paths"]:
        message = beams.paths.add(continuations=path["continuations"])
        for tokens in path["likeliest"]:
            message.likeliest.add(**tokens)


def _beam_steps(told: Iterable[Mapping[str, Any]]) -> Iterator[caption_pb2.BeamStep]:
    """What `beam_steps_text` of wire.py wrote."""
    for step in told:
        fates = [BEAM_FATES[fate] for fate in step["fates"]]
        yield caption_pb2.BeamStep(**{**step, "fates": fates})


def add_stages(response: caption_pb2.CaptionResponse, stages: Iterable[Stage]) -> None:
    """Tell how long each stage took."""
    for stage in stages:
        response.stages.add(name=stage.name, milliseconds=stage.milliseconds)


# One value for each caption.
_COLUMNS = (wire.TEXT, wire.SCORE, wire.FINISH_REASON, wire.CONFIDENCE, wire.DEGENERATE)
# One row for each caption, all of the length of the longest.
_TOKEN_ROWS = (wire.TOKEN_IDS, wire.TOKEN_LOGPROBS, wire.TOKEN_TEXTS)


def model_message(description: Description, *, is_default: bool) -> caption_pb2.Model:
    """What callers are told of a version of the model."""
    defaults = description.defaults.as_given()
    message = caption_pb2.Model(
        version=description.version,
        is_default=is_default,
        precision=description.precision,
        image_height=description.image_size[0],
        image_width=description.image_size[1],
    )
    for name, value in defaults.items():
        if name in ENUM_OPTIONS:
            numbers = ENUM_OPTIONS[name].items()
            setattr(message.defaults, name, next(at for at, word in numbers if word == value))
        elif isinstance(value, list):
            getattr(message.defaults, name).values.extend(value)
        else:
            setattr(message.defaults, name, value)
    return message


def limits_message(settings: Settings) -> caption_pb2.Limits:
    """What callers are told of what a request may have."""
    limits = caption_pb2.Limits(
        message_bytes=settings.max_message_megabytes * 2**20,
        image_pixels=MAX_PIXELS,
        window=settings.window,
        regions=MAX_REGIONS,
        options=[
            caption_pb2.OptionLimits(name=name, help=option.help, range=option.range() or "")
            for name, option in OPTIONS.items()
        ],
    )
    limits.deadline_cap.FromMilliseconds(int(1e3 * settings.deadline_cap_seconds))
    return limits
