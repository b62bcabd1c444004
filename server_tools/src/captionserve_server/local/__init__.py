"""Captioning in one process, without a server: the edge mode.

Needs onnxruntime, numpy, Pillow and tokenizers only; `pipeline` and
`LocalResult.alt_text` need the client as well.
"""

from captionserve_server.core.results import FinishedCaption
from captionserve_server.local.captioner import (
    LocalCaptioner,
    LocalRegion,
    LocalResult,
    LocalStream,
    LocalUpdate,
    NamedArguments,
)
from captionserve_server.local.image_to_text import pipeline
from captionserve_server.local.images import ImageInput
from captionserve_server.local.model_folder import ModelFolderError

__all__ = [
    "FinishedCaption",
    "ImageInput",
    "LocalCaptioner",
    "LocalRegion",
    "LocalResult",
    "LocalStream",
    "LocalUpdate",
    "ModelFolderError",
    "NamedArguments",
    "pipeline",
]
