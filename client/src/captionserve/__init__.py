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
    Caption,
    CaptionResult,
    CaptionUpdate,
    DescribedRegion,
    FinishReason,
    ModelInfo,
    Models,
    OptionLimits,
    ReviewReason,
    Word,
)
from captionserve._transport import tls_credentials

__all__ = [
    "AltText",
    "AltTextWarning",
    "AsyncCaptionClient",
    "Attention",
    "Caption",
    "CaptionClient",
    "CaptionError",
    "CaptionResult",
    "CaptionUpdate",
    "DescribedRegion",
    "FinishReason",
    "Framing",
    "GenerationOptions",
    "ImageInput",
    "ImageToTextPipeline",
    "ModelInfo",
    "Models",
    "OptionLimits",
    "Outcome",
    "ReviewReason",
    "Word",
    "pipeline",
    "tls_credentials",
]
