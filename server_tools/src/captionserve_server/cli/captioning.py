"""What commands share that caption many images: a service to ask, and asking it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from captionserve import CaptionClient, CaptionResult, GenerationOptions
from PIL import Image
from rich.progress import track

from captionserve_server.cli.console import messages
from captionserve_server.cli.served import served_with_progress

# Enough that encoding and decoding batches stay full.
_IN_FLIGHT = 16
_TIMEOUT_SECONDS = 120.0


@contextmanager
def service_at(target: str | None, checkpoint: Path) -> Iterator[str]:
    """HOST:PORT of the service at `target`, or of one that serves the checkpoint until the end."""
    if target is not None:
        yield target
        return
    with served_with_progress(str(checkpoint)) as service:
        yield service.grpc


def caption_all(
    target: str, images: Sequence[Image.Image], options: GenerationOptions, label: str
) -> list[CaptionResult]:
    """Caption images, with a progress bar of that label."""
    with (
        CaptionClient(target, timeout=_TIMEOUT_SECONDS) as client,
        ThreadPoolExecutor(_IN_FLIGHT) as pool,
    ):
        results = pool.map(lambda image: client.caption(image, options), images)
        return list(track(results, label, total=len(images), console=messages, transient=True))
