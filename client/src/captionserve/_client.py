"""The blocking client."""

from __future__ import annotations

from collections.abc import Generator
from types import TracebackType

import grpc

from captionserve._errors import errors_mapped
from captionserve._images import ImageInput
from captionserve._options import GenerationOptions
from captionserve._results import (
    CaptionResult,
    CaptionUpdate,
    from_proto,
    update_from_proto,
)
from captionserve._transport import (
    DEFAULT_TIMEOUT_SECONDS,
    build_request,
    build_stream_request,
    channel_options,
    checked_timeout,
)
from captionserve.v1 import caption_pb2_grpc


class CaptionClient:
    """Captions images with a captionserve service; may be shared by threads.

    Use it as a context manager, or close it:

        with CaptionClient("127.0.0.1:9000") as client:
            print(client.caption("photo.jpg").text)
    """

    def __init__(
        self,
        target: str,
        *,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """Prepare a channel; it connects with the first call.

        Args:
            target: host:port of the service, or a target as gRPC names it, such as
                dns:///captions:9000, which spreads calls over all addresses of the name.
            timeout: seconds a call may take when it does not say otherwise.
            credentials: for TLS; without them the connection is not encrypted.

        Raises:
            ValueError: if the timeout is not a positive, finite number.
        """
        self._timeout_seconds = checked_timeout(timeout)
        if credentials is None:
            self._channel = grpc.insecure_channel(target, channel_options())
        else:
            self._channel = grpc.secure_channel(target, credentials, channel_options())
        self._stub = caption_pb2_grpc.CaptionServiceStub(self._channel)

    def caption(
        self,
        image: ImageInput,
        options: GenerationOptions | None = None,
        *,
        timeout: float | None = None,
        bypass_cache: bool = False,
    ) -> CaptionResult:
        """Describe one image.

        Args:
            image: a path, an encoded image as bytes, a binary file object, a PIL image, a uint8
                array of shape (height, width, 3), or a float32 or float64 array or torch tensor of
                shape (3, height, width) as the checkpoint's own image processor makes it.
            options: how to decode; None leaves everything to the server.
            timeout: seconds the call may take, retries included; None takes the client's.
            bypass_cache: have the answer computed anew, whatever the server remembers.

        Raises:
            CaptionError: if the call failed, or an option cannot be sent.
            TypeError: if the image has the wrong type.
            ValueError: if the image or the timeout cannot be sent.
            OSError: if the image's file cannot be read.
        """
        seconds = self._timeout_seconds if timeout is None else checked_timeout(timeout)
        request = build_request(image, options, bypass_cache=bypass_cache)
        with errors_mapped():
            return from_proto(self._stub.Caption(request, timeout=seconds))

    def caption_stream(
        self,
        image: ImageInput,
        options: GenerationOptions | None = None,
        *,
        timeout: float | None = None,
    ) -> Generator[CaptionUpdate, None, None]:
        """Describe one image and yield the words as they become certain, at last the result.

        The words of greedy search and sampling come one by one, those of beam search when all beams
        that are left share them. Closing the generator, which leaving a loop over it does unless
        somebody else holds it, ends the work on the server. Errors are raised from within the loop.
        Arguments and errors are those of `caption`.
        """
        seconds = self._timeout_seconds if timeout is None else checked_timeout(timeout)
        request = build_stream_request(image, options)
        with errors_mapped():
            call = self._stub.StreamCaption(request, timeout=seconds)
            try:
                for response in call:
                    yield update_from_proto(response)
            finally:
                call.cancel()

    def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        self._channel.close()

    def __enter__(self) -> CaptionClient:
        """Give the client itself."""
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connection."""
        self.close()
