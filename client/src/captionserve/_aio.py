"""The asyncio client; it differs from the blocking one in how it waits, and in nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
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


class AsyncCaptionClient:
    """Captions images with a captionserve service, from the event loop that it is made in.

    Use it as a context manager, or close it:

        async with AsyncCaptionClient("127.0.0.1:9000") as client:
            print((await client.caption("photo.jpg")).text)
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
            RuntimeError: if no event loop is running.
            ValueError: if the timeout is not a positive, finite number.
        """
        # gRPC would tie the channel to some other loop and fail at the first call.
        asyncio.get_running_loop()
        self._timeout_seconds = checked_timeout(timeout)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, channel_options())
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, channel_options())
        self._stub = caption_pb2_grpc.CaptionServiceStub(self._channel)

    async def caption(
        self,
        image: ImageInput,
        options: GenerationOptions | None = None,
        *,
        timeout: float | None = None,
        bypass_cache: bool = False,
    ) -> CaptionResult:
        """Describe one image; cancelling the task cancels the work on the server.

        Arguments and errors are those of `CaptionClient.caption`.
        """
        seconds = self._timeout_seconds if timeout is None else checked_timeout(timeout)
        # Reading a file and encoding a picture would hold the loop up.
        request = await asyncio.to_thread(build_request, image, options, bypass_cache=bypass_cache)
        with errors_mapped():
            return from_proto(await self._stub.Caption(request, timeout=seconds))

    async def caption_stream(
        self,
        image: ImageInput,
        options: GenerationOptions | None = None,
        *,
        timeout: float | None = None,
    ) -> AsyncGenerator[CaptionUpdate, None]:
        """Describe one image and yield the words as they become certain, at last the result.

        The words of greedy search and sampling come one by one, those of beam search when all beams
        that are left share them. Closing the generator, which leaving a loop over it does unless
        somebody else holds it, ends the work on the server. Errors are raised from within the loop.
        Arguments and errors are those of `CaptionClient.caption`.
        """
        seconds = self._timeout_seconds if timeout is None else checked_timeout(timeout)
        request = await asyncio.to_thread(build_stream_request, image, options)
        with errors_mapped():
            call = self._stub.StreamCaption(request, timeout=seconds)
            try:
                async for response in call:
                    yield update_from_proto(response)
            finally:
                call.cancel()

    async def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncCaptionClient:
        """Give the client itself."""
        return self

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connection."""
        await self.close()
