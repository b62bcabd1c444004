"""The image-to-text pipeline of transformers 4.57 in one process.

What it takes and gives back is the client's (`captionserve`), which is imported only when a
pipeline is made: nothing else here needs it, nor gRPC.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, cast

from captionserve_server.local.captioner import LocalCaptioner, LocalResult

if TYPE_CHECKING:
    from captionserve import GenerationOptions
    from captionserve import ImageInput as ClientImage
    from captionserve._pipeline import CallKeywords, ImageToTextPipeline
    from typing_extensions import Unpack

    from captionserve_server.local.images import ImageInput


def pipeline(
    task: str | None = None,
    model: str | os.PathLike[str] | None = None,
    *,
    threads: int = 0,
    **keywords: Unpack[CallKeywords],
) -> ImageToTextPipeline:
    """The `pipeline("image-to-text")` of transformers, in this process and without PyTorch.

    Args:
        task: "image-to-text", or None.
        model: a model repository, as `captionserve export` writes it.
        threads: of ONNX Runtime; 0 is one per core.
        **keywords: as of `captionserve.pipeline`; batch_size changes nothing here: the engine takes
            as many images together as it has room for.

    Raises:
        ImportError: if the client, `captionserve`, is not installed.
        KeyError: if the task is another.
        RuntimeError: if there is no model.
        TypeError: if there is no such keyword.
        ModelFolderError: if something in the folder is missing or damaged.
    """
    try:
        from captionserve._pipeline import ImageToTextPipeline, check_task
    except ImportError as error:
        raise ImportError("a pipeline needs the client too: pip install captionserve") from error
    check_task(task, model, "a folder that `captionserve export` wrote")
    captioner = LocalCaptioner(cast(str, model), threads=threads)
    return ImageToTextPipeline(_InProcess(captioner), **keywords)


class _InProcess:
    """A captioner of this process, as a pipeline asks it."""

    def __init__(self, captioner: LocalCaptioner) -> None:
        self._captioner = captioner

    def one(self, image: ClientImage, options: GenerationOptions) -> LocalResult:
        return self._captioner.caption(cast("ImageInput", image), options)

    def each(
        self, images: Iterator[ClientImage], options: GenerationOptions, ahead: int
    ) -> Generator[LocalResult | Exception, None, None]:
        yield from self._captioner.caption_each(cast("Iterator[ImageInput]", images), options)

    def close(self) -> None:
        self._captioner.close()
