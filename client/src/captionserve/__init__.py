"""Typed Python client of the captionserve image-captioning service."""

from captionserve._aio import AsyncCaptionClient
from captionserve._alt_text import AltText, AltTextWarning
from captionserve._client import CaptionClient
from captionserve._errors import CaptionError
from captionserve._framing import Framing
from captionserve._images import ImageInput
from captionserve._many import Outcome
from captionserve._options import GenerationOptions
from captionserve._pipeline import ImageToTextPipeline, pipeline
from captionserve._results import (
    Attention,
    BeamFate,
    BeamHistory,
    BeamPath,
    Caption,
    CaptionResult,
    CaptionUpdate,
    Continuation,
    DescribedRegion,
    FinishReason,
    LikelyToken,
    ModelInfo,
    Models,
    OptionLimits,
    ReviewReason,
    Stage,
    Word,
)
from captionserve._transport import tls_credentials

__all__ = [
    "AltText",
    "AltTextWarning",
    "AsyncCaptionClient",
    "Attention",
    "BeamFate",
    "BeamHistory",
    "BeamPath",
    "Caption",
    "CaptionClient",
    "CaptionError",
    "CaptionResult",
    "CaptionUpdate",
    "Continuation",
    "DescribedRegion",
    "FinishReason",
    "Framing",
    "GenerationOptions",
    "ImageInput",
    "ImageToTextPipeline",
    "LikelyToken",
    "ModelInfo",
    "Models",
    "OptionLimits",
    "Outcome",
    "ReviewReason",
    "Stage",
    "Word",
    "pipeline",
    "tls_credentials",
]
