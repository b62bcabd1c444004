"""What commands share that caption many images: a service to ask, and asking it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from captionserve import CaptionResult, GenerationOptions
from PIL import Image
from rich.progress import track

from captionserve_server.cli.console import messages
from captionserve_server.cli.served import served_with_progress
from captionserve_server.cli.service_options import ServiceOptions

# Enough that encoding and decoding batches stay full.
_IN_FLIGHT = 16
_TIMEOUT_SECONDS = 120.0


@contextmanager
def asked_service(service: ServiceOptions, checkpoint: Path) -> Iterator[ServiceOptions]:
    """The service as it was given, or one that serves the checkpoint until the end."""
    if service.target is not None:
        yield service
        return
    with served_with_progress(str(checkpoint)) as started:
        yield ServiceOptions(started.grpc)


def caption_all(
    service: ServiceOptions,
    images: Sequence[Image.Image],
    options: GenerationOptions,
    label: str,
) -> list[CaptionResult]:
    """Caption images, with a progress bar of that label."""
    with (
        service.client(_TIMEOUT_SECONDS) as client,
        ThreadPoolExecutor(_IN_FLIGHT) as pool,
    ):
        results = pool.map(lambda image: client.caption(image, options), images)
        return list(track(results, label, total=len(images), console=messages, transient=True))
